"""Ten million normals as a statistician looks at them: moments, distribution, tails, independence in every direction.

Every statistic is divided by its standard error for independent N(0, 1) draws, so one threshold serves them all: 5
sigma, exceeded by chance once in 1.7 million. The seed is fixed, so the result never changes. The same checks must
reject generators broken in the ways that counter-based ones break.
"""

import math
from functools import cache

import pytest
import torch

from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import normal

SIGMAS = 5.0
DRAWS = 10_000_000
LAGS = range(1, 9)  # 1..3 stay within a counter for some lanes, 4 and 8 are the same lane of the next two


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard errors: the product of two independent standard normals has mean 0 and variance 1."""
    return float((a * b).mean(dtype=torch.float64)) * math.sqrt(a.numel())


def square_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard errors, of z^2, whose variance is 2: sees a shared radius or a flipped sign."""
    return float(((a * a - 1) * (b * b - 1)).mean(dtype=torch.float64)) / 2 * math.sqrt(a.numel())


def tail(z: torch.Tensor, beyond: float) -> float:
    """The count of |z| > beyond in standard errors of a Poisson count."""
    expected = z.numel() * math.erfc(beyond / math.sqrt(2))
    return (int((z.abs() > beyond).sum()) - expected) / math.sqrt(expected)


def kolmogorov_smirnov(z: torch.Tensor) -> float:
    """The largest distance between the empirical and the normal distribution function, over 2^16 points."""
    edges = torch.linspace(-6, 6, 2**16 + 1, dtype=torch.float64)
    counts = torch.histc(z, bins=2**16, min=-6, max=6).double()
    below = int((z < -6).sum())
    return float(((counts.cumsum(0) + below) / z.numel() - torch.special.ndtr(edges[1:])).abs().max())


def ks_in_sigmas(z: torch.Tensor) -> float:
    """Kolmogorov's limit P(sqrt(n) D > x) = 2 exp(-2 x^2): the x of a 5 sigma event is 2.74; scaled to make it 5."""
    critical = math.sqrt(math.log(2 / math.erfc(SIGMAS / math.sqrt(2))) / 2)
    return kolmogorov_smirnov(z) * math.sqrt(z.numel()) / critical * SIGMAS


def distribution(z: torch.Tensor) -> dict[str, float]:
    """Moments about the known mean 0 and variance 1, the tails, and the whole distribution; in standard errors."""
    n = z.numel()
    square = z * z
    return {
        "mean": float(z.mean(dtype=torch.float64)) * math.sqrt(n),
        "variance": (float(square.mean(dtype=torch.float64)) - 1) * math.sqrt(n / 2),
        "third moment": float((square * z).mean(dtype=torch.float64)) * math.sqrt(n / 15),
        "fourth moment": (float((square * square).mean(dtype=torch.float64)) - 3) * math.sqrt(n / 96),
        "|z| > 4": tail(z, 4),
        "|z| > 5": tail(z, 5),
        "Kolmogorov-Smirnov": ks_in_sigmas(z),
    }


def independence(z: torch.Tensor) -> dict[str, float]:
    """z [rows, elements]: between elements at each lag, and between neighbouring rows; in standard errors."""
    found = {}
    for lag in LAGS:
        found[f"lag {lag}"] = correlation(z[:, lag:], z[:, :-lag])
    for lag in (1, 2, 4):  # the other one of a pair, the other pair of a counter, the next counter
        found[f"squares, lag {lag}"] = square_correlation(z[:, lag:], z[:, :-lag])
    if z.shape[0] > 1:
        found["rows"] = correlation(z[1:], z[:-1])
        found["squares of rows"] = square_correlation(z[1:], z[:-1])
    return found


def suspicious(found: dict[str, float]) -> dict[str, float]:
    return {name: sigmas for name, sigmas in found.items() if not abs(sigmas) < SIGMAS}


def stacked(keys: list[NoiseKey]) -> torch.Tensor:
    return torch.cat([normal(key, (DRAWS // len(keys),)) for key in keys])


@cache
def draws(along: str) -> torch.Tensor:
    """Ten million normals [rows, elements] whose neighbouring rows differ in one word of key or counter."""
    return {
        "elements": lambda: normal(NoiseKey.of(0, 1), (DRAWS,)),
        "samples": lambda: normal(NoiseKey.of(1, 10_000), (DRAWS // 10_000,)),
        "samples beyond 2^32": lambda: normal(NoiseKey.of(1, 1000, first_sample_id=2**32 - 500), (DRAWS // 1000,)),
        "steps": lambda: stacked([NoiseKey.of(2, 1, step=step) for step in range(1000)]),
        "streams": lambda: stacked([NoiseKey.of(3, 1, stream=stream) for stream in range(250)]),
        "seeds": lambda: stacked([NoiseKey.of(seed, 1) for seed in range(1000)]),
        "high words of seeds": lambda: stacked([NoiseKey.of(seed << 32, 1) for seed in range(1, 1001)]),
    }[along]()


DIRECTIONS = ["elements", "samples", "samples beyond 2^32", "steps", "streams", "seeds", "high words of seeds"]


@pytest.mark.parametrize("along", DIRECTIONS)
def test_ten_million_draws_are_standard_normal(along):
    assert draws(along).numel() == DRAWS
    assert not suspicious(distribution(draws(along)))


@pytest.mark.parametrize("along", DIRECTIONS)
def test_ten_million_draws_are_independent(along):
    assert not suspicious(independence(draws(along)))


def _lanes_repeated(z: torch.Tensor) -> torch.Tensor:
    lanes = z.view(-1, 4)
    return lanes[:, [0, 1, 0, 1]].view_as(z)


def _radius_shared(z: torch.Tensor) -> torch.Tensor:
    """Both pairs of a counter with one radius: each normal is right, together they are not."""
    pairs = z.view(-1, 2, 2)
    radius = pairs.norm(dim=2, keepdim=True)
    return (pairs / radius * radius[:, :1]).view_as(z)


BROKEN = {
    "lanes repeated": _lanes_repeated,
    "counter not advanced every fourth time": lambda z: z.view(-1, 4, 4)[:, [0, 1, 2, 2]].view_as(z),
    "one radius for both pairs": _radius_shared,
    "sample id ignored in every second row": lambda z: z.view(-1, 2, z.shape[1])[:, [0, 0]].view_as(z),
    "sign shared by two rows": lambda z: z.abs() * z[::2].sign().repeat_interleave(2, dim=0),
    "variance off by 0.5%": lambda z: z * math.sqrt(1.005),
    "mean off by 0.005": lambda z: z + 0.005,
    "tails cut off at 4": lambda z: z.clamp(-4, 4),
    "uniform of 10 bits": lambda z: torch.special.ndtri(
        ((torch.special.ndtr(z) * 1024).floor().clamp(0, 1023) + 0.5) / 1024
    ),
    "one value in a hundred is zero": lambda z: z * (torch.arange(z.shape[1]) % 100 != 0),
    "not a number": lambda z: z.index_fill(1, torch.tensor([7]), math.nan),
}


@pytest.mark.parametrize("word", BROKEN)
def test_a_broken_generator_is_seen(word):
    z = BROKEN[word](normal(NoiseKey.of(1, 1000), (2000,)))  # a fifth of the draws suffices
    assert suspicious({**distribution(z), **independence(z)})
