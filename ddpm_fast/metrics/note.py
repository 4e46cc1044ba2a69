"""What a file of statistics or features says of itself: a text in JSON among its arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm_fast.data.arrayfile import Header
from ddpm_fast.errors import InputError, printable
from ddpm_fast.metrics.feature_set import FeatureSet, Kind

KEY = "ddpm_fast"  # the array's name
_LONGEST = 1 << 14  # characters


class Note(NamedTuple):
    """What features are of. Of another code's file, the texts are empty, and n is 0 for "not known"."""

    kind: Kind
    source: str
    n: int


def note_of(feature_set: FeatureSet) -> np.ndarray:
    """The text that a file of a set says of itself, as an array."""
    kind = feature_set.kind
    said = {"features": kind.features, "resizing": kind.resizing, "digest": kind.digest}
    return np.array(json.dumps(said | {"source": feature_set.source, "n": feature_set.n}))


def check_note(header: Header) -> str | None:
    """What is wrong with a note, by its header."""
    if header.dtype.kind != "U" or header.shape or header.nbytes > 4 * _LONGEST:
        return f"expected a text of at most {_LONGEST} characters"
    return None


def read_note(arrays: Mapping[str, np.ndarray], path: Path) -> Note:
    """What the arrays of a file say of themselves.

    Raises:
        InputError: It cannot be read.
    """
    said = ("features", "resizing", "digest", "source")
    if KEY not in arrays:
        return Note(Kind("", "", ""), "", 0)
    try:
        read = json.loads(str(arrays[KEY]))
        fits = all(type(read[name]) is str for name in said) and type(read["n"]) is int and read["n"] >= 0
    except (ValueError, TypeError, KeyError, RecursionError):
        fits = False
    if not fits:
        raise InputError(f"{path} says of itself what cannot be read; write it again")
    texts = {name: printable(read[name]) for name in said}
    return Note(Kind(texts["features"], texts["resizing"], texts["digest"]), texts["source"], read["n"])
