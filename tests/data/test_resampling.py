"""What augmentation does to pixels, beside numpy's own moves and cubic convolution written as a loop in float64."""

import math

import numpy as np
import pytest
import torch

from ddpm_fast.data.resampling import Change, Matrix, change_, warped

PADS = {"edge": "edge", "reflect": "reflect"}
MATRICES = [
    Matrix(1.0, 0.0, 0.0, 1.0, 0.3, -1.6),
    Matrix.rotation(0.7),
    Matrix(0.6, 0.2, -0.1, 1.7, -0.25, 0.8),
]


def keys(distance):
    """The kernel of Keys 1981, eq. 4 with a = -0.75."""
    x, a = abs(distance), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def looped(image, matrix, border):
    """The image [H, W] under the map, in float64, a pixel at a time."""
    height, width = image.shape
    around = 60
    padded = np.pad(image.astype(np.float64), around, mode=PADS[border])
    forward = np.array([[matrix.a, matrix.b, matrix.dx], [matrix.c, matrix.d, matrix.dy], [0, 0, 1]])
    back, middle = np.linalg.inv(forward), np.array([(width - 1) / 2, (height - 1) / 2])
    out = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            x, y = (back @ [column - middle[0], row - middle[1], 1])[:2] + middle
            for j in range(math.floor(y) - 1, math.floor(y) + 3):
                for i in range(math.floor(x) - 1, math.floor(x) + 3):
                    out[row, column] += keys(x - i) * keys(y - j) * padded[around + j, around + i]
    return out.clip(image.min(), image.max())


@pytest.mark.parametrize("border", PADS)
def test_maps_are_cubic_convolution_within_the_range_of_the_image(border):
    images = torch.rand(3, 2, 7, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = warped(images, MATRICES, border)
    for image, matrix, each in zip(images, MATRICES, found, strict=True):
        for channel, result in zip(image, each, strict=True):
            expected = torch.from_numpy(looped(channel.numpy(), matrix, border))
            torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-5)


def test_8_bit_images_are_rounded_once():
    images = torch.randint(0, 256, (3, 1, 7, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = warped(images, MATRICES, "edge")
    assert found.dtype == torch.uint8
    for image, matrix, each in zip(images, MATRICES, found, strict=True):
        expected = looped(image[0].numpy(), matrix, "edge")
        assert np.abs(each[0].numpy() - expected).max() <= 0.5 + 1e-3


def test_a_map_of_whole_pixels_moves_them():
    image = torch.randint(0, 256, (1, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    right = warped(image, [Matrix(1.0, 0.0, 0.0, 1.0, 2.0, 0.0)], "edge")
    assert torch.equal(right[..., 2:], image[..., :-2])
    turned = warped(image, [Matrix.rotation(math.pi / 2)], "edge")
    assert torch.equal(turned, image.rot90(1, (2, 3))), "it does not turn counter-clockwise"


def test_what_becomes_of_an_image_does_not_depend_on_the_others():
    images = torch.randint(0, 256, (40, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changes = []
    for k in range(40):
        change = Change(28, 28)
        change.mirrored, change.matrix = k % 3 == 0, MATRICES[k % 2] if k % 4 else None
        changes.append(change if k % 5 else None)
    together, alone = images.clone(), images.clone()
    change_(together, changes, "edge")
    for k in range(40):
        change_(alone[k : k + 1], changes[k : k + 1], "edge")
    assert torch.equal(together, alone) and not torch.equal(together, images)


def test_an_image_that_is_not_changed_keeps_its_bits():
    images = torch.rand(2, 1, 5, 4)
    before = images.clone()
    change_(images, [None, Change(5, 4)], "reflect")
    assert torch.equal(images, before)


@pytest.mark.parametrize("border", PADS)
def test_moves_are_numpys(border):
    image = np.arange(2 * 5 * 5).reshape(2, 5, 5)
    change = Change(5, 5)
    change.mirrored = True
    assert np.array_equal(change.moved(image, border), np.flip(image, 2))
    change.upside_down = True
    assert np.array_equal(change.moved(image, border), np.rot90(image, 2, (1, 2)))
    change.upside_down, change.transposed = False, True
    assert np.array_equal(change.moved(image, border), np.rot90(image, 1, (1, 2)))
    change.mirrored = change.transposed = False
    change.shift = (2, -1)
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode=PADS[border])
    assert np.array_equal(change.moved(image, border), padded[:, 5:10, 2:7])


def test_images_of_one_row_can_be_mapped_and_moved():
    image = torch.rand(1, 1, 1, 4)
    change = Change(1, 4)
    change.shift, change.matrix = (1, 1), Matrix(1.0, 0.0, 0.0, 1.0, 0.5, 0.5)
    change_(image, [change], "reflect")
    assert image.isfinite().all()
