"""Precision, recall, density and coverage against their authors' and ADM's code, and against plain loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.made_weights import made_input
from support.metric_cases import features

from ddpm_fast.errors import InputError
from ddpm_fast.metrics import density_coverage, distances, precision_recall, sample_densities

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "metrics.npz")


def all_distances(a, b) -> np.ndarray:
    return np.linalg.norm(a.double().numpy()[:, None] - b.double().numpy()[None], axis=-1)


@pytest.fixture(params=[400, 1 << 25], ids=["two rows at a time", "one block"])
def any_block(request, monkeypatch):
    monkeypatch.setattr(distances, "_BLOCK", request.param)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_adms(k, any_block):
    real, fake = features()
    for dtype in (torch.float32, torch.float64):
        found = precision_recall(real.to(dtype), fake.to(dtype), k)
        assert found == pytest.approx(tuple(GOLDEN[f"precision_recall/{k}"]), abs=1e-12)
        assert [type(number) for number in found] == [float, float]


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_are_their_authors(k, any_block):
    real, fake = features()
    found = density_coverage(real, fake.numpy(), k)
    assert found == pytest.approx(tuple(GOLDEN[f"density_coverage/{k}"]), abs=1e-12)
    assert [type(number) for number in found] == [float, float]


def test_densities_of_samples_count_the_balls_around_each():
    real, fake = features()
    radii = np.sort(all_distances(real, real), axis=1)[:, 4]  # place 0 is the image itself
    expected = (all_distances(real, fake) < radii[:, None]).sum(0) / 4
    found = sample_densities(real, fake, k=4)
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found.numpy(), expected)
    assert found.mean().item() == pytest.approx(density_coverage(real, fake, k=4).density)


def test_an_image_far_from_the_origin_is_as_well_compared():
    # In float32, |a|^2 - 2 a b + |b|^2 of numbers around 10^4 would be off by 10 to 100.
    real, fake = (vectors + 1e4 for vectors in features())
    near = precision_recall(real.double() - 1e4, fake.double() - 1e4)
    assert precision_recall(real, fake) == near
    assert 0 < near.recall < 1


def test_copies_are_inside_also_where_the_radius_is_0():
    real = torch.cat([made_input("a", (5, 3))] * 4)  # each image four times: the third neighbour is 0 away
    assert precision_recall(real, real.clone()) == (1, 1)
    assert density_coverage(real, real.clone(), k=3) == (0, 0), "an open ball of radius 0 holds nothing"


def test_samples_elsewhere_reach_nothing():
    real, fake = features()
    assert precision_recall(real, fake + 100) == (0, 0)
    assert density_coverage(real, fake + 100) == (0, 0)
    assert precision_recall(real, real[:4] + torch.tensor([1000.0])) == (0, 0)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda x, y: precision_recall(x[:3], y), r"real images are of 3 images; .* \(k = 3\) needs at least 4"),
        (lambda x, y: precision_recall(x, y[:3]), r"samples are of 3 images; .* needs at least 4"),
        (lambda x, y: density_coverage(x[:5], y), r"\(k = 5\) needs at least 6"),
        (lambda x, y: density_coverage(x, y[:0]), "needs at least 1"),
        (lambda x, y: precision_recall(x, y, k=0), "k is 0"),
        (lambda x, y: precision_recall(x, y[:, :5]), "24 numbers for each image and the features of the samples 5"),
        (lambda x, y: precision_recall(x, y * float("inf")), "are not finite"),
    ],
)
def test_what_does_not_fit_is_said(attempt, words):
    with pytest.raises(InputError, match=words):
        attempt(*features())
