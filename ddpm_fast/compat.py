"""Every private part of torch that cannot be avoided, in one place: each with its reason, the version it was seen in,
and what happens without it."""

from __future__ import annotations

import torch
from torch import nn

# --- loops


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether forward hooks are registered on this module.

    Reason: a CUDA graph does not call hooks, and torch has no public way to ask for them. Seen in torch 2.10 to 2.13.
    Without these attributes a network is taken to have none, and a hook on it is not called while a graph is replayed.
    """
    return bool(getattr(module, "_forward_hooks", None) or getattr(module, "_forward_pre_hooks", None))


def end_failed_capture(device: int, pool: tuple[int, int] | None) -> bool:
    """Tell the allocator that a capture which failed is over. Returns whether it did not know already.

    Reason: in torch up to 2.11 the allocator still assumes a capture after one has failed, raises at every
    empty_cache(), and keeps a pointer to the graph, which must therefore stay alive (pytorch/pytorch#180395). Newer
    versions raise RuntimeError here, because nothing is left to end. Without this function nothing is done.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is None:
        return False
    try:
        end(device, pool)
    except RuntimeError:
        return False
    return True


def cpu_has_bf16() -> bool:
    """Whether the CPU has the bf16 instructions of AVX-512.

    Reason: torch.cpu.get_capabilities() says so in public, but torch 2.10 lacks it. Seen in torch 2.10 to 2.13. Without
    either, bf16 is taken to be slow, and the commands' --precision auto chooses fp32.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(is_supported and is_supported())
