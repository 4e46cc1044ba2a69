"""Flags as other codes' commands take them: "--image_size 64 --class_cond True" as a dict."""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Mapping
from typing import Any

from ddpm_fast.errors import InputError, printable

_YES, _NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def parse_flags(text: str | None, known: Mapping[str, object], of: str, switches: bool = False) -> dict[str, Any]:
    """The flags that a text gives, as values of their types.

    Args:
        text: Such as "--image_size 64 --class_cond=True". None and the empty string give none.
        known: For each flag a value of its type: a bool, an int, a float or a string. A tuple of one of these is for
            a flag that may be given several times, or with commas.
        of: Whose flags these are, for messages.
        switches: Whether a bool is given as --name or --noname, without a value, as absl has it.

    Raises:
        InputError: For a flag that is unknown, is given twice with two values, or has no value of its type.
    """
    try:
        words = shlex.split(text or "")
    except ValueError as error:
        raise InputError(f"the flags {text!r:.200} cannot be split into words ({error}): close the quotes") from error
    found: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise InputError(
                f"{word!r:.200} is no flag of {of}; expected --name value, such as --{next(iter(known))} ..."
            )
        name, has_value, value = word[2:].partition("=")
        if switches and not has_value:
            if isinstance(known.get(name), bool):
                has_value, value = "=", "True"
            elif isinstance(known.get(name.removeprefix("no")), bool):
                name, has_value, value = name.removeprefix("no"), "=", "False"
        if name not in known:
            raise InputError(f"--{printable(name):.200} is no flag of {of}; known are {', '.join(known)}")
        if not has_value:
            if not words:
                raise InputError(f"--{name} has no value: give one after it")
            value = words.pop(0)
        like = known[name]
        if isinstance(like, tuple):
            found[name] = (*found.get(name, ()), *(_value(name, part, like[0]) for part in value.split(",")))
            continue
        made = _value(name, value, like)
        if found.setdefault(name, made) != made:
            raise InputError(f"--{name} is given twice, as {found[name]!r:.200} and {made!r:.200}: give it once")
    return found


def _value(name: str, text: str, like: object) -> Any:
    if isinstance(like, str):
        return text
    expected = "True or False"
    if isinstance(like, bool):
        if text.lower() in (*_YES, *_NO):
            return text.lower() in _YES
    else:
        kind, expected = (int, "an integer") if isinstance(like, int) else (float, "a number")
        with contextlib.suppress(ValueError):
            number = kind(text)
            if math.isfinite(number):
                return number
    raise InputError(f"--{name} is {text!r:.200}; expected {expected}")
