"""The inception score against ADM's evaluator and closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.metric_cases import logits

from ddpm_fast.errors import InputError
from ddpm_fast.metrics import inception_score

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "metrics.npz")


@pytest.mark.parametrize("size", [64, 5000])
def test_splits_by_size_are_adms(size):
    found = inception_score(logits(), split_size=size)
    assert found.mean == pytest.approx(float(GOLDEN[f"inception_score/{size}"]), rel=1e-12)
    assert [type(number) for number in found] == [float, float]


def test_sure_answers_of_all_classes_score_their_number_and_equal_ones_score_1():
    sure = 1000 * torch.eye(7).repeat(3, 1)  # e^-1000 is 0: shares whose logarithm must not be taken
    assert inception_score(sure, splits=3) == pytest.approx((7, 0))
    assert inception_score(torch.ones(20, 7).numpy(), splits=2) == pytest.approx((1, 0))


def test_the_spread_is_that_of_the_splits():
    parts = [inception_score(part, splits=1) for part in logits().split(23)]
    means = [part.mean for part in parts]
    assert {part.std for part in parts} == {0.0}
    assert inception_score(logits(), splits=10) == pytest.approx((np.mean(means), np.std(means)))


def test_a_seed_shuffles():
    by_class = torch.eye(5).repeat_interleave(40, 0) * 10
    assert inception_score(by_class, splits=5).mean == pytest.approx(1), "each split is of one class"
    assert inception_score(by_class, splits=5, seed=1).mean > 4


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: inception_score(logits()[:9]), "logits of 9 images for 10 splits; take fewer"),
        (lambda: inception_score(logits(), splits=0), "splits is 0"),
        (lambda: inception_score(logits(), split_size=0), "split_size is 0"),
        (lambda: inception_score(logits(), seed=2**32), "seed is"),
        (lambda: inception_score(logits()[:0], split_size=5), "needs at least 1"),
        (lambda: inception_score(torch.full((20, 3), torch.nan)), "60 of 60 numbers of the logits are not finite"),
    ],
)
def test_what_does_not_fit_is_said(attempt, words):
    with pytest.raises(InputError, match=words):
        attempt()
