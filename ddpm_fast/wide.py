"""float64, on the devices that have it."""

from __future__ import annotations

from functools import cache

import torch

_HAVE_IT = ("cpu", "cuda", "meta")


def wide(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it: Apple's GPUs ("mps") and some of Intel's ("xpu") have none."""
    return torch.float64 if device.type in _HAVE_IT or _has_float64(device.type) else torch.float32


@cache
def _has_float64(kind: str) -> bool:
    try:
        torch.zeros(2, dtype=torch.float64, device=kind).sqrt()
    except (TypeError, RuntimeError):  # MPS raises the first, XPU the second
        return False
    return True
