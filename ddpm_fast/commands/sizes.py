"""The option --image-size of the commands: HEIGHTxWIDTH in pixels, or one number for a square."""

from __future__ import annotations

import re
from typing import Any

import typer

from ddpm_fast.data.size import ImageSize, Size
from ddpm_fast.errors import InputError

_TEXT = re.compile(r"([0-9]{1,9})(?:[xX]([0-9]{1,9}))?")


def size_option(help: str) -> Any:
    """A typer option --image-size. Its value is what `as_argument` gives; `parse_size` makes a `Size` of it.

    Args:
        help: What the option is for.
    """
    return typer.Option(help=help, metavar="HEIGHTxWIDTH", callback=_checked)


def _checked(text: str | None) -> int | str | None:
    """The option's value, as soon as it is read. Raises typer.BadParameter for what is no size."""
    try:
        return None if text is None else as_argument(parse_size(text))
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


def parse_size(given: int | str) -> Size:
    """The size that an option's value says, such as 64 or "64x32".

    Raises:
        InputError: If it says none.
    """
    match = _TEXT.fullmatch(str(given).strip())
    if match is None:
        raise InputError(
            f"{given!r:.100} is no size; expected HEIGHTxWIDTH in pixels, such as 64x32, or one number for a square"
        )
    sides = [int(text) for text in match.groups() if text is not None]
    return Size.of(sides if len(sides) > 1 else sides[0], "--image-size")


def as_argument(size: ImageSize) -> int | str:
    """A size as the commands store and show it: the side of a square as a number, any other as HEIGHTxWIDTH."""
    size = Size.of(size)
    return size.height if size.height == size.width else str(size)
