"""A folder of samples, one PNG each, that can be continued: beside the pictures stands what they were drawn with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.atomic import atomic_path, check_writable_folder
from ddpm_fast.pictures import images

RECORD = "samples.json"
_ADVICE = "give another folder to --out, or remove the images"


class SampleFolder:
    """Samples as PNGs in a folder. Those that exist are kept, so that drawing can be stopped and continued.

    Attributes:
        paths: The picture of each sample.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping[str, Any],
        ids: range,
        labels: Sequence[int] | None = None,
        label_names: Sequence[str] | None = None,
    ):
        """Open a folder, or make it.

        Args:
            folder: The folder.
            settings: All that a sample depends on besides its id and label, as JSON's types. They are recorded.
            ids: The sample ids of the samples, in order.
            labels: The class of each sample, or None.
            label_names: The names of the classes, or None.

        Raises:
            InputError: If the folder holds samples of other or unknown settings, or cannot be written.
        """
        self._folder, self._ids, self._labels, self._names = Path(folder), ids, labels, label_names
        chosen: Sequence[int | None] = [None] * len(ids) if labels is None else labels
        self.paths = [
            self._folder / images.sample_name(sample_id, label, label_names)
            for sample_id, label in zip(ids, chosen, strict=True)
        ]
        self._settings = settings
        self._check()
        check_writable_folder(self._folder)
        self._write_record()

    def _write_record(self) -> None:
        with atomic_path(self._folder / RECORD) as unfinished:
            unfinished.write_text(json.dumps(self._settings, indent=1) + "\n", encoding="utf-8")

    def _check(self) -> None:
        """Raises InputError for samples of other settings."""
        record, settings = self._folder / RECORD, self._settings
        if not record.exists():
            names = [path.name for path in self._folder.glob("*.png")]
            samples = [name for name in names if re.fullmatch(r"\d{6,}(_label.*)?\.png", name)]
            if samples:
                raise InputError(
                    f"{self._folder} holds {len(samples)} samples such as {printable(min(samples))}, but no {RECORD} "
                    f"that says how they were drawn, so they cannot be continued: {_ADVICE}"
                )
            return
        before = recorded(self._folder)
        changes = [
            f"{name} {_text(before.get(name))} instead of {_text(settings.get(name))}"
            for name in sorted({*before, *settings})
            if before.get(name) != settings.get(name)
        ]
        if changes:
            raise InputError(f"{self._folder} holds samples drawn with {', '.join(changes)}: {_ADVICE}")

    def missing(self, part: slice) -> bool:
        """Whether some of these samples have no picture yet."""
        return not all(path.exists() for path in self.paths[part])

    @property
    def finished(self) -> int:
        """How many of the samples have a picture."""
        return sum(path.exists() for path in self.paths)

    def write(self, part: slice, x: Tensor) -> None:
        """Write the pictures of these samples that are missing. x: [N, C, H, W] in [-1, 1]."""
        if not (self._folder / RECORD).exists():  # somebody has removed the folder
            self._write_record()
        labels = None if self._labels is None else self._labels[part]
        images.save_images(self._folder, x, self._ids[part].start, labels, self._names, keep=True)


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


def _text(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False))[:60]
