"""All metrics at once: each is that of its function, with what it was measured with."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from support.metric_cases import features, logits, moments

from ddpm_fast.errors import InputError
from ddpm_fast.metrics import (
    Statistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from ddpm_fast.metrics.feature_set import FeatureSet, Kind
from ddpm_fast.metrics.measure import METRICS, measure

KIND = Kind("small network", "bilinear, to 32x32", "abc")


def images(which: int, source: str) -> FeatureSet:
    vectors = features()[which]
    return FeatureSet(KIND, source, Statistics.of(vectors), vectors, logits()[: len(vectors)])


REAL, FAKE = images(0, "photos"), images(1, "samples")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_each_metric_is_that_of_its_function_and_all_are_jsons():
    found = measure(FAKE, REAL, METRICS)
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["fid", "kid", "pr", "is", "about"]
    real, fake = features()
    assert found["fid"]["value"] == pytest.approx(frechet_distance(*moments(fake), *moments(real)), rel=1e-6)
    assert 0 < found["fid"]["bias"] < found["fid"]["value"]
    kid = kernel_distance(fake, real, subset_size=90, seed=2020)
    assert found["kid"] == {"value": kid.value, "error": kid.error, "subset_size": 90}
    pr = precision_recall(real, fake)._asdict() | density_coverage(real, fake)._asdict()
    assert found["pr"] == pr
    score = inception_score(FAKE.logits, seed=2020)
    assert found["is"] == {"mean": score.mean, "std": score.std, "splits": 10}
    about = {"features": "small network", "resizing": "bilinear, to 32x32", "reference": "photos"}
    assert found["about"] == about | {"n": 180, "reference_n": 230}


def test_only_what_is_asked_for_is_computed():
    bare = replace(FAKE, features=None, logits=None)
    found = measure(bare, replace(REAL, features=None), ["fid"])
    assert found["fid"]["value"] == pytest.approx(measure(FAKE, REAL, ["fid"])["fid"]["value"], rel=1e-9)
    assert found["fid"]["bias"] is None
    assert list(found) == ["fid", "about"]


def test_statistics_of_an_unknown_number_have_none():
    mean, covariance = moments(features()[0])
    reference = FeatureSet(KIND, "theirs.npz", Statistics.from_moments(0, mean, covariance))
    found = measure(FAKE, reference, ["fid"])
    assert found["about"]["reference_n"] is None
    assert found["fid"] == pytest.approx(measure(FAKE, REAL, ["fid"])["fid"], rel=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": "another"}, "the features of the samples and of the reference differ: 'small network' and 'anot"),
        ({"resizing": "nearest"}, "the resizing of the samples and of the reference differ"),
        ({"digest": "def"}, "the weights of the extractor .* differ: 'abc' and 'def'. Their comparison means nothing"),
        ({"features": "", "resizing": "", "digest": ""}, "features of the reference photos are is not known"),
    ],
)
def test_sets_of_different_kinds_are_not_compared_without_a_warning(change, words):
    with pytest.warns(UserWarning, match=words) as warned:
        measure(FAKE, replace(REAL, kind=replace(KIND, **change)), ["fid"])
    assert len(warned) == 1


def test_others_statistics_are_taken_for_inceptions():
    unknown = replace(REAL, kind=Kind("", ""))
    inception = replace(FAKE, kind=Kind("inception-2015", "bilinear", "abc"))
    measure(inception, unknown, ["fid"])
    measure(unknown, unknown, ["fid"])


@pytest.mark.parametrize(
    ("fake", "real", "metrics", "words"),
    [
        (FAKE, REAL, ["fid", "fld"], "metric 'fld' is unknown; expected some of fid, kid, pr, is"),
        (FAKE, replace(REAL, features=None), ["kid"], "of the reference photos only the mean and covariance are known"),
        (replace(FAKE, features=None), REAL, ["pr"], "of the samples samples only .* and pr compares images one by"),
        (replace(FAKE, logits=None), REAL, ["is"], "small network come without a classifier's answers"),
    ],
)
def test_what_is_missing_is_said(fake, real, metrics, words):
    with pytest.raises(InputError, match=words):
        measure(fake, real, metrics)


def test_few_images_are_measured_too():
    few = replace(FAKE, statistics=Statistics.of(FAKE.features[:4]), features=FAKE.features[:4], logits=logits()[:4])
    found = measure(few, REAL, ["fid", "kid", "is"])
    assert found["kid"]["subset_size"] == 2 and found["is"]["splits"] == 4
    assert all(np.isfinite(number) for metric in ("fid", "kid", "is") for number in found[metric].values())
