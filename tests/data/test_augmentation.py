"""Which changes are drawn, and whether what the network is told says exactly what was done."""

import math

import numpy as np
import pytest
import torch

from ddpm_fast.data import Augmentation
from ddpm_fast.data.augmentation import PRESETS, TRANSFORMS
from ddpm_fast.data.order import augment_fractions, splitmix64
from ddpm_fast.errors import InputError

ALL = "xflip,yflip,rotate90,shift,scale,rotate,aniso,translate:0.5"
SIZE = (10, 10)


@pytest.mark.parametrize(
    ("text", "meaning", "channels"),
    [
        ("xflip", "xflip:0.12,edge", 1),
        ("rotate=15 : 0.3, xflip", "xflip:0.12,rotate=15:0.3,edge", 3),
        ("xflip:1,scale,shift:0.25,reflect", "xflip:1,shift=0.125:0.25,scale=0.2:0.25,reflect", 4),
        ("small:0.4", "scale=0.1:0.4,rotate=10:0.4,aniso=0.1:0.4,translate=0.06:0.4,edge", 7),
        ("xflip:1,small", "xflip:1,scale=0.1:0.12,rotate=10:0.12,aniso=0.1:0.12,translate=0.06:0.12,edge", 8),
        # Karras et al. 2022, appendix F.2: nine numbers, and mirrored images half of the time.
        (
            "edm:0.15",
            "xflip:1,yflip:0.15,scale=0.2:0.15,rotate=180:0.15,aniso=0.2:0.15,translate=0.125:0.15,reflect",
            9,
        ),
        ("edm,edge", "xflip:1,yflip:0.12,scale=0.2:0.12,rotate=180:0.12,aniso=0.2:0.12,translate=0.125:0.12,edge", 9),
    ],
)
def test_texts(text, meaning, channels):
    augmentation = Augmentation.of(text)
    assert str(augmentation) == meaning and augmentation.channels == channels
    assert Augmentation.of(meaning) == augmentation


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("turn", "augment has 'turn'; expected a list of xflip, yflip"),
        ("", "augment has ''"),
        ("xflip,,scale", "augment has ''"),
        ("scale,small", "augment has scale twice"),
        ("scale:2", "the probability of scale is '2' in augment; expected a number from 0 to 1"),
        ("scale:", "the probability of scale is ''"),
        ("scale=9", "the strength of scale is '9' in augment; expected a number from 0 to 1"),
        ("scale=0", "the strength of scale is 0"),
        ("rotate=nan", "the strength of rotate is 'nan'"),
        ("xflip=1", "xflip has no strength"),
        ("xflip," * 200, "expected a list such as"),
        (7, "augment is 7; expected a list"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        Augmentation.of(text)


def test_quarter_turns_need_squares():
    with pytest.raises(InputError, match="rotate90, which needs squares, and the images are 8 high and 6 wide"):
        Augmentation.of(ALL).check_shape(8, 6)
    Augmentation.of(PRESETS["edm"]).check_shape(8, 6)


def matrix(*rows):
    return np.array([*rows, (0, 0, 1)], dtype=np.float64)


def turn(angle):
    return matrix((math.cos(angle), math.sin(angle), 0), (-math.sin(angle), math.cos(angle), 0))


def test_what_is_told_says_exactly_what_was_done():
    """Moves and map are made again, from the numbers that the network is told alone, by numpy's matrices."""
    drawn = Augmentation.of(ALL).draw(3, 0, 400, *SIZE)
    picture = np.arange(100).reshape(1, *SIZE)
    assert drawn.told.shape == (400, 13) and drawn.told.dtype == torch.float32
    for change, told in zip(drawn.changes, drawn.told.double().tolist(), strict=True):
        xflip, yflip, turned_x, turned_y, right, down, scale, cos, sin, aniso_x, aniso_y, x, y = told
        if change is None:
            assert not any(told)
            continue
        expected = picture[..., ::-1] if xflip else picture
        expected = expected[:, ::-1] if yflip else expected
        turns = {(0, 0): 0, (1, 0): 1, (1, 1): 2, (0, 1): 3}[turned_x, turned_y]
        expected = np.rot90(expected, turns, (1, 2))
        columns, rows = round(right * 1.25), round(down * 1.25)
        padded = np.pad(expected, ((0, 0), (9, 9), (9, 9)), mode="edge")
        expected = padded[:, 9 - rows : 19 - rows, 9 - columns : 19 - columns]
        assert np.array_equal(change.moved(picture, "edge"), expected)

        strength, axis = math.hypot(aniso_x, aniso_y), math.atan2(aniso_y, aniso_x) / 2
        stretch = 2 ** (0.2 * strength)
        whole = matrix((2 ** (0.2 * scale), 0, 0), (0, 2 ** (0.2 * scale), 0))
        whole = turn(math.atan2(sin, cos + 1)) @ whole
        whole = turn(-axis) @ matrix((stretch, 0, 0), (0, 1 / stretch, 0)) @ turn(axis) @ whole
        whole = matrix((1, 0, 1.25 * x), (0, 1, 1.25 * y)) @ whole
        found = np.eye(3) if change.matrix is None else matrix(*np.array(change.matrix)[[[0, 1, 4], [2, 3, 5]]])
        np.testing.assert_allclose(found, whole, rtol=0, atol=2e-6)


def test_a_small_rotation_is_told_as_loudly_as_a_large_one():
    told = Augmentation.of("rotate=10:1").draw(0, 0, 500, *SIZE).told
    changes = Augmentation.of("rotate=10:1").draw(0, 0, 500, *SIZE).changes
    angles = torch.tensor([math.degrees(math.atan2(change.matrix.b, change.matrix.a)) for change in changes])
    assert 9.5 < angles.max() <= 10 and -10 <= angles.min() < -9.5
    torch.testing.assert_close(told[:, 1], torch.sin(torch.deg2rad(angles)) / math.sin(math.radians(10)))
    assert 0.9 < told[:, 1].abs().max() <= 1


def test_each_transform_is_switched_on_by_itself_with_its_probability():
    n = 8000
    told = Augmentation.of("shift:0.3,scale,rotate:0.1,translate:0.2").draw(5, 0, n, 64, 64).told
    switched = {"shift": told[:, 0] != 0, "scale": told[:, 2] != 0, "rotate": told[:, 4] != 0}
    # A shift of 0 pixels to the right, of the 17 that there are, is not seen; the outermost are half as likely.
    for name, share in (("shift", 0.3 * 15 / 16), ("scale", 0.1), ("rotate", 0.1)):
        assert abs(switched[name].float().mean() - share) < 5 * math.sqrt(share * (1 - share) / n), name
    both = (switched["scale"] & switched["rotate"]).float().mean()
    assert abs(both - 0.01) < 5 * math.sqrt(0.01 / n)
    for numbers in (told[switched["scale"], 2], *told[told[:, 5] != 0, 5:].T):
        error = 5 / math.sqrt(len(numbers))
        assert abs(numbers.mean()) < error and abs(numbers.square().mean() - 1) < 2 * error
    mirrored = Augmentation.of("xflip:1").draw(5, 0, n, 64, 64).told.mean()
    assert abs(mirrored - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_half_of_the_stretchings_are_along_the_axes():
    told = Augmentation.of("aniso:1").draw(0, 0, 4000, *SIZE).told
    assert abs((told[:, 1] == 0).float().mean() - 0.5) < 5 * 0.5 / math.sqrt(4000)


def test_a_probability_of_0_changes_nothing():
    drawn = Augmentation.of(f"{ALL[:-4]}:0").draw(0, 0, 300, *SIZE)
    assert drawn.changes == [None] * 300 and not drawn.told.any()


def test_an_example_is_changed_in_the_same_way_in_whichever_call():
    augmentation = Augmentation.of(ALL)
    whole = augmentation.draw(1, 90, 30, *SIZE)
    parts = [augmentation.draw(1, first, count, *SIZE) for first, count in ((90, 1), (91, 12), (103, 17))]
    assert torch.equal(torch.cat([part.told for part in parts]), whole.told)
    matrices = [change and (change.matrix, change.shift, change.mirrored) for change in whole.changes]
    assert matrices == [
        change and (change.matrix, change.shift, change.mirrored) for part in parts for change in part.changes
    ]
    assert not torch.equal(augmentation.draw(2, 90, 30, *SIZE).told, whole.told)


def test_a_transform_changes_no_other_ones_numbers():
    both, one = (Augmentation.of(text).draw(0, 0, 200, *SIZE).told for text in (ALL, "translate:0.5"))
    assert torch.equal(both[:, -2:], one)


def test_the_numbers_never_change():
    """The fractions are SplitMix64's of these counters, and each transform has the number that it began with."""
    state = 0
    for part in (9, 5, 6):  # the seed, the stream of augmentation, the transform
        state = int(splitmix64(state ^ part, np.zeros(1, np.uint64))[0])
    words = [(_mixed(state + (8 * 40 + k + 1) * 0x9E3779B97F4A7C15)) >> 11 for k in range(16)]
    assert augment_fractions(9, 6, 40, 2, 8).ravel().tolist() == [word / 2**53 for word in words]
    numbers = {name: transform.number for name, transform in TRANSFORMS.items()}
    assert numbers == {
        "xflip": 1, "yflip": 2, "rotate90": 3, "shift": 4, "scale": 5, "rotate": 6, "aniso": 7, "translate": 8,
    }  # fmt: skip


def _mixed(z):
    z %= 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)
