"""SiLU and its derivative from the GPU's own exponential and reciprocal, one instruction each where a division takes
eight and more: with them a norm would wait for its instructions and not for memory. The reciprocal is right to 1e-7 of
itself, the exponential to 1e-7 for every unit of |u|, which is 3e-8 of the results at most.
"""

import triton
import triton.language as tl

from ddpm_fast.ops.backends.triton.layout import INTERPRETED

_E = tl.constexpr("{ mul.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0; }")  # the factor is -1 / ln 2
_RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")


@triton.jit
def _decay(u):
    """e^-u"""
    if INTERPRETED:
        return tl.exp(-u)
    else:
        return tl.inline_asm_elementwise(_E, "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def silu(u):
    return u * _reciprocal(1.0 + _decay(u))


@triton.jit
def silu_derivative(u):
    """s + u s (1 - s), where s and 1 - s are r = 1 / (1 + e^-|u|) and e^-|u| r, or the other way about."""
    e = _decay(tl.abs(u))
    r = _reciprocal(1.0 + e)
    return r * (tl.where(u >= 0.0, 1.0, e) + u * e * r)
