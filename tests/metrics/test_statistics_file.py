"""Files of statistics: those of ADM, EDM and lucidrains are read, ours are read by them, and hostile ones refused."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from support.metric_cases import features, moments

from ddpm_fast.errors import InputError
from ddpm_fast.metrics import Statistics
from ddpm_fast.metrics.feature_set import FeatureSet, Kind
from ddpm_fast.metrics.statistics_file import read_statistics, write_statistics

MU, SIGMA = moments(features()[0])
OURS = FeatureSet(Kind("small network", "bicubic", "abc"), "photos", Statistics.of(features()[0]))
IMAGES = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": MU, "sigma": SIGMA},
        {"mu": MU.astype(np.float32), "sigma": SIGMA.astype(np.float32)},
        {"mu": MU, "sigma": SIGMA, "mu_s": MU[:3], "sigma_s": SIGMA[:3, :3], "arr_0": np.zeros((9, 4, 4, 3), np.uint8)},
        {"m2": MU, "s2": SIGMA},
    ],
    ids=["EDM", "in float32", "ADM", "lucidrains"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_other_codes_files_are_read(arrays, save, tmp_path):
    save(tmp_path / "theirs.npz", **arrays)
    found = read_statistics(tmp_path / "theirs.npz")
    np.testing.assert_allclose(found.statistics.mean.numpy(), MU, rtol=1e-6)
    np.testing.assert_allclose(found.statistics.covariance.numpy(), SIGMA, atol=1e-6)
    assert (found.n, found.kind, found.source) == (0, Kind("", "", ""), "theirs.npz")
    assert found.features is None and found.statistics.covariance.dtype == torch.float64


def test_ours_is_read_back_and_by_edms_code(tmp_path):
    path = tmp_path / "ours.npz"
    write_statistics(path, OURS)
    found = read_statistics(path)
    assert (found.kind, found.source, found.n) == (OURS.kind, "photos", 230)
    torch.testing.assert_close(found.statistics.mean, OURS.statistics.mean, rtol=0, atol=0)
    torch.testing.assert_close(found.statistics.covariance, OURS.statistics.covariance, rtol=1e-15, atol=0)
    reference = dict(np.load(path))  # as EDM's fid.py reads it
    np.testing.assert_allclose(reference["mu"], MU, rtol=1e-12)
    np.testing.assert_allclose(reference["sigma"], SIGMA, atol=1e-12)


@pytest.mark.parametrize("images", [IMAGES, IMAGES[:, :1]], ids=["RGB", "grey"])
def test_adms_evaluator_finds_images_and_computes_its_own_statistics(images, tmp_path):
    path = tmp_path / "adm.npz"
    write_statistics(path, OURS, "adm", images)
    # Its read_activations takes arr_0; its read_statistics asks for mu_s only where there is mu.
    file = np.load(path)
    assert "mu" not in file
    np.testing.assert_array_equal(file["arr_0"].transpose(0, 3, 1, 2), images.expand(2, 3, 4, 5).numpy())
    assert read_statistics(path).n == 230


def test_a_file_of_an_unknown_number_is_written_as_such(tmp_path):
    unknown = FeatureSet(Kind("", ""), "theirs", Statistics.from_moments(0, MU, SIGMA))
    write_statistics(tmp_path / "again.npz", unknown)
    found = read_statistics(tmp_path / "again.npz")
    assert found.n == 0
    np.testing.assert_array_equal(found.statistics.covariance.numpy(), SIGMA)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("npz",), "form is 'npz'; expected one of edm, adm"),
        (("adm",), "form adm needs the images; give `images`"),
        (("edm", IMAGES), "form edm holds no images; leave out"),
        (("adm", IMAGES.float()), r"images are torch.float32 \[2, 3, 4, 5\]; expected uint8"),
        (("adm", IMAGES[:, :2]), r"images are torch.uint8 \[2, 2, 4, 5\]"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(arguments, words, tmp_path):
    with pytest.raises(InputError, match=words):
        write_statistics(tmp_path / "ours.npz", OURS, *arguments)
    assert not list(tmp_path.iterdir())


NOTE = {"features": "f", "resizing": "r", "digest": "d", "source": "s", "n": 5}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": np.zeros((9, 4, 4, 3), np.uint8)}, "has no statistics, only other arrays; expected mu and sigma"),
        ({"mu": MU, "s2": SIGMA}, r"has no statistics, only \['mu', 's2'\]"),
        ({"mu": MU.astype(int), "sigma": SIGMA}, "'mu' of .* is int64 .*; expected floats"),
        (
            {"mu": MU, "sigma": SIGMA[None]},
            r"'sigma' of .* \[1, 24, 24\]; expected \[d\] or \[d, d\] with d in 1..16384",
        ),
        ({"mu": MU[:3], "sigma": SIGMA}, r"mean has shape \[3\] and the covariance \[24, 24\]"),
        ({"mu": MU[:0], "sigma": SIGMA[:0, :0]}, "with d in 1..16384"),
        ({"mu": MU * np.nan, "sigma": SIGMA}, "24 of 24 numbers of the mean are not finite"),
        ({"mu": np.array([None, None]), "sigma": SIGMA}, "holds pickled objects"),
        ({"mu": MU, "sigma": SIGMA, "ddpm_fast": np.array("{")}, "says of itself what cannot be read"),
        ({"mu": MU, "sigma": SIGMA, "ddpm_fast": np.array(json.dumps({**NOTE, "n": -1}))}, "cannot be read"),
        ({"mu": MU, "sigma": SIGMA, "ddpm_fast": np.array(json.dumps({**NOTE, "n": 1}))}, "n is 1, and one vector"),
        ({"mu": MU, "sigma": SIGMA, "ddpm_fast": np.array("[" * 10_000)}, "cannot be read"),
        ({"mu": MU, "sigma": SIGMA, "ddpm_fast": np.array("x" * 20_000)}, "a text of at most 16384 characters"),
    ],
)
def test_files_that_hold_something_else_are_refused(arrays, words, tmp_path):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(InputError, match=words):
        read_statistics(tmp_path / "wrong.npz")


def test_an_array_that_the_file_cannot_hold_is_not_allocated(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (16384, 16384)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue())
        archive.writestr("sigma.npy", header.getvalue())
    with pytest.raises(InputError, match=r"float64 \[16384, 16384\], but the file holds"):
        read_statistics(tmp_path / "bomb.npz")


def test_what_is_no_file_or_a_damaged_one_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.npz"):
        read_statistics(tmp_path / "nowhere.npz")
    with pytest.raises(InputError, match="cannot read"):
        read_statistics(tmp_path)
    write_statistics(tmp_path / "whole.npz", OURS)
    whole = (tmp_path / "whole.npz").read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "flipped": whole[:300] + b"?" + whole[301:]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read .* as an \.npz of statistics"):
            read_statistics(tmp_path / name)
