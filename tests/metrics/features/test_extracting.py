"""From batches of images to a set of features."""

import sys

import numpy as np
import pytest
import torch
from support.feature_networks import Tiny, made_images
from torch import nn

from ddpm_fast.errors import InputError
from ddpm_fast.metrics.features import extract, load_extractor

IMAGES = made_images((50, 3, 9, 12))


@pytest.fixture(scope="module")
def extractor():
    return load_extractor(Tiny())


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize("gathered", [1, 10, 4096])
def test_the_set_has_the_features_of_all_images_in_their_order(extractor, monkeypatch, size, gathered):
    monkeypatch.setattr(sys.modules[extract.__module__], "_GATHERED", gathered)
    found = extract(extractor, IMAGES.split(size), source="mine")
    features, logits = Tiny()(IMAGES)
    assert torch.allclose(found.features, features, atol=1e-6) and torch.allclose(found.logits, logits, atol=1e-6)
    assert found.kind == extractor.kind and found.source == "mine" and found.n == 50
    expected = features.detach().double().numpy()
    assert np.allclose(found.statistics.mean, expected.mean(0), atol=1e-6)
    assert np.allclose(found.statistics.covariance, np.cov(expected.T), atol=1e-6)


def test_only_the_statistics_are_kept_if_so_asked(extractor):
    found = extract(extractor, [IMAGES], keep=False)
    assert found.features is None and found.logits is None and found.n == 50


def test_progress_is_told_the_number_of_images(extractor):
    told = []
    extract(extractor, IMAGES.split(20), progress=told.append)
    assert told == [20, 40, 50]


def test_sizes_may_differ_and_batches_be_empty(extractor):
    found = extract(extractor, [IMAGES[:2], IMAGES[:0], IMAGES[:3, :1, :8, :8]])
    assert found.n == 5 and len(found.features) == len(found.logits) == 5


def test_no_images_give_an_empty_set(extractor):
    found = extract(extractor, [])
    assert found.n == 0 and found.features.shape == (0, 6)


def test_a_feature_that_is_not_finite_names_the_image(monkeypatch):
    monkeypatch.setattr(sys.modules[extract.__module__], "_GATHERED", 8)

    class Reciprocal(nn.Module):
        def forward(self, images):
            return 1 / images.float().flatten(1)

    images = torch.ones(30, 3, 4, 4, dtype=torch.uint8)
    images[19] = 0
    with pytest.raises(InputError, match="image 19"):
        extract(load_extractor(Reciprocal(), resize=4), images.split(3))
