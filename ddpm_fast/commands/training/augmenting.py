"""The option --augment, and training examples under augmentations to look at."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
import typer
from torch import Tensor

from ddpm_fast.data import Augmentation, Examples, ImageSet
from ddpm_fast.data.augmentation import BORDERS, PRESETS, TRANSFORMS
from ddpm_fast.errors import InputError


def augment_option(help: str) -> Any:
    """A typer option --augment. Its value is the whole text of an `Augmentation`, without presets; "" for none.

    Args:
        help: What the option is for.
    """
    names = f"{', '.join(PRESETS)}, or a list of {', '.join(TRANSFORMS)}, {', '.join(BORDERS)}"
    return typer.Option(
        help=f"{help}: {names}, with probabilities (small:0.2) and strengths (rotate=15)", callback=_checked
    )


def _checked(text: str) -> str:
    """The option's value, as soon as it is read. Raises typer.BadParameter for what is no list of transforms."""
    try:
        return str(Augmentation.of(text)) if text else ""
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


def augmented_rows(data: ImageSet, augmentations: Sequence[Augmentation], columns: int, seed: int) -> list[Tensor]:
    """The first training examples as they are, and under each augmentation.

    Args:
        data: The images.
        augmentations: What changes them.
        columns: K, how many examples.
        seed: The seed of the training.

    Returns:
        A row as they are, and a row for each augmentation: float [K, C, H, W] in [-1, 1].

    Raises:
        InputError: If images of this size cannot be changed so.
    """
    rows = []
    for augment in (None, *augmentations):
        with closing(Examples(data, seed, augment=augment)) as examples:
            rows.append(examples.take(0, columns)[0])
    return [row.float() / 127.5 - 1 if row.dtype == torch.uint8 else row.float() for row in rows]
