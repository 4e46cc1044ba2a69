"""The kernel distance against sums over pairs, written one by one."""

import numpy as np
import pytest
import torch
from support.metric_cases import features

from ddpm_fast.errors import InputError
from ddpm_fast.metrics import kernel, kernel_distance


def by_pairs(x, y) -> float:
    """The unbiased squared maximum mean discrepancy as Binkowski et al. 2018 write it."""
    x, y = x.double().numpy(), y.double().numpy()
    n = len(x)

    def k(a, b) -> float:
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    apart = [(i, j) for i in range(n) for j in range(n) if i != j]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in apart) / (n * (n - 1))
    return within - 2 * sum(k(a, b) for a in x for b in y) / n**2


def test_the_whole_sets_are_by_pairs():
    x, y = (vectors[:30] for vectors in features())
    found = kernel_distance(x, y, subsets=3, subset_size=30)
    assert found.value == pytest.approx(by_pairs(x, y), rel=1e-9)
    assert found.error == pytest.approx(0, abs=1e-9 * abs(found.value)), "all subsets are the whole sets"
    assert [type(number) for number in found] == [float, float]


@pytest.mark.parametrize("block", [1, 1 << 24], ids=["row by row", "at once"])
@pytest.mark.parametrize("subsets", [4, 400], ids=["fewer than the pairs of all", "more"])
def test_subsets_are_drawn_in_turn_and_their_mean_and_spread_given(subsets, block, monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK", block)
    x, y = (vectors[:n] for vectors, n in zip(features(), (60, 80), strict=True))
    random = np.random.RandomState(5)
    drawn = [(random.choice(60, 7, replace=False), random.choice(80, 7, replace=False)) for _ in range(subsets)]
    distances = [by_pairs(x[i], y[j]) for i, j in drawn]
    found = kernel_distance(x, y.numpy(), subsets=subsets, subset_size=7, seed=5)
    assert found.value == pytest.approx(np.mean(distances), rel=1e-9)
    assert found.error == pytest.approx(np.std(distances), rel=1e-9)


def test_without_bias_the_mean_over_sets_of_one_distribution_is_0_and_halves_tell_the_error():
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 60, 4, generator=generator) for _ in range(80)]
    found = np.array([kernel_distance(x, y + 0.5, subsets=20, subset_size=30) for x, y in pairs])
    spread = found[:, 0].std()
    assert np.sqrt(np.square(found[:, 1]).mean()) == pytest.approx(spread, rel=0.3), "the standard error"
    same = np.array([kernel_distance(x, y, subsets=1, subset_size=60).value for x, y in pairs])
    assert abs(same.mean()) < 3 * same.std() / len(pairs) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"subset_size": 60}, "have 50 and 60 images, and subset_size is 60; take smaller subsets"),
        ({"subset_size": 1}, "subset_size is 1"),
        ({"subsets": 0}, "subsets is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"y": np.ones((60, 4))}, "first features have 24 numbers for each image and the second features 4"),
        ({"x": np.ones((50, 0))}, "at least one number for each image"),
    ],
)
def test_what_does_not_fit_is_said(arguments, words):
    x, y = features()
    with pytest.raises(InputError, match=words):
        kernel_distance(**{"x": x[:50], "y": y[:60], "subset_size": 20, **arguments})
