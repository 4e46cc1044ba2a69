"""The accuracy that csrc/functions.h and csrc/bound.h claim, measured against float64: their functions are compiled by
themselves, without Python, and swept.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_ndtr

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")

PROGRAM = """
#include "bound.h"

#define SWEEP(name, formula)                                                    \\
    extern "C" void name(const float* from, float* to, long count) {           \\
        for (long i = 0; i < count; ++i) { const float x = from[i]; to[i] = formula; } \\
    }

namespace ddpm {
SWEEP(exponential_, exponential(x))
SWEEP(open_exponential_, open_exponential(x))
SWEEP(logarithm_, logarithm(x))
SWEEP(rounded_tanh_, rounded_tanh(x))
SWEEP(rounded_exponential_, rounded_exponential(x))
SWEEP(scaled_log_tail_, scaled_log_tail(x))
SWEEP(kl_spread_, kl_term(BoundRow{}, 0.0f, x).nats)
SWEEP(lesser_, lesser(x, 1.0f))
SWEEP(greater_, greater(x, 1.0f))
SWEEP(magnitude_, magnitude(x))
}
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler here: the functions are tested through the ops alone")
    folder = tmp_path_factory.mktemp("functions")
    (folder / "sweep.cpp").write_text(PROGRAM)
    command = [COMPILER, "-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run([*command, "sweep.cpp", "-o", "sweep.so"], cwd=folder, check=True, capture_output=True)
    library = ctypes.CDLL(str(folder / "sweep.so"))

    def run(name: str, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, np.float32)
        y = np.empty_like(x)
        sweep = getattr(library, f"{name}_")
        sweep(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_long(len(x)))
        return y

    return run


def evenly(low: float, high: float, count: int = 1_000_000) -> np.ndarray:
    return np.linspace(low, high, count).astype(np.float32)


def every_exponent() -> np.ndarray:
    """Positive normal numbers: all exponents, many significands each."""
    bits = np.random.default_rng(0).integers(0x00800000, 0x7F800000, 1_000_000, dtype=np.uint32)
    return bits.view(np.float32)


def off_by(actual: np.ndarray, exact: np.ndarray, least: float = 0.0) -> float:
    """The largest error relative to the exact value, or to `least` where that is larger."""
    return float(np.max(np.abs(actual - exact) / np.maximum(np.abs(exact), least)))


def test_exponential(functions):
    x = evenly(-87, 88)
    assert off_by(functions("exponential", x), np.exp(x.astype(np.float64))) < 1.2e-7
    assert functions("exponential", np.zeros(1))[0] == 1


def test_exponential_is_held_within_fp32s_normal_numbers(functions):
    ends = functions("exponential", np.array([-1e30, -np.inf, -87.5, 88.5, np.inf, 1e30]))
    np.testing.assert_allclose(ends, np.exp([-87.0] * 3 + [88.0] * 3), rtol=1.2e-7)
    assert np.isnan(functions("exponential", np.array([np.nan])))[0]


def test_open_exponential_reaches_zero_and_infinity(functions):
    x = evenly(-87, 88)
    assert np.array_equal(functions("open_exponential", x), functions("exponential", x))
    x = evenly(88, 88.72, 1000)
    assert off_by(functions("open_exponential", x), np.exp(x.astype(np.float64))) < 2e-7
    ends = functions("open_exponential", np.array([-np.inf, -1e30, -87.5, 88.73, 1e30, np.inf, np.nan]))
    np.testing.assert_array_equal(ends, [0, 0, 0, np.inf, np.inf, np.inf, np.nan])


def test_logarithm(functions):
    for x in (evenly(0.01, 4), every_exponent()):
        assert off_by(functions("logarithm", x), np.log(x.astype(np.float64)), least=1) < 1.2e-7
    assert functions("logarithm", np.ones(1))[0] == 0


def test_logarithm_near_1_keeps_its_digits(functions):
    x = (1 + np.linspace(-1e-3, 1e-3, 100_001)).astype(np.float32)
    x = x[x != 1]
    assert off_by(functions("logarithm", x), np.log(x.astype(np.float64))) < 1.2e-7


def test_logarithm_of_what_is_no_number_is_none(functions):
    y = functions("logarithm", np.array([np.nan, np.inf]))
    assert np.isnan(y[0]) and y[1] == np.inf


def check_rounding(actual: np.ndarray, exact: np.ndarray, share: float) -> None:
    """The nearest fp32 number, except for a share of the values, which have its neighbour."""
    nearest = exact.astype(np.float32)
    assert (np.abs(actual.view(np.int32) - nearest.view(np.int32)) <= 1).all()
    assert (actual != nearest).mean() < share


def test_rounded_exponential(functions):
    x = evenly(-59, 59)
    check_rounding(functions("rounded_exponential", x), np.exp(x.astype(np.float64)), share=0.01)


@pytest.mark.parametrize(
    "low, high, share",
    [(-12, 12, 0.005), (0.4, 0.7, 0.08), (-1e-3, 1e-3, 0.005)],
    ids=["all", "at the switch", "near 0"],
)
def test_rounded_tanh(low, high, share, functions):
    x = evenly(low, high)
    x = x[x != 0]
    check_rounding(functions("rounded_tanh", x), np.tanh(x.astype(np.float64)), share)


def test_rounded_tanh_is_odd_and_ends_at_1(functions):
    x = evenly(0, 60, 10_001)
    y = functions("rounded_tanh", x)
    assert (functions("rounded_tanh", -x) == -y).all() and (np.abs(y) <= 1).all() and (y[x > 10] == 1).all()


def test_scaled_log_tail(functions):
    for x in (evenly(0, 10), evenly(10, 40), np.geomspace(40, 1e5, 100_000)):
        exact = log_ndtr(-x.astype(np.float32).astype(np.float64)) + x.astype(np.float32).astype(np.float64) ** 2 / 2
        # Beyond 1e3 float64 itself has lost digits of the sum: there the asymptotic series.
        far = x > 50
        u = x.astype(np.float32).astype(np.float64)[far]
        exact[far] = -np.log(u) - 0.5 * np.log(2 * np.pi) + np.log1p(-1 / u**2 + 3 / u**4)
        assert off_by(functions("scaled_log_tail", x), exact, least=1) < 1.2e-6


def test_the_spread_of_two_log_variances_keeps_its_digits(functions):
    # (e^-d - 1 + d) / 2, of which d = 1e-6 leaves 2.5e-13.
    d = np.concatenate([np.geomspace(1e-7, 80, 500_000), -np.geomspace(1e-7, 80, 500_000)]).astype(np.float32)
    wide = d.astype(np.float64)
    small = wide**2 * (0.5 - wide * (1 / 6 - wide * (1 / 24 - wide * (1 / 120 - wide / 720))))
    exact = 0.5 * np.where(abs(wide) < 0.01, small, np.expm1(-wide) + wide)
    assert off_by(functions("kl_spread", d), exact) < 6e-7


def test_a_nan_is_not_clamped_away(functions):
    for name, bound_ in (("lesser", np.minimum), ("greater", np.maximum)):
        x = np.array([-np.inf, -2, 1, 3, np.inf], np.float32)
        assert (functions(name, x) == bound_(x, 1)).all()
        assert np.isnan(functions(name, np.array([np.nan])))[0]
    assert functions("magnitude", np.array([-2.5])) == 2.5
