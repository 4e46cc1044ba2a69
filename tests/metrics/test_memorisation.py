"""Nearest images and the test of memorisation, against scikit-learn's neighbours and scipy's test."""

import numpy as np
import pytest
import torch
from support.made_weights import made_input

from ddpm_fast.errors import InputError
from ddpm_fast.metrics import distances, memorisation, nearest

neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed: pip install -e '.[test]'")
stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install -e '.[test]'")


def drawn(name: str, n: int, seed: int = 0) -> torch.Tensor:
    return made_input(name, (n, 8), seed) + 5


@pytest.mark.parametrize("block", [300, 1 << 25], ids=["rows apart", "one block"])
def test_nearest_are_scikit_learns(block, monkeypatch):
    monkeypatch.setattr(distances, "_BLOCK", block)
    fake, real = drawn("fake", 40), drawn("real", 150)
    lengths, indices = neighbors.NearestNeighbors(n_neighbors=4).fit(real.double()).kneighbors(fake.double())
    found = nearest(fake, real.numpy(), k=4)
    np.testing.assert_array_equal(found.indices.numpy(), indices)
    np.testing.assert_allclose(found.distances.numpy(), lengths, rtol=1e-5)


def test_a_copy_is_0_away_whatever_its_length():
    real = drawn("real", 30) * 1000
    found = nearest(real[[7, 3]], real)
    assert found.indices.tolist() == [[7], [3]] and found.distances.tolist() == [[0.0], [0.0]]


def test_it_is_mann_and_whitneys_test_of_the_distances():
    names = {"fake": 60, "train": 200, "held": 150}
    fake, train, held_out = (drawn(name, n).double() for name, n in names.items())
    held_out *= 1.1
    found = memorisation(fake, train, held_out)
    yardstick = nearest(held_out, train).distances[:, 0].numpy()
    values = found.distances.numpy()
    test = stats.mannwhitneyu(values, yardstick, method="asymptotic", use_continuity=False, alternative="less")
    assert found.nearer == pytest.approx(1 - test.statistic / (60 * 150), rel=1e-12)
    assert stats.norm.cdf(found.z) == pytest.approx(test.pvalue, rel=1e-9)
    assert found.nearer == pytest.approx(np.mean(values[:, None] < yardstick), rel=1e-12)


def test_new_images_are_as_near_as_held_out_ones():
    train = drawn("train", 300)
    found = [memorisation(drawn("new", 200, seed), train, drawn("held", 200, seed)) for seed in range(30)]
    assert np.mean([one.nearer for one in found]) == pytest.approx(0.5, abs=0.02)
    assert 0.6 < np.std([one.z for one in found]) < 1.4
    assert np.mean([one.copies for one in found]) == pytest.approx(0.015, abs=0.01), "1% and one in 201"


def test_copies_are_counted_and_named():
    train, held_out = drawn("train", 300), drawn("held", 200)
    fake = torch.cat([train[10:40] + 1e-3 * drawn("little", 30), drawn("new", 70)])
    found = memorisation(fake, train, held_out)
    assert 0.3 <= found.copies < 0.34
    assert found.indices[:30].tolist() == list(range(10, 40))
    assert found.nearer > 0.6 and found.z < -3
    assert found.threshold == pytest.approx(float(nearest(held_out, train).distances.sort(0).values[2]))


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda x: nearest(x, x[:2], k=3), "real images are of 2 images; 3 nearest images needs at least 3"),
        (lambda x: nearest(x, x[:, :2]), "samples have 8 numbers for each image and the features of the real images 2"),
        (lambda x: nearest(x, x, k=0), "k is 0"),
        (lambda x: memorisation(x, x, x[:1]), "held-out images are of 1 images; a yardstick needs at least 2"),
        (lambda x: memorisation(x[:0], x, x), "needs at least 1"),
    ],
)
def test_what_does_not_fit_is_said(attempt, words):
    with pytest.raises(InputError, match=words):
        attempt(drawn("x", 20))
