"""The ops as Triton kernels, one file an op: on CUDA tensors, and on CPU tensors through Triton's interpreter."""

from __future__ import annotations

import os

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = {}

try:
    import triton  # noqa: F401

    unavailable = ""
except ImportError as error:
    unavailable = f"the package triton is not there ({error}). Install it: pip install triton"
else:
    from .normal import normal

    OPS["normal"] = normal


def refusal(device: torch.device) -> str:
    """Why Triton cannot run on tensors of this device, or the empty string."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return (
        f"Triton compiles for GPUs and these tensors are on {device}. Its interpreter runs them here, slowly: set "
        "TRITON_INTERPRET=1 before Python starts"
    )
