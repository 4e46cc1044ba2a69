"""Features of TorchScript files and of modules in Python."""

import warnings

import pytest
import torch
from support.feature_networks import LikeNvidias, Tiny, made_images, scripted
from torch import nn

from ddpm_fast.errors import InputError
from ddpm_fast.metrics.features import load_extractor
from ddpm_fast.metrics.features.resizing import bicubic_uint8

IMAGES = made_images((3, 3, 9, 12))


@pytest.fixture(params=["file", "module"])
def source_of(request, tmp_path):
    """Makes of a module what load_extractor takes."""
    return lambda module: scripted(module, tmp_path / "network.pt") if request.param == "file" else module


class Function(nn.Module):
    """Gives what a function gives."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def test_a_network_gets_uint8_rgb_images_as_they_are(source_of):
    extractor = load_extractor(source_of(Tiny()))
    expected = Tiny()(IMAGES)
    for ours, theirs in zip(extractor.compute(IMAGES), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert extractor.dimensions == 6 and extractor.device.type == "cpu"


def test_a_network_gets_images_of_the_size_that_is_asked_for(source_of):
    extractor = load_extractor(source_of(Tiny()), resize=16)
    assert torch.equal(extractor.compute(IMAGES)[0], Tiny()(bicubic_uint8(IMAGES, 16))[0])
    assert "16x16" in extractor.kind.resizing and "16" not in load_extractor(Tiny()).kind.resizing


def test_grey_images_become_rgb(source_of):
    extractor = load_extractor(source_of(Tiny()))
    grey = IMAGES[:, :1]
    assert torch.equal(extractor.compute(grey)[0], Tiny()(grey.repeat(1, 3, 1, 1))[0])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_an_interface_as_nvidias_gives_features_and_logits_without_the_bias(source_of, temperature):
    network = LikeNvidias(temperature)
    features, logits = load_extractor(source_of(network)).compute(IMAGES)
    assert torch.equal(features, network(IMAGES, return_features=True))
    # Only differences between logits mean anything.
    assert torch.allclose(logits.softmax(1), network(IMAGES, no_output_bias=True), rtol=1e-5)
    assert not torch.allclose(logits.softmax(1), network(IMAGES), rtol=1e-2)


def test_features_alone_are_enough(source_of):
    assert (
        load_extractor(nn.Sequential(Function(torch.Tensor.float), nn.Flatten()), resize=2).compute(IMAGES)[1] is None
    )


def test_a_file_is_named_and_has_its_own_digest(tmp_path):
    kind = load_extractor(scripted(Tiny(), tmp_path / "mine.pt")).kind
    assert kind.features == "mine" and len(kind.digest) == 64


def test_modules_with_other_weights_have_another_digest():
    other = Tiny()
    with torch.no_grad():
        other.last.bias[0] += 1
    first, second = load_extractor(Tiny()).kind, load_extractor(other).kind
    assert first == load_extractor(Tiny()).kind and first.digest != second.digest and first.features == "Tiny"


def test_a_module_of_torchscript_in_python_has_the_name_of_its_class(tmp_path):
    path = scripted(LikeNvidias(), tmp_path / "network.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.load(path)
    extractor, kind = load_extractor(script), load_extractor(LikeNvidias()).kind
    assert extractor.kind.features == "LikeNvidias" and extractor.kind.digest == kind.digest
    assert torch.equal(extractor.compute(IMAGES)[0], LikeNvidias()(IMAGES, return_features=True))


def test_a_module_stays_as_it_is():
    module = Tiny().train()
    load_extractor(module).compute(IMAGES)
    assert module.training


def test_autocast_around_it_changes_nothing():
    extractor, expected = load_extractor(Tiny()), Tiny()(IMAGES)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor.compute(IMAGES)[0], expected)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: x.float(), r"\[2, 3, 64, 64\]"),  # as pytorch-fid's InceptionV3, which gives maps
        (lambda x: x.flatten(1), "torch.uint8"),
        (lambda x: x.float().mean((1, 2, 3)), r"\[2\] for 2 images"),
        (lambda x: (x.float().flatten(1), x.float()[:1].flatten(1)), r"\[1, 12288\]"),
        (lambda x: {"features": x}, "dict"),
        (lambda x: [], "features"),
        (lambda x: x.float().flatten(1)[:, :0], r"\[2, 0\]"),
    ],
)
def test_what_is_no_features_is_refused_by_its_shape(function, said):
    with pytest.raises(InputError, match=said):
        load_extractor(Function(function))


@pytest.mark.parametrize("precision", ["high", "medium", "highest"])
def test_products_are_in_full_precision_meanwhile_and_as_they_were_afterwards(precision):
    parts, found = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv], []

    def function(images):
        found.append([part.fp32_precision for part in parts])
        return images.float().flatten(1)

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        outside = [part.fp32_precision for part in parts]
        load_extractor(Function(function))
        assert found == [["ieee"] * 3] and [part.fp32_precision for part in parts] == outside
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_network_that_fails_says_that_a_size_may_be_missing(source_of):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    with pytest.raises(InputError, match=r"fails for uint8 images \[2, 3, 64, 64\].*--feature-size"):
        load_extractor(source_of(network))


def test_another_length_for_another_size_is_refused():
    extractor = load_extractor(Function(lambda x: x.float().flatten(1)))
    with pytest.raises(InputError, match="--feature-size"):
        extractor.compute(IMAGES)
