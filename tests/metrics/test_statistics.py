"""Means and covariances that are added up in parts, against numpy's over all vectors at once."""

import numpy as np
import pytest
import torch
from support.made_weights import made_input

from ddpm_fast.errors import InputError
from ddpm_fast.metrics import Statistics
from ddpm_fast.metrics import statistics as module


def vectors(n: int, offset: float = 0.0) -> torch.Tensor:
    return made_input("vectors", (n, 6)).double() * torch.logspace(0, -3, 6) + offset


def assert_are_moments_of(statistics: Statistics, x: torch.Tensor, rtol: float = 1e-10) -> None:
    assert statistics.n == len(x)
    exact = x.numpy().astype(np.longdouble)
    mean = exact.mean(0)
    covariance = ((exact - mean).T @ (exact - mean)) / (len(x) - 1)
    np.testing.assert_allclose(statistics.mean.numpy(), mean.astype(float), rtol=rtol)
    scale = np.sqrt(np.diag(covariance).astype(float))
    np.testing.assert_allclose(
        statistics.covariance.numpy() / np.outer(scale, scale),
        (covariance / np.outer(scale, scale)).astype(float),
        atol=rtol,
    )


@pytest.mark.parametrize("sizes", [(50,), (1,) * 50, (0, 20, 0, 1, 29, 0), (49, 1)])
def test_parts_of_any_sizes_are_those_of_all(sizes):
    x = vectors(50)
    statistics = Statistics(6)
    for part in x.split(list(sizes)):
        statistics.add(part)
    assert_are_moments_of(statistics, x)


def test_a_large_mean_does_not_cancel():
    # E[x x^T] - mu mu^T would be off by 1e12 * 1e-16 / 1e-6, a hundred times the last variance.
    x = vectors(400, offset=1e6)
    statistics = Statistics(6)
    for part in x.split(37):
        statistics.add(part)
    assert_are_moments_of(statistics, x, rtol=1e-5)


def test_many_vectors_are_brought_to_float64_a_piece_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 7 * 6 + 1)
    x = vectors(50)
    assert_are_moments_of(Statistics.of(x), x)


def test_float32_is_summed_in_float64():
    x = vectors(1000, offset=100).float()
    assert_are_moments_of(Statistics.of(x), x.double())
    assert_are_moments_of(Statistics.of(x.numpy()), x.double())


def test_processes_that_counted_apart_are_joined():
    x = vectors(40)
    parts = [Statistics.of(part) for part in (x[:13], x[:0], x[13:])]
    assert all(part.packed.dtype == torch.float64 and part.packed.ndim == 1 for part in parts)
    assert_are_moments_of(Statistics.joined([part.packed for part in parts]), x)
    merged = Statistics(6)
    for part in parts:
        merged.merge(part)
    assert_are_moments_of(merged, x)


def test_a_merge_with_itself_counts_twice():
    x = vectors(10)
    statistics = Statistics.of(x)
    statistics.merge(statistics)
    assert_are_moments_of(statistics, torch.cat([x, x]))


def test_moments_go_in_and_are_added_to():
    x = vectors(30)
    first = x[:20].numpy()
    statistics = Statistics.from_moments(20, first.mean(0), np.cov(first, rowvar=False))
    np.testing.assert_array_equal(statistics.covariance.numpy(), np.cov(first, rowvar=False) * 19 / 19)
    statistics.add(x[20:])
    assert_are_moments_of(statistics, x)


def test_moments_of_an_unknown_number_stay_as_they_are():
    statistics = Statistics.from_moments(0, np.zeros(2), np.eye(2))
    assert statistics.n == 0 and torch.equal(statistics.covariance, torch.eye(2, dtype=torch.float64))
    counted = Statistics.of(vectors(9)[:, :2])
    for attempt in (
        lambda: statistics.add(np.ones((3, 2))),
        lambda: statistics.merge(counted),
        lambda: counted.merge(statistics),
        lambda: statistics.packed,
    ):
        with pytest.raises(InputError, match="number of images is not known"):
            attempt()


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: Statistics(0), "length of a feature is 0"),
        (lambda: Statistics.of(np.ones((2, 40000), np.uint8)), "length of a feature is 40000; expected .* in 1..16384"),
        (lambda: Statistics(3).covariance, "at least two images, and there are 0"),
        (lambda: Statistics.of(np.ones((1, 3))).covariance, "there are 1"),
        (lambda: Statistics.of(np.ones(3)), r"shape of the features is \[3\]; expected \[n, d\]"),
        (lambda: Statistics.of("features"), "got a str without numbers"),
        (lambda: Statistics.of([[1.0, float("nan")]]), "1 of 2 numbers of the features are not finite"),
        (lambda: Statistics(3).add(np.ones((2, 4))), "vectors of 4 numbers do not join those of 3"),
        (lambda: Statistics(3).merge(Statistics(2)), "vectors of 2 numbers do not join those of 3"),
        (lambda: Statistics.from_moments(1, np.zeros(2), np.eye(2)), "one vector has no covariance"),
        (lambda: Statistics.from_moments(5, np.zeros(2), np.eye(2) * 1e308), "too large for float64"),
        (lambda: Statistics.from_moments(10**30, np.zeros(2), np.eye(2)), "n is 1000000000000000000000000000000"),
        (lambda: Statistics.from_moments(5, np.zeros(3), np.eye(2)), r"shape \[3\] and the covariance \[2, 2\]"),
        (lambda: Statistics.joined([]), "got no parts"),
        (lambda: Statistics.joined([torch.zeros(0, dtype=torch.float64)]), "expected what Statistics.packed gives"),
        (lambda: Statistics.joined([torch.zeros(6, dtype=torch.float64)]), "expected what Statistics.packed gives"),
        (lambda: Statistics.joined([Statistics(2).packed, Statistics(3).packed]), "do not join"),
    ],
)
def test_what_does_not_fit_is_said(attempt, words):
    with pytest.raises(InputError, match=words):
        attempt()
