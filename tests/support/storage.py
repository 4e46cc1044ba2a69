"""How numbers are stored, written down a second time for the tests: bf16 and fp16 from their bits to float64, and fp32
rounded to them in float64, to a multiple of the distance between neighbouring numbers, halves to even.
"""

import numpy as np
import torch

from ddpm_fast.ops import q_sample

IDENTITY = torch.tensor([[1.0, 0.0]])  # x_t = 1 x0 + 0 noise; a noise of -0 leaves every x0 as it is, -0 too
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Bits of the significand, exponent of the smallest subnormal number, and where the numbers end.
FORMAT = {"bf16": (8, -133, 2.0**128), "fp16": (11, -24, 2.0**16)}


def through(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x loaded and stored by the op, with nothing done to it in between."""
    return q_sample(x[None], torch.tensor([0]), IDENTITY, torch.full_like(x[None], -0.0, dtype=torch.float32), dtype)[0]


def patterns(name: str) -> torch.Tensor:
    return torch.arange(2**16).to(torch.uint16).view(LOW[name])


def exact_values(name: str) -> np.ndarray:
    """All 65,536 numbers as float64, decoded from their bits here."""
    bits = np.arange(2**16, dtype=np.uint32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        if name == "bf16":
            return (bits << 16).view(np.float32).astype(np.float64)
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)


def nearest_even(x: np.ndarray, name: str) -> np.ndarray:
    """fp32 values rounded to bf16 or fp16, as float64."""
    significand, smallest, end = FORMAT[name]
    with np.errstate(invalid="ignore"):  # a signalling NaN
        x = x.astype(np.float64)
    finite = np.where(np.isfinite(x), x, 0.0)
    place = np.ldexp(1.0, np.maximum(np.frexp(finite)[1] - significand, smallest))
    rounded = np.rint(finite / place) * place
    rounded = np.where(np.abs(rounded) >= end, np.copysign(np.inf, finite), rounded)
    return np.where(np.isfinite(x), rounded, x)


def same(actual: torch.Tensor, expected: np.ndarray) -> None:
    got = actual.double().numpy()
    wrong = ~((got == expected) & (np.signbit(got) == np.signbit(expected)) | np.isnan(got) & np.isnan(expected))
    where = np.flatnonzero(wrong)
    assert not len(where), (
        f"{len(where)} wrong, first at {where[0]}: {got[where[0]]!r}, expected {expected[where[0]]!r}"
    )


def boundaries(name: str) -> np.ndarray:
    """fp32: every midpoint of two neighbours, the fp32 number on either side of it, and the neighbours themselves."""
    values = exact_values(name)
    values = np.unique(values[np.isfinite(values)])
    largest = values[-1]
    beyond = largest + (largest - values[-2])  # where the next number would be: halfway there is infinity
    values = np.concatenate([[-beyond], values, [beyond]])
    middle = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    infinity = np.float32(np.inf)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    return np.concatenate([values, middle, np.nextafter(middle, infinity), np.nextafter(middle, -infinity)])


SPECIAL = np.concatenate(
    [
        [0.0, -0.0, np.inf, -np.inf, np.nan, 65519.996, 65520.0, -65520.0, 3.4028235e38, -3.4028235e38, 1e-45, -1e-45],
        [2.0**-24, 2.0**-25, 2.0**-25 * 1.0000001, 2.0**-14, 2.0**-14 * 0.9999999, 2.0**-126, 2.0**-133, 2.0**-134],
    ],
    dtype=np.float32,
)
