"""A folder of samples that can be continued, by several processes at once: beside the samples stands what they were
drawn with.

A sample is a picture of its own, or one of many in an array file (parts.py). Which of them are there is found by
listing the folder once, and kept as one byte for each sample.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.atomic import check_writable_folder, write_once
from ddpm_fast.pictures import images
from ddpm_fast.pictures.parts import Parts, ids_of_part
from ddpm_fast.values import ValueRange

RECORD = "samples.json"
FORMATS = ("png", "npz")
_ADVICE = "give another folder to --out, or remove the images"
_PICTURE = re.compile(r"([0-9]{6,})(_label.*)?\.png")
_MOST_DIGITS = 18  # of a sample id, which has 56 bits


class Layout(Protocol):
    """How samples are kept in a folder."""

    def there(self, names: Iterator[str]) -> np.ndarray:
        """Which samples are there: bool [n]. names: those of the folder's files."""

    def write(self, part: slice, x: Tensor) -> None:
        """Write the samples of a batch, x [N, C, H, W] in [-1, 1], which are the numbers `part` of the n."""


class Pictures:
    """A PNG for each sample."""

    def __init__(self, folder: Path, ids: range, labels: Sequence[int] | None, label_names: Sequence[str] | None):
        """See SampleFolder."""
        self._folder, self._ids, self._labels, self._names = folder, ids, labels, label_names

    def there(self, names: Iterator[str]) -> np.ndarray:
        """See Layout."""
        first, count = self._ids.start, len(self._ids)
        labels = np.zeros(count, np.intc) if self._labels is None else np.asarray(self._labels).astype(np.intc)
        classes = [None] if self._labels is None else np.unique(labels).tolist()
        # What follows the id in the name of a picture. A million names take a second, where a pattern takes four.
        ends = {images.sample_name(0, label, self._names)[6:]: label or 0 for label in classes}
        expected, found = array("i", labels.tobytes()), bytearray(count)
        for name in names:
            cut = name.find("_")
            digits = name[: cut if cut >= 0 else name.find(".")]
            label = ends.get(name[len(digits) :])
            if label is None or not (digits.isascii() and digits.isdecimal()):
                continue
            number = int(digits) - first
            is_id = len(digits) == 6 or (len(digits) > 6 and digits[0] != "0")
            if is_id and 0 <= number < count and label == expected[number]:
                found[number] = True
        return np.frombuffer(found, bool)

    def write(self, part: slice, x: Tensor) -> None:
        """See Layout. Pictures that exist stay as they are."""
        labels = None if self._labels is None else self._labels[part]
        images.save_images(self._folder, x, self._ids[part].start, labels, self._names, keep=True)


class SampleFolder:
    """Samples in a folder. Those that exist are kept, so that drawing can be stopped and continued."""

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping[str, Any],
        ids: range,
        labels: Sequence[int] | None = None,
        label_names: Sequence[str] | None = None,
        per_part: int | None = None,
        value_range: ValueRange | None = None,
    ):
        """Open a folder, or make it. Several processes may do so at once: one of them writes the record.

        Args:
            folder: The folder.
            settings: All that a sample depends on besides its id and label, as JSON's types. They are recorded.
            ids: The sample ids of the samples, in order.
            labels: The class of each sample, or None.
            label_names: The names of the classes, or None.
            per_part: How many samples an array file holds; None for a picture of each sample.
            value_range: What [-1, 1] stands for in array files, or None: 8-bit images.

        Raises:
            InputError: If the folder holds samples of other or unknown settings, or cannot be written.
        """
        self._folder = Path(folder)
        self._settings = {"format": "png", **settings}
        self._layout: Layout = Pictures(self._folder, ids, labels, label_names)
        if per_part is not None:
            self._settings |= {"format": "npz", "images_per_part": per_part}
            self._layout = Parts(self._folder, ids, labels, label_names, per_part, value_range)
        self._refuse_unknown()
        check_writable_folder(self._folder)
        self._write_record()
        self._there = self._look()
        self.finished = int(self._there.sum())

    def _refuse_unknown(self) -> None:
        """Raises InputError for samples without a record."""
        # In this order: another process, which is starting too, writes the record before any sample.
        has_samples = any(map(_is_sample, self._listed()))
        if not has_samples or (self._folder / RECORD).exists():
            return
        samples = [name for name in self._listed() if _is_sample(name)]
        raise InputError(
            f"{self._folder} holds {len(samples)} samples such as {printable(min(samples))}, but no {RECORD} "
            f"that says how they were drawn, so they cannot be continued: {_ADVICE}"
        )

    def _write_record(self) -> None:
        """Write the record, unless there is one. Raises InputError if it is one of other settings."""
        write_once(self._folder / RECORD, json.dumps(self._settings, indent=1) + "\n")
        before, settings = {"format": "png", **recorded(self._folder)}, self._settings
        changes = [
            f"{name} {_text(before.get(name))} instead of {_text(settings.get(name))}"
            for name in sorted({*before, *settings})
            if before.get(name) != settings.get(name)
        ]
        if changes:
            raise InputError(f"{self._folder} holds samples drawn with {', '.join(changes)}: {_ADVICE}")

    def _listed(self) -> Iterator[str]:
        """The names of the files in the folder; none if there is no folder."""
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    yield entry.name
        except FileNotFoundError:
            return

    def _look(self) -> np.ndarray:
        return self._layout.there(self._listed())

    def missing(self, part: slice) -> bool:
        """Whether some of these samples were not there when the folder was opened."""
        return not self._there[part].all()

    def count(self) -> int:
        """How many of the samples are there now, whoever wrote them. The folder is listed for it."""
        return int(self._look().sum())

    def write(self, part: slice, x: Tensor) -> None:
        """Write those of these samples that are missing. x: [N, C, H, W] in [-1, 1]."""
        self._write_record()  # if somebody has removed the folder
        self._layout.write(part, x)


def recorded(folder: str | os.PathLike) -> dict[str, Any]:
    """What the samples in a folder were drawn with; nothing if it has none. Raises InputError for a broken record."""
    record = Path(folder) / RECORD
    if not record.exists():
        return {}
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{record}, which says how the samples were drawn, cannot be read ({error}): {_ADVICE}"
        ) from error
    return before if isinstance(before, dict) else {}


def sample_id_of(name: str) -> int | None:
    """The sample id of a picture of that name, or None if it is not that of a sample."""
    found = _PICTURE.fullmatch(name)
    return None if found is None or len(found[1]) > _MOST_DIGITS else int(found[1])


def _is_sample(name: str) -> bool:
    return _PICTURE.fullmatch(name) is not None or ids_of_part(name) is not None


def _text(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False))[:60]
