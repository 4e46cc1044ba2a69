"""Many files in one text: `train-*.tar`, and webdataset's `train-{000..146}.tar` and `{train,extra}-0.tar`."""

import glob
import math
import os
import re
from itertools import product
from pathlib import Path

from ddpm_fast.data.files import natural_key
from ddpm_fast.errors import InputError, printable

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
_MOST = 100_000  # files of one text


def is_pattern(text: str) -> bool:
    """Whether a text stands for several files, and no file has it as its name."""
    return (glob.has_magic(text) or _BRACES.search(text) is not None) and not os.path.lexists(text)


def expand(text: str) -> list[Path]:
    """The files that a text stands for: those of braces in their order, those of wildcards in natural order (2 before
    10).

    Raises:
        InputError: If there are none, one of those that braces name is missing, or there are more than 100,000.
    """
    found: list[str] = []
    for name in _without_braces(text):
        matches = sorted(glob.glob(name), key=natural_key) if glob.has_magic(name) else [name]
        if not matches or not os.path.lexists(matches[0]):
            raise InputError(f"{printable(text)} stands for {printable(name)}, which is not there; check the pattern")
        found += matches
    if not found:
        raise InputError(f"{printable(text)} stands for no files; check the pattern")
    if len(found) > _MOST:
        raise _too_many(text)
    return list(map(Path, found))


def _without_braces(text: str) -> list[str]:
    """The texts that one with braces stands for, in bash's order."""
    parts = _BRACES.split(text)  # texts at the even places, what is in braces at the odd ones
    choices: list[list[str] | range] = [[part] for part in parts]
    widths = [0] * len(parts)
    for place in range(1, len(parts), 2):
        ends = _RANGE.fullmatch(parts[place])
        if ends is None:
            choices[place] = parts[place].split(",")
        else:
            choices[place] = range(int(ends[1]), int(ends[2]) + 1)
            padded = any(end.startswith("0") and len(end) > 1 for end in ends.groups())
            widths[place] = max(map(len, ends.groups())) if padded else 0
    if math.prod(map(len, choices)) > _MOST:
        raise _too_many(text)
    return [
        "".join(str(part).zfill(width) for part, width in zip(chosen, widths, strict=True))
        for chosen in product(*choices)
    ]


def _too_many(text: str) -> InputError:
    return InputError(f"{printable(text)} stands for more than {_MOST} files; give fewer and larger ones")
