"""The Inception network of 2015 with made-up weights: against torch-fidelity's and pytorch-fid's code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.feature_networks import INCEPTION_IMAGES, inception_state, made_images

from ddpm_fast.errors import InputError
from ddpm_fast.metrics.features import inception, load_extractor

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "features.npz")


@pytest.fixture(scope="module")
def weights():
    return inception_state()


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / inception.FILE
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def extractor(path):
    return load_extractor(path)


def test_features_and_logits_are_torch_fidelitys(extractor):
    features, logits = extractor.compute(made_images(INCEPTION_IMAGES))
    assert np.allclose(features[:, ::8], GOLDEN["features"], rtol=1e-4, atol=1e-4 * GOLDEN["features"].std())
    assert np.allclose(logits[:, ::8], GOLDEN["logits"], rtol=1e-4, atol=1e-4 * GOLDEN["logits"].std())
    # With these weights the images matter: else the comparison would say little.
    assert np.abs(GOLDEN["features"][0] - GOLDEN["features"][1]).mean() > 0.01 * np.abs(GOLDEN["features"]).mean()


def test_the_kind_names_the_network_the_resizing_and_the_file(extractor, path):
    assert extractor.kind.features == "inception-2015-12-05"
    assert "TensorFlow" in extractor.kind.resizing and "299x299" in extractor.kind.resizing
    assert len(extractor.kind.digest) == 64 and extractor.dimensions == 2048


def test_another_size_is_refused(path):
    with pytest.raises(InputError, match="299"):
        load_extractor(path, resize=256)


def with_counts(weights):
    """The weights with what a batch norm's file has as well, and no formula uses."""
    names = [name.replace("running_var", "num_batches_tracked") for name in weights if name.endswith("running_var")]
    return weights | {name: torch.tensor(0) for name in names}


@pytest.mark.peers
def test_features_are_pytorch_fids_for_the_same_pixels(weights):
    # It fills torchvision's own network, of which tests/support/without_torchvision has no stand-in.
    pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    inceptions = pytest.importorskip("pytorch_fid.inception", reason="pytorch-fid is not installed")
    with pytest.MonkeyPatch.context() as patch:  # their constructor would download the weights
        patch.setattr(inceptions, "load_state_dict_from_url", lambda *_, **__: with_counts(weights))
        theirs = inceptions.InceptionV3(resize_input=False, normalize_input=False)
    x = made_images((2, 3, 107, 91)).float().sub(128).div(128)
    with torch.inference_mode():
        (expected,) = theirs.eval()(x)
        features, _ = inception.FIDInceptionV3(weights)(x)
    assert torch.allclose(features, expected[:, :, 0, 0], rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.peers
def test_features_and_logits_are_torch_fidelitys_code(extractor, weights, tmp_path):
    peer = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity or torchvision is not installed"
    )
    torch.save(with_counts(weights), tmp_path / "weights.pth")
    theirs = peer.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(tmp_path / "weights.pth"))
    images = made_images((2, 3, 320, 30))
    for ours, expected in zip(extractor.compute(images), theirs(images), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
