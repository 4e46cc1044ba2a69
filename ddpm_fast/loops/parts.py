"""Names for the parts of a training step and of a sampling step, which a profiler shows: load, draw, forward and so on.

They are ranges of torch.profiler.record_function, and of NVTX under torch.autograd.profiler.emit_nvtx. A CUDA graph
that is replayed launches its kernels as one, so the parts within it are seen only in the steps before its capture.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from torch.profiler import record_function

from ddpm_fast import compat

PREFIX = "ddpm_fast: "
_UNNAMED = contextlib.nullcontext()


def part(name: str) -> AbstractContextManager[object]:
    """A block that a profiler shows as "ddpm_fast: " + name. Without a profiler it does nothing."""
    return record_function(PREFIX + name) if compat.is_profiling() else _UNNAMED
