"""Averages that are made of others are compared with the averages themselves, summed in float64 over made-up
trajectories, and the coefficients with those of EDM2's own code (golden/make_edm2.py)."""

from pathlib import Path

import numpy as np
import pytest

from ddpm_fast.nn.power_average import gamma_of
from ddpm_fast.nn.reconstruction import Profile, inner_products, reconstruct

WIDTHS = [0.001, 0.01, 0.05, 0.1, 0.2, 0.25, 0.288]
STEPS = [1, 2, 10, 1000, 10**6]  # of the decays
BOTH = (0.05, 0.1)
# The averages that are given, and those that are wanted.
CASES = {
    "evenly": (
        [(step, width) for step in range(100, 1601, 100) for width in BOTH],
        [(1600, width) for width in (0.02, 0.05, 0.07, 0.1, 0.15, 0.25)],
    ),
    "one width": ([(step, 0.1) for step in range(50, 1001, 50)], [(1000, 0.05), (1000, 0.2), (800, 0.1)]),
    "unevenly": ([(7, 0.05), (7, 0.2), (90, 0.05), (100, 0.2), (320, 0.1)], [(320, 0.12), (100, 0.08)]),
}


def profiles(pairs):
    return [Profile(*pair) for pair in pairs]


def average(trajectory, profile):
    """The power-function average after so many steps by its definition: steps tau of the integral of tau^gamma."""
    edges = (np.arange(profile.step + 1) / profile.step) ** (gamma_of(profile.width) + 1)
    return np.diff(edges) @ trajectory[: profile.step]


def trajectories(steps):
    """Made-up weights over a training, float64 [steps, 4]: they settle, grow, swing, and jump."""
    t = np.arange(1, steps + 1) / steps
    return np.stack([np.exp(-5 * t), t**2 - t, np.sin(9 * t), (t > 0.6) * 1.0], axis=1)


@pytest.mark.parametrize("case", CASES)
def test_the_coefficients_are_those_of_edm2(case):
    with np.load(Path(__file__).parents[1] / "golden" / "edm2.npz") as golden:
        expected = golden[case]
    given, wanted = CASES[case]
    np.testing.assert_allclose(reconstruct(profiles(given), profiles(wanted)).coefficients, expected, rtol=0, atol=1e-9)


def test_inner_products_are_integrals():
    """By the midpoint rule, on steps so fine that its error is below 0.03%."""
    pairs = profiles([(3, 0.05), (8, 0.05), (8, 0.2), (5, 0.28)])
    tau = (np.arange(80_000) + 0.5) / 10_000
    values = []
    for step, width in pairs:
        gamma = gamma_of(width)
        values.append(np.where(tau < step, (gamma + 1) / step * (tau / step) ** gamma, 0))
    expected = np.array(values) @ np.array(values).T / 10_000
    np.testing.assert_allclose(inner_products(pairs, pairs), expected, rtol=3e-4)


@pytest.mark.parametrize("width", BOTH)
def test_what_is_given_is_exact(width):
    given = profiles((step, width) for step in range(100, 1601, 100) for width in BOTH)
    sums = reconstruct(given, [Profile(1600, width), Profile(800, width)])
    expected = [[profile == (step, width) for step in (1600, 800)] for profile in given]
    np.testing.assert_allclose(sums.coefficients, expected, rtol=0, atol=1e-12)
    assert (sums.errors < 1e-6).all()


# The largest difference of the averages, whose weights are of size 1.
@pytest.mark.parametrize(
    ("width", "largest"), [(0.02, 4e-3), (0.03, 5e-4), (0.07, 3e-5), (0.15, 1e-4), (0.2, 1e-3), (0.25, 4e-3)]
)
def test_other_widths_come_near_and_less_so_further_outside(width, largest):
    weights = trajectories(6400)
    given = profiles((step, width) for step in range(200, 6401, 200) for width in BOTH)
    wanted = Profile(6400, width)
    sums = reconstruct(given, [wanted])
    made = sums.coefficients[:, 0] @ np.array([average(weights, profile) for profile in given])
    np.testing.assert_allclose(made, average(weights, wanted), rtol=0, atol=largest)
    share = np.diff((np.arange(6401) / 6400) ** (gamma_of(width) + 1))
    # By the inequality of Cauchy and Schwarz; the coefficients add up to 1, so that a constant makes no difference.
    swing = np.linalg.norm(weights - average(weights, wanted), axis=0)
    assert (np.abs(made - average(weights, wanted)) <= 1.02 * sums.errors[0] * np.linalg.norm(share) * swing).all()
    nearest = min(np.abs(average(weights, Profile(6400, w)) - average(weights, wanted)).max() for w in BOTH)
    assert largest < nearest / 10, "a given average would have done"


def test_the_error_is_that_of_the_profile():
    """Summed over the training steps, which are 6,400: what the integral differs by is far smaller than the errors."""
    given = profiles((step, width) for step in range(400, 6401, 400) for width in BOTH)
    wanted = profiles([(6400, 0.02), (6400, 0.2), (3000, 0.1)])
    sums = reconstruct(given, wanted)

    def profile(of):
        edges = np.minimum(np.arange(6401) / of.step, 1) ** (gamma_of(of.width) + 1)
        return np.diff(edges)

    for column, (of, error) in enumerate(zip(wanted, sums.errors, strict=True)):
        made = sums.coefficients[:, column] @ np.array([profile(one) for one in given])
        expected = np.linalg.norm(made - profile(of)) / np.linalg.norm(profile(of))
        assert error == pytest.approx(expected, rel=0.02)
    assert sums.errors[0] > 0.1 > 0.03 > sums.errors[1]
