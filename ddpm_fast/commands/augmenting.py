"""The option --augment of the training command."""

from __future__ import annotations

from typing import Any

import typer

from ddpm_fast.data import Augmentation
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
