"""What the page lets one visitor ask for, and checks of what it is sent: anybody who can reach it may send anything."""

from __future__ import annotations

from collections.abc import Sequence

from ddpm_fast.errors import InputError, check_integer, check_number

MOST_IMAGES = 64  # of one drawing: a grid of 8x8
MOST_STEPS = 1000
MOST_RESAMPLINGS = 20
MOST_WAITING = 8  # drawings that wait for their turn; each holds a thread of the server
LONGEST_SECONDS = 600  # of one drawing
LARGEST_UPLOAD = 16 << 20  # bytes
MOST_PIXELS = 40_000_000  # of an uploaded picture; a camera's has 12 to 24 million
LONGEST_TEXT = 1000  # characters
MOST_TIMESTEPS = 4000  # of a schedule that is drawn: the longest chain that was published
BATCH_ELEMENTS = 4 << 20  # numbers that are drawn at a time: 64 images of 3x128x128


def whole(name: str, value: object, low: int, high: int) -> int:
    """A number of the page as an int: a browser does not tell 3 from 3.0.

    Args:
        name: What the page calls it.
        value: What was sent.
        low, high: The range.

    Raises:
        InputError: If it is no whole number of that range.
    """
    if value is None or value == "":
        raise InputError(f"{name} is empty; expected a whole number from {low} to {high}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return check_integer(name, value, low, high)


def number(name: str, value: object, low: float, high: float) -> float:
    """A number of the page as a float. Raises InputError if it is none, or outside low..high."""
    return check_number(name, value, lambda v: low <= v <= high, f"a number from {low:g} to {high:g}")


def text(name: str, value: object) -> str:
    """A text of the page, without spaces around it; None is the empty one. Raises InputError for one that is too long,
    or none."""
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise InputError(f"{name} is no text of at most {LONGEST_TEXT} characters: shorten it")
    return value.strip()


def choice(name: str, value: object, choices: Sequence[str]) -> str:
    """One of the choices. Raises InputError for anything else."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {value!r:.100}; expected one of {', '.join(choices)}")
    return value
