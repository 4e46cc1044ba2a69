"""Samples in array files of some images each, which are read as one data set (data/parts.py).

A part has the ids of its first and last sample in its name: 000064-000127.npz.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.pictures.images import save_npz
from ddpm_fast.values import ValueRange

_NAME = re.compile(r"([0-9]{6,})-([0-9]{6,})\.npz")


def part_name(ids: range) -> str:
    """The name of the part that holds the samples with these ids."""
    return f"{ids[0]:06d}-{ids[-1]:06d}.npz"


def ids_of_part(name: str) -> range | None:
    """The ids of the samples in the part of this name; None for another name."""
    matched = _NAME.fullmatch(name)
    if matched is None:
        return None
    ids = range(int(matched[1]), int(matched[2]) + 1)
    return ids if ids and part_name(ids) == name else None


class Parts:
    """A batch of samples in each part. Only the last part may be shorter; when more samples follow, it is replaced."""

    def __init__(
        self,
        folder: Path,
        ids: range,
        labels: Sequence[int] | None,
        label_names: Sequence[str] | None,
        per_part: int,
        value_range: ValueRange | None = None,
    ):
        """See folder.SampleFolder."""
        self._folder, self._ids, self._labels, self._names = folder, ids, labels, label_names
        self._per_part, self._value_range = per_part, value_range
        self._shorter: dict[int, Path] = {}  # by the id of the first sample: parts of fewer samples than are wanted

    def there(self, names: Iterator[str]) -> np.ndarray:
        """Which samples are there: bool [n].

        Args:
            names: Those of the folder's files.

        Raises:
            InputError: For a part that holds some of these samples but begins or ends between others.
        """
        found, first, n = np.zeros(len(self._ids), bool), self._ids.start, len(self._ids)
        for name in names:
            ids = ids_of_part(name)
            if ids is None or ids.stop <= first or ids.start >= first + n:
                continue
            begin, end = ids.start - first, ids.stop - first
            if begin % self._per_part or len(ids) > self._per_part:
                raise InputError(
                    f"{self._folder} holds the samples {ids[0]} to {ids[-1]} in one file, and this command would draw "
                    f"{self._per_part} at a time from {first} on, some of them twice: give the --batch-size and "
                    "--first-sample-id that they were drawn with, or another folder to --out"
                )
            found[begin:end] = True
            if end < min(begin + self._per_part, n):
                self._shorter[ids.start] = self._folder / name
        return found

    def write(self, part: slice, x: Tensor) -> None:
        """Write a part, unless it is there. Of part and x, see folder.Layout."""
        ids = self._ids[part]
        target = self._folder / part_name(ids)
        if target.exists():
            return
        # Before the longer one is written: no sample is ever in two files, and what a kill costs is drawn again.
        if ids.start in self._shorter:
            self._shorter.pop(ids.start).unlink(missing_ok=True)
        labels = None if self._labels is None else self._labels[part]
        names = self._names if labels is not None else None
        save_npz(target, x, labels, names, durable=True, value_range=self._value_range)
