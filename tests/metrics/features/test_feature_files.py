"""Files of features: read whatever they hold, and refused for what they should not."""

import json

import numpy as np
import pytest
import torch
from support.feature_networks import Tiny, made_images

from ddpm_fast.errors import InputError
from ddpm_fast.metrics.feature_set import FeatureSet, Kind
from ddpm_fast.metrics.features import extract, load_extractor
from ddpm_fast.metrics.features.file import UNKNOWN, read_features, write_features
from ddpm_fast.metrics.statistics import Statistics

FEATURES = np.random.default_rng(0).standard_normal((5, 3))
FITTING = {"features": "a", "resizing": "b", "digest": "c", "source": "d", "n": 5}


def test_a_set_is_read_as_it_was_written(tmp_path):
    written = extract(load_extractor(Tiny()), [made_images((5, 3, 8, 8))], source="mine")
    write_features(tmp_path / "features.npz", written)
    read = read_features(tmp_path / "features.npz")
    assert (read.kind, read.source, read.n) == (written.kind, "mine", 5)
    assert torch.equal(read.features, written.features) and torch.equal(read.logits, written.logits)
    assert torch.allclose(read.statistics.covariance, written.statistics.covariance, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f8"])
@pytest.mark.parametrize("name", ["features.npy", "features.npz"])
def test_arrays_of_others_are_read_in_fp32(tmp_path, dtype, name):
    array = FEATURES.astype(dtype)
    np.save(tmp_path / name, array) if name.endswith("npy") else np.savez(tmp_path / name, features=array)
    read = read_features(tmp_path / name)
    assert read.kind == UNKNOWN and read.source == name and read.logits is None
    assert np.array_equal(read.features.numpy(), array.astype(np.float32))


def test_a_set_with_statistics_alone_is_not_written(tmp_path):
    with pytest.raises(InputError, match="write_statistics"):
        write_features(tmp_path / "features.npz", FeatureSet(Kind("a", "b"), "c", Statistics.of(FEATURES)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"other": FEATURES}, "no array called 'features'"),
        ({"features": FEATURES[0]}, r"float64 \[3\]; expected \[n, d\]"),
        ({"features": FEATURES[:0]}, "at least 1"),
        ({"features": FEATURES.astype(int)}, "expected float16"),
        ({"features": FEATURES.astype(object)}, "pickled objects"),
        ({"features": np.where(np.arange(5)[:, None] == 3, np.nan, FEATURES)}, "row 3"),
        ({"features": FEATURES * 1e300}, "not all finite in fp32, first in row 0"),
        ({"features": FEATURES, "logits": FEATURES[:4]}, "5 features and 4 logits"),
        ({"features": FEATURES, "ddpm_fast": np.array(3)}, "expected a text"),
        ({"features": FEATURES, "ddpm_fast": np.array("[" * 9999)}, "cannot be read"),
        ({"features": FEATURES, "ddpm_fast": np.array(json.dumps(FITTING | {"n": -1}))}, "cannot be read"),
        ({"features": FEATURES, "ddpm_fast": np.array(json.dumps(FITTING | {"digest": 1}))}, "cannot be read"),
        ({"features": FEATURES, "ddpm_fast": np.array("x" * 20_000)}, "at most"),
    ],
)
def test_what_is_no_file_of_features_is_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "features.npz", allow_pickle=True, **arrays)
    with pytest.raises(InputError, match=said):
        read_features(tmp_path / "features.npz")


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    np.save(tmp_path / "features.npy", FEATURES)
    content = (tmp_path / "features.npy").read_bytes().replace(b"(5, 3)", b"(9, 9)")
    (tmp_path / "features.npy").write_bytes(content)
    with pytest.raises(InputError, match="holds"):
        read_features(tmp_path / "features.npy")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_features(tmp_path / "features.npz")


def test_texts_that_a_terminal_obeys_are_not_passed_on(tmp_path):
    note = json.dumps(FITTING | {"features": "a\x1b[2J"})
    np.savez(tmp_path / "features.npz", features=FEATURES, ddpm_fast=np.array(note))
    assert read_features(tmp_path / "features.npz").kind.features == r"a\x1b[2J"
