"""The real images that samples are compared with, or what a file knows of them."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape

from ddpm_fast.commands.common import console
from ddpm_fast.commands.fitting import is_training_set, open_as, say_training_set
from ddpm_fast.commands.quality.samples import StoredImages, check_images, some_of
from ddpm_fast.commands.quality.settings import Request
from ddpm_fast.data import BUILTIN, open_dataset
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.metrics.feature_set import FeatureSet
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.statistics_file import read_statistics


@dataclass(frozen=True)
class Reference:
    """Real images, or what is known of them.

    Attributes:
        name: What they are called.
        images: The images; None where only a file of statistics is given.
        known: What that file says, or None.
        training_set: Whether the model was trained on them; None if that is not known, or there is no model.
    """

    name: str
    images: StoredImages | None = None
    known: FeatureSet | None = None
    training_set: bool | None = None

    @property
    def has_features(self) -> bool:
        """Whether the features of each image can be had, and not only their statistics."""
        return self.images is not None or (self.known is not None and self.known.features is not None)

    @property
    def count(self) -> int:
        """How many images there are."""
        if self.images is not None:
            return len(self.images)
        return 0 if self.known is None else self.known.n


def open_reference(
    request: Request, shape: tuple[int, int, int] | None, loaded: LoadedModel | None
) -> Reference | None:
    """The reference that was asked for, or None.

    Args:
        request: What was asked for.
        shape: The shape of the samples, which pictures are scaled to and arrays must have; None for any.
        loaded: The model that draws the samples, or None.

    Raises:
        InputError: For images that do not fit the samples, or a file that is no reference.
    """
    source = request.reference
    if source is None:
        return None
    if source not in BUILTIN and is_statistics(Path(source)):
        if request.n_reference is not None:
            raise InputError("--n-reference is for real images, and --reference is a file of their statistics")
        known = read_statistics(Path(source))
        return Reference(known.source, known=known)
    if shape is None:
        dataset = open_dataset(source, selection=request.selection)
    else:
        dataset = open_as(source, shape, loaded is not None and loaded.classes > 0, request.selection)
        if dataset.shape != shape:
            found, wanted = ("x".join(map(str, one)) for one in (dataset.shape, shape))
            raise InputError(
                f"--reference: {printable(dataset.name)} has images of {found}, and the samples are {wanted}; arrays "
                "are not converted here: give real images of the samples' size and channels"
            )
    check_images(dataset, "--reference")
    chosen = some_of(len(dataset), request.n_reference, "--n-reference", dataset.name)
    trained = None
    if loaded is not None:
        trained = is_training_set(dataset, loaded)
        say_training_set(dataset, trained)
    return Reference(dataset.name, StoredImages(dataset, chosen), training_set=trained)


def is_statistics(path: Path) -> bool:
    """Whether a file holds statistics or features, and not images: an .npz with other arrays than images."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    names = array_names(path)
    return not {"images", "arr_0"} & names and bool({"mu", "m2", "features"} & names)


def array_names(path: Path) -> set[str]:
    """The names of the arrays in an .npz; none of a file that is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {os.path.splitext(name)[0] for name in archive.namelist()}
    except (OSError, ValueError, zipfile.BadZipFile):
        return set()


def check_reference(reference: Reference | None, request: Request, extractor: Extractor) -> None:
    """Raises InputError if the reference does not have what the metrics need, before anything is drawn."""
    if reference is None:
        return
    if request.needs_features and not reference.has_features:
        raise InputError(
            f"--reference: {printable(reference.name)} is a file of statistics, which is enough for fid alone; kid and "
            "pr compare images one by one: give the real images"
        )
    known = reference.known
    if known is not None and known.statistics.mean.shape != torch.Size([extractor.dimensions]):
        raise InputError(
            f"--reference: {printable(reference.name)} has the statistics of {len(known.statistics.mean)} features and "
            f"{extractor.kind.features} gives {extractor.dimensions}: give --features the network that they are of, or "
            "real images"
        )
    console.print(escape(f"reference: {_size(reference)} of {printable(reference.name)}"))


def _size(reference: Reference) -> str:
    return f"{reference.count:,} images" if reference.count else "the statistics"
