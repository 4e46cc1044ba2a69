"""How images reach the size that a network takes: against loops in float64, Pillow and torch-fidelity's code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.feature_networks import INCEPTION_IMAGES, made_images

from ddpm_fast.errors import InputError
from ddpm_fast.metrics.features.resizing import as_rgb, as_tensorflow, bicubic, bicubic_uint8, check_images

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "features.npz")
SIZES = [(7, 5), (13, 13), (20, 31)]  # each to 13: larger, as it is, smaller


def tensorflow_weights(size, n):
    """How much each of n pixels counts for each of the resized ones, in float64: tents around whole places."""
    weights = np.zeros((size, n))
    for i in range(size):
        for pixel in range(n):
            weights[i, pixel] = max(0.0, 1 - abs(i * n / size - pixel))
        weights[i, n - 1] += 1 - weights[i].sum()  # beyond the last pixel there is that pixel again
    return weights


@pytest.mark.parametrize("shape", SIZES)
def test_as_tensorflow_is_bilinear_without_centres_of_pixels(shape):
    image = made_images((1, 1, *shape))
    down, across = (tensorflow_weights(13, n) for n in shape)
    expected = down @ image[0, 0].double().numpy() @ across.T
    # A place is computed in fp32, as TensorFlow does: up to 31 with an error of 2e-6, times a contrast of 255.
    assert np.allclose(as_tensorflow(image, 13)[0, 0], expected, rtol=0, atol=1e-3)


def test_as_tensorflow_is_bit_for_bit_what_torch_fidelity_computes():
    resized = as_tensorflow(made_images(INCEPTION_IMAGES), 299)
    assert np.array_equal(resized[:, :, ::13, ::17], GOLDEN["resized"])


@pytest.mark.parametrize("shape", SIZES)
def test_bicubic_is_pillows_in_floats(shape):
    image = made_images((1, 1, *shape))
    expected = Image.fromarray(image[0, 0].numpy().astype(np.float32)).resize((13, 13), Image.BICUBIC)
    assert np.allclose(bicubic(image, 13)[0, 0], np.asarray(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", SIZES)
def test_bicubic_in_uint8_is_pillows_up_to_its_rounding_between_the_directions(shape):
    image = made_images((1, 1, *shape))
    expected = Image.fromarray(image[0, 0].numpy()).resize((13, 13), Image.BICUBIC)
    apart = bicubic_uint8(image, 13)[0, 0].int() - torch.from_numpy(np.asarray(expected).astype(np.int32))
    assert apart.abs().max() <= 2


@pytest.mark.parametrize("resize", [as_tensorflow, bicubic, bicubic_uint8])
def test_the_result_depends_on_one_image_alone(resize):
    images = made_images((3, 3, 20, 9))
    assert torch.equal(resize(images, 13), torch.cat([resize(image[None], 13) for image in images]))


@pytest.mark.parametrize("resize", [as_tensorflow, bicubic, bicubic_uint8])
def test_images_of_the_size_stay_as_they_are(resize):
    images = made_images((2, 3, 13, 13))
    assert torch.equal(resize(images, 13), images.to(resize(images, 13).dtype))


@pytest.mark.parametrize("resize", [as_tensorflow, bicubic, bicubic_uint8])
def test_no_images_give_no_images(resize):
    assert resize(torch.zeros(0, 3, 5, 6, dtype=torch.uint8), 13).shape == (0, 3, 13, 13)


def test_grey_images_are_rgb_with_three_equal_channels():
    grey = made_images((2, 1, 4, 5))
    assert torch.equal(as_rgb(grey), torch.cat([grey, grey, grey], 1))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 3, 4, 4), "float32"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"\[3, 4, 4\]"),
        (torch.zeros(2, 4, 4, 4, dtype=torch.uint8), "C = 1"),
        (torch.zeros(2, 3, 0, 4, dtype=torch.uint8), r"\[2, 3, 0, 4\]"),
        (np.zeros((2, 3, 4, 4), np.uint8), "ndarray"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, said):
    with pytest.raises(InputError, match=said):
        check_images(images)
