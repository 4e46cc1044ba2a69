"""Flags as other codes' commands take them: "--image_size 64 --class_cond True" as a dict."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from typing import Any

from ddpm_fast.errors import InputError

_YES, _NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def parse_flags(text: str | None, known: Mapping[str, object], of: str) -> dict[str, Any]:
    """The flags that a text gives, as values of their types.

    Args:
        text: Such as "--image_size 64 --class_cond=True". None and the empty string give none.
        known: For each flag a value of its type: a bool, an int, a float or a string.
        of: Whose flags these are, for messages.

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
        if name not in known:
            raise InputError(f"--{name:.200} is no flag of {of}; known are {', '.join(known)}")
        if not has_value:
            if not words:
                raise InputError(f"--{name} has no value: give one after it")
            value = words.pop(0)
        made = _value(name, value, known[name])
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
            return kind(text)
    raise InputError(f"--{name} is {text!r:.200}; expected {expected}")
