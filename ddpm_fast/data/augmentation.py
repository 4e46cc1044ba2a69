"""`Augmentation`: how training images are changed, and the vector that tells the network how.

A small data set is learned by heart. Changed images make it larger, but a network that is trained on them draws changed
images. So the network is told what was done to each, by a vector that is zero for images as they are; sampling gives it
zeros, and nothing of the changes is seen in the samples. That is the non-leaking augmentation of Karras et al. 2022,
"Elucidating the Design Space of Diffusion-Based Generative Models", appendix F.2, whose transforms and strengths
these are. Everything is a function of (seed, example number), see order.py; resampling.py changes the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from ddpm_fast.data.order import augment_fractions
from ddpm_fast.data.resampling import BORDERS, Change, Matrix
from ddpm_fast.errors import InputError, printable

_PROBABILITY = 0.12  # what Karras et al. found best for CIFAR-10
_FRACTIONS = 8  # of each example and transform; no transform uses more, and the number must never change
_LONGEST = 500  # characters of a text
PRESETS = {
    "geometric": "scale,rotate,aniso,translate",
    "small": "scale=0.1,rotate=10,aniso=0.1,translate=0.06",
    "edm": "xflip:1,yflip,scale,rotate,aniso,translate,reflect",
}


class Transform(NamedTuple):
    """A kind of change.

    Attributes:
        number: Of its random fractions. It never changes.
        channels: How many numbers tell of it.
        strength: What it has if no other is given. None: it has none.
        most: The largest strength.
        draw: draw(fractions, strength, change) adds a change at random, and returns what tells of it.
    """

    number: int
    channels: int
    strength: float | None
    most: float
    draw: Callable[[Sequence[float], float, Change], tuple[float, ...]]


def _xflip(u: Sequence[float], strength: float, change: Change) -> tuple[float, ...]:
    change.mirrored ^= u[0] < 0.5
    return (float(u[0] < 0.5),)


def _yflip(u: Sequence[float], strength: float, change: Change) -> tuple[float, ...]:
    change.upside_down ^= u[0] < 0.5
    return (float(u[0] < 0.5),)


def _rotate90(u: Sequence[float], strength: float, change: Change) -> tuple[float, ...]:
    turns = int(4 * u[0])
    mirrored, upside_down = turns in (1, 2), turns in (2, 3)
    change.mirrored ^= mirrored
    change.upside_down ^= upside_down
    change.transposed = turns in (1, 3)
    return float(mirrored), float(upside_down)


def _shift(u: Sequence[float], strength: float, change: Change) -> tuple[float, ...]:
    told = []
    for fraction, size in zip(u, (change.width, change.height), strict=False):
        pixels = round((2 * fraction - 1) * strength * size)
        told.append(pixels / (strength * size))
        change.shift = (*change.shift, pixels)
    return tuple(told)


def _scale(u: Sequence[float], strength: float, change: Change) -> tuple[float, ...]:
    normal = _normals(u)[0]
    factor = 2.0 ** (strength * normal)
    change.then(Matrix(factor, 0.0, 0.0, factor))
    return (normal,)


def _rotate(u: Sequence[float], strength: float, change: Change) -> tuple[float, ...]:
    angle = math.radians(strength) * (2 * u[0] - 1)
    change.then(Matrix.rotation(angle))
    largest = math.sin(math.radians(min(strength, 90)))  # so that a small rotation is told as loudly as a large one
    return (math.cos(angle) - 1) / largest, math.sin(angle) / largest


def _aniso(u: Sequence[float], strength: float, change: Change) -> tuple[float, ...]:
    normal = _normals(u)[0]
    axis = math.pi * (2 * u[2] - 1) if u[3] < 0.5 else 0.0
    factor = 2.0 ** (strength * normal)
    for matrix in (Matrix.rotation(axis), Matrix(factor, 0.0, 0.0, 1 / factor), Matrix.rotation(-axis)):
        change.then(matrix)
    # Of twice the angle, because a stretching along an axis is the squeezing across it. Karras et al. tell of the angle
    # itself, which leaves open whether an image was stretched or squeezed.
    return normal * math.cos(2 * axis), normal * math.sin(2 * axis)


def _translate(u: Sequence[float], strength: float, change: Change) -> tuple[float, ...]:
    x, y = _normals(u)
    change.then(Matrix(1.0, 0.0, 0.0, 1.0, x * strength * change.width, y * strength * change.height))
    return x, y


def _normals(u: Sequence[float]) -> tuple[float, float]:
    """Two normals of two fractions (Box & Muller 1958). Python's functions do not depend on an array's length."""
    radius, angle = math.sqrt(-2 * math.log(1 - u[0])), 2 * math.pi * u[1]
    return radius * math.cos(angle), radius * math.sin(angle)


# In the order in which they are done and told.
TRANSFORMS = {
    "xflip": Transform(1, 1, None, 0, _xflip),
    "yflip": Transform(2, 1, None, 0, _yflip),
    "rotate90": Transform(3, 2, None, 0, _rotate90),
    "shift": Transform(4, 2, 0.125, 0.5, _shift),  # the most, as a share of the image's size
    "scale": Transform(5, 1, 0.2, 1.0, _scale),  # the standard deviation of the factor's logarithm to the base 2
    "rotate": Transform(6, 2, 180.0, 180.0, _rotate),  # the most degrees, either way
    "aniso": Transform(7, 2, 0.2, 1.0, _aniso),  # as for scale
    "translate": Transform(8, 2, 0.125, 0.5, _translate),  # the standard deviation, as a share of the image's size
}


class Drawn(NamedTuple):
    """What is done to some training examples.

    Attributes:
        changes: For each, what changes it; None for an image that stays as it is.
        told: What tells of them, float32 [n, channels].
    """

    changes: list[Change | None]
    told: torch.Tensor


class _Chosen(NamedTuple):
    strength: float | None
    probability: float


@dataclass(frozen=True)
class Augmentation:
    """Which transforms change training images, each switched on by itself with a probability.

    Make one with `of`.

    Attributes:
        chosen: (name, strength, probability) of each transform, in the order of `TRANSFORMS`.
        border: What is taken for the pixels beyond an image: "edge", the nearest one, or "reflect".
    """

    chosen: tuple[tuple[str, float | None, float], ...]
    border: str = "edge"

    @classmethod
    def of(cls, text: str) -> Augmentation:
        """What a text says, such as "small", "edm:0.2" or "xflip:1,scale,rotate=15:0.3,reflect".

        It is a list of names of `TRANSFORMS` and `PRESETS`, separated by commas. A transform may have a strength,
        "rotate=15". A probability, ":0.3", holds for the names before it that have none; the last ones without any
        have 0.12. A border of `BORDERS` may stand among them.

        Raises:
            InputError: If the text is no such list.
        """
        if not isinstance(text, str) or len(text) > _LONGEST:
            raise InputError(f"augment is {text!r:.100}; expected a list such as {_EXAMPLE}")
        found: dict[str, _Chosen] = {}
        waiting: dict[str, float | None] = {}
        border = "edge"

        def give(probability: float) -> None:
            found.update({name: _Chosen(strength, probability) for name, strength in waiting.items()})
            waiting.clear()

        for part in _expanded(text):
            item, _, chance = part.partition(":")
            name, equals, strength = (piece.strip() for piece in item.partition("="))
            if name in BORDERS and not equals and not chance:
                border = name
                continue
            if name in found or name in waiting:
                raise InputError(f"augment has {name} twice: leave one of them out")
            waiting[name] = _strength(name, strength if equals else None)
            if ":" in part:
                give(_number(chance, f"the probability of {name}", 0, 1))
        give(_PROBABILITY)
        return cls(tuple((name, *found[name]) for name in TRANSFORMS if name in found), border)

    def __str__(self) -> str:
        """The text that says the same without presets and defaults, which may be others in another version."""
        parts = [
            f"{name}{'' if strength is None else f'={_plain(strength)}'}:{_plain(probability)}"
            for name, strength, probability in self.chosen
        ]
        return ",".join([*parts, self.border])

    @property
    def channels(self) -> int:
        """How many numbers tell of it."""
        return sum(TRANSFORMS[name].channels for name, _, _ in self.chosen)

    def check_shape(self, height: int, width: int) -> None:
        """Raises InputError if images of this size cannot be changed so."""
        if height != width and any(name == "rotate90" for name, _, _ in self.chosen):
            raise InputError(
                f"augment has rotate90, which needs squares, and the images are {height} high and {width} wide: "
                "leave it out"
            )

    def draw(self, seed: int, start: int, count: int, height: int, width: int) -> Drawn:
        """What is done to the training examples start .. start+count-1, a function of (seed, example number) alone.

        Args:
            seed: The seed of the run.
            start: The number of the first example.
            count: How many.
            height: That of the images.
            width: That of the images.

        Raises:
            InputError: If the range is negative.
        """
        return _draw(self, seed, start, count, (height, width))


_EXAMPLE = '"small:0.2", "edm" or "xflip:1,scale,rotate=15:0.3"'


# Micro-batches are read ahead, and told of later.
@lru_cache(maxsize=64)
def _draw(augmentation: Augmentation, seed: int, start: int, count: int, size: tuple[int, int]) -> Drawn:
    changes: list[Change | None] = [None] * count
    told = np.zeros((count, augmentation.channels), np.float32)
    place = 0
    for name, strength, probability in augmentation.chosen:
        transform = TRANSFORMS[name]
        fractions = augment_fractions(seed, transform.number, start, count, _FRACTIONS)
        for k in (fractions[:, 0] < probability).nonzero()[0].tolist():
            change = changes[k] = changes[k] or Change(*size)
            told[k, place : place + transform.channels] = transform.draw(
                fractions[k, 1:].tolist(), strength or 0.0, change
            )
        place += transform.channels
    return Drawn(changes, torch.from_numpy(told))


def _expanded(text: str) -> list[str]:
    """The parts of a list, those of presets in the place of their names."""
    parts: list[str] = []
    for part in text.split(","):
        name, colon, chance = part.strip().partition(":")
        parts += PRESETS[name].split(",") if name in PRESETS else [name + colon + chance]
        if name in PRESETS and colon:
            # Of a preset the last parts lack a probability, before its border.
            last = max(k for k, each in enumerate(parts) if each not in BORDERS)
            parts[last] += colon + chance
    return parts


def _strength(name: str, given: str | None) -> float | None:
    transform = TRANSFORMS.get(name)
    if transform is None:
        known = ", ".join((*TRANSFORMS, *PRESETS, *BORDERS))
        raise InputError(f"augment has {printable(name)!r:.100}; expected a list of {known}, such as {_EXAMPLE}")
    if transform.strength is None and given is not None:
        raise InputError(f"augment has {name}={printable(given)}, and {name} has no strength: leave it out")
    if given is None:
        return transform.strength
    strength = _number(given, f"the strength of {name}", 0, transform.most)
    if not strength:
        raise InputError(f"the strength of {name} is 0 in augment, which does nothing: leave {name} out")
    return strength


def _number(text: str, what: str, low: float, high: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise InputError(f"{what} is {printable(text)!r:.100} in augment; expected a number from {low:g} to {high:g}")
    return number


def _plain(number: float) -> str:
    return str(int(number)) if number.is_integer() else repr(number)
