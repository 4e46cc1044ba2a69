"""The short way of a call: from a public function to a kernel without torch's dispatch, where nobody would miss it.

torch's two dispatches (for autograd, and for the device) take 9.5 of the 24 us of a small call, and the checks and
structs in Python most of the rest (docs/measured.md has the figures). Two things make a call shorter:

- `on_cpu()` has the ops as C++ functions of the tensors themselves (csrc/direct.h). They check all that checks.py does,
  and return None for whatever is not as usual: then the long way is taken, which copies, or says what is wrong.
- `is_plain()` says of any tensors, also a GPU's, that an op's function can be called with them as it is.

Both only while nothing of torch may want to see the call (compat.is_watched), and with tensors of torch's own type of
which no gradient would be lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ddpm_fast import compat
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.backends.extension import _C, DTYPES
from ddpm_fast.ops.dispatch import is_usual_on_cpu


def _introduced() -> Any:
    """The C++ functions, told what they have to know of torch; or None where they cannot be used."""
    exchange = compat.tensor_exchange()
    if _C is None or exchange is None:
        return None
    functions = (torch.empty, torch.empty_like, torch.is_grad_enabled, torch.get_num_threads)
    constants = (torch.contiguous_format, torch.channels_last, *DTYPES)
    return _C.direct if _C.direct.know(exchange, (Tensor, Parameter, NoiseKey), functions, constants) else None


_direct = _introduced()


def on_cpu() -> Any:
    """The C++ functions of the ops, or None where they must not be used, here and now."""
    return None if _direct is None or compat.is_watched() or not is_usual_on_cpu() else _direct


def is_plain(*given: object) -> bool:
    """Whether an op's own function can be called with these arguments, rather than the op."""
    return _direct is not None and not compat.is_watched() and _direct.is_plain(*given)
