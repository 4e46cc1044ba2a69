"""Samples that are drawn from a model: as they are needed (`DrawnImages`), into a folder that has some of them already
(`complete_folder`), and beside that into a file (`keep_array`)."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.commands.drawing import Drawing, settings_of
from ddpm_fast.commands.labels import Turns
from ddpm_fast.commands.precision import DTYPE_NAMES
from ddpm_fast.commands.ranks import Ranks
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.loops.prepared import Prepared
from ddpm_fast.loops.sampling import prepare
from ddpm_fast.loops.state import asking_rows
from ddpm_fast.pictures.folder import SampleFolder, recorded, sample_id_of
from ddpm_fast.pictures.images import to_uint8


@dataclass(frozen=True, eq=False)
class DrawnImages:
    """Images that a model draws when they are asked for: the same ones, however often and in whatever batches.

    Attributes:
        loaded: The model.
        prepared: How they are drawn.
        classes: The class of each, or None.
    """

    loaded: LoadedModel
    prepared: Prepared
    classes: Sequence[int] | None

    @classmethod
    def of(
        cls, loaded: LoadedModel, n: int, options: SamplingOptions, classes: Sequence[int] | None = None
    ) -> DrawnImages:
        """n images of a model, by options without labels. Raises InputError where `prepare` does."""
        labels = None if classes is None else torch.as_tensor(np.asarray(classes))
        prepared = prepare(Network.of(loaded.model), loaded.diffusion, n, replace(options, labels=labels))
        return cls(loaded, prepared, classes)

    @property
    def name(self) -> str:
        """That of the model."""
        return self.loaded.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """The channels, height and width of each image."""
        channels, height, width = self.prepared.shape
        return channels, height, width

    @property
    def precision(self) -> str:
        """What the network computes in, such as "fp32"."""
        return DTYPE_NAMES[self.prepared.network.dtype or torch.float32]

    @property
    def network_calls(self) -> int:
        """How often the network is called for a batch."""
        return int(asking_rows(self.prepared.table).sum())

    def __len__(self) -> int:
        return self.prepared.n

    def batches(
        self, title: str, check: Callable[[], object], ranks: Ranks, batch_size: int
    ) -> Iterator[tuple[int, Tensor]]:
        """This rank's batches; see samples.Images."""
        for part, x in self.drawn(title, check, batch_size, lambda part: ranks.owns(part.start // batch_size)):
            yield part.start, _bytes(x)

    def drawn(
        self, title: str, check: Callable[[], object], batch_size: int, wanted: Callable[[slice], bool]
    ) -> Iterator[tuple[slice, Tensor]]:
        """The batches that are wanted, in [-1, 1], with a progress bar; see commands.drawing.Drawing.batches."""
        drawing = Drawing(batch_size)
        options = replace(self.prepared.options, batch_size=batch_size, on_step=drawing.on_step)
        yield from drawing.batches(replace(self.prepared, options=options), title, check, wanted)

    def take(self, indices: Tensor) -> Tensor:
        """Some of the images, drawn anew: uint8 [k, C, H, W]. indices: int64 [k], their numbers from 0."""
        key, labels = self.prepared.key, self.prepared.labels
        chosen = replace(
            self.prepared,
            key=replace(key, sample_id=key.sample_id[indices.to(key.sample_id.device)]),
            labels=None if labels is None else labels[indices],
        )
        return _bytes(chosen.draw())

    def labels(self, indices: Tensor) -> Tensor | None:
        """Their classes, int64 [k], or None where there are none."""
        return None if self.classes is None else torch.as_tensor(np.asarray(self.classes))[indices]


def _bytes(x: Tensor) -> Tensor:
    """Floats [n, C, H, W] in [-1, 1] as the uint8 that a file would have."""
    return torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).contiguous()


def open_folder(folder: Path, drawn: DrawnImages, batch_size: int) -> tuple[SampleFolder, int]:
    """A folder of samples, new or as `sample` has begun it, and how many are drawn into it at a time.

    Raises:
        InputError: If it holds others than those that are drawn here, or has some of them with other classes.
    """
    record, options = recorded(folder), drawn.prepared.options
    settings = settings_of(drawn.loaded, options, drawn.precision)
    per_part = None
    if record.get("format") == "npz":
        found = record.get("images_per_part")
        per_part = batch_size = found if isinstance(found, int) and found > 0 else batch_size
        classes = drawn.classes
        settings["labels"] = classes.chosen if isinstance(classes, Turns) else None if classes is None else "mixed"
    ids = range(options.first_sample_id, options.first_sample_id + len(drawn))
    opened = SampleFolder(folder, settings, ids, drawn.classes, drawn.loaded.label_names, per_part)
    if per_part is None and (others := _pictures(folder, ids) - opened.count()) > 0:
        raise InputError(
            f"{folder} has {others} samples of other classes than these would be: give --labels as they were drawn "
            "with (every class by name, if in turn), or another folder"
        )
    return opened, batch_size


def _pictures(folder: Path, ids: range) -> int:
    """How many pictures of samples with these ids a folder has, of whatever class."""
    with os.scandir(folder) as entries:
        found = (sample_id_of(entry.name) for entry in entries)
        return sum(number in ids for number in found if number is not None)


def complete_folder(
    folder: SampleFolder, drawn: DrawnImages, check: Callable[[], object], ranks: Ranks, batch_size: int
) -> None:
    """Draw this rank's share of what a folder lacks. What is finished stays if check raises."""

    def wanted(part: slice) -> bool:
        return ranks.owns(part.start // batch_size) and folder.missing(part)

    for part, x in drawn.drawn("sampling", check, batch_size, wanted):
        folder.write(part, x)


def keep_array(
    batches: Iterator[tuple[int, Tensor]], path: Path, shape: tuple[int, ...], labels: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Pass on batches, and write them as ADM's evaluator reads them: `arr_0`, uint8 [n, H, W, C], and `arr_1`, the
    classes, if there are any. No more than a batch is in memory, and the file is whole or not there.

    Args:
        batches: In their order, all of them.
        path: The .npz.
        shape: That of all images together, [n, C, H, W].
        labels: int64 [n], or None.
    """
    n, channels, height, width = shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, height, width, channels)}
    with atomic_path(path, durable=False) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for first, images in batches:
                yield first, images
                member.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, labels.numpy())
