"""All metrics that torch-fidelity has, against it: the same numbers from the same features.

CI installs it in a folder of its own, without torchvision; tests/support/without_torchvision stands in for that.
"""

from importlib.util import find_spec

import pytest
import torch
from support.metric_cases import features, logits, moments

from ddpm_fast.metrics import frechet_distance, inception_score, kernel_distance, precision_recall

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="the package torch-fidelity is missing"),
]


def peer(module: str):
    return pytest.importorskip(f"torch_fidelity.metric_{module}", reason="torch-fidelity cannot be imported")


def test_the_frechet_distance_is_theirs():
    theirs = peer("fid")
    pairs = [theirs.fid_features_to_statistics(vectors.double()) for vectors in features()]
    expected = theirs.fid_statistics_to_metric(*pairs, verbose=False)[theirs.KEY_METRIC_FID]
    (mu1, sigma1), (mu2, sigma2) = (moments(vectors) for vectors in features())
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("subsets", [5, 100])
@pytest.mark.parametrize("seed", [0, 2020])
def test_the_kernel_distance_is_theirs_for_the_same_seed(seed, subsets):
    theirs = peer("kid")
    x, y = (vectors.double() for vectors in features())
    options = {"kid_subsets": subsets, "kid_subset_size": 50, "rng_seed": seed, "verbose": False}
    expected = theirs.kid_features_to_metric(x, y, **options)
    found = kernel_distance(x, y, subsets=subsets, subset_size=50, seed=seed)
    assert found.value == pytest.approx(expected[theirs.KEY_METRIC_KID_MEAN], rel=1e-9)
    assert found.error == pytest.approx(expected[theirs.KEY_METRIC_KID_STD], rel=1e-9)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_theirs(k):
    theirs = peer("prc")
    real, fake = (vectors.double() for vectors in features())
    expected = theirs.prc_features_to_metric(fake, real, prc_neighborhood=k, verbose=False)
    found = precision_recall(real, fake, k)
    assert found == pytest.approx((expected[theirs.KEY_METRIC_PRECISION], expected[theirs.KEY_METRIC_RECALL]), abs=1e-6)


@pytest.mark.parametrize("splits", [1, 10])
def test_the_inception_score_is_theirs_for_the_same_seed(splits):
    theirs = peer("isc")
    expected = theirs.isc_features_to_metric(logits(), splits=splits, shuffle=True, rng_seed=2020)
    found = inception_score(logits(), splits=splits, seed=2020)
    assert found.mean == pytest.approx(expected[theirs.KEY_METRIC_ISC_MEAN], rel=1e-12)
    assert found.std == pytest.approx(expected[theirs.KEY_METRIC_ISC_STD], rel=1e-9, abs=1e-12)
    in_order = theirs.isc_features_to_metric(logits(), splits=splits, shuffle=False)
    assert inception_score(logits(), splits=splits).mean == pytest.approx(in_order[theirs.KEY_METRIC_ISC_MEAN])


def test_float32_features_give_their_numbers_up_to_their_rounding():
    theirs, x = peer("kid"), features()[0].float()
    y = torch.cat([features()[1], features()[1] + 0.1])
    options = {"kid_subsets": 20, "kid_subset_size": 50, "verbose": False}
    expected = theirs.kid_features_to_metric(x, y, **options)[theirs.KEY_METRIC_KID_MEAN]
    assert kernel_distance(x, y, subsets=20, subset_size=50, seed=2020).value == pytest.approx(expected, rel=1e-4)
