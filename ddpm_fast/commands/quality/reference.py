"""The real images that samples are compared with, or what a file knows of them."""

from __future__ import annotations

from dataclasses import dataclass

from rich.markup import escape

from ddpm_fast.commands.common import console
from ddpm_fast.commands.fitting import open_as, part_of
from ddpm_fast.commands.quality.files import what_is_in
from ddpm_fast.commands.quality.samples import StoredImages, check_images, some_of
from ddpm_fast.commands.quality.settings import Request
from ddpm_fast.data import open_dataset
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.metrics.feature_set import FeatureSet, Kind
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.features.file import read_features
from ddpm_fast.metrics.features.inception import NAME as INCEPTION
from ddpm_fast.metrics.statistics import Statistics
from ddpm_fast.metrics.statistics_file import read_statistics


@dataclass(frozen=True)
class Reference:
    """Real images, or what is known of them.

    Attributes:
        name: What they are called.
        images: The images; None where only a file of features or of their statistics is given.
        known: What that file says, or one that has images and statistics, as ADM's have; else None.
        training_set: Whether the model was trained on them; None if that is not known, or there is no model.
    """

    name: str
    images: StoredImages | None = None
    known: FeatureSet | None = None
    training_set: bool | None = None

    def statistics_for(self, kind: Kind) -> Statistics | None:
        """The statistics that a file of images has beside them, if they are of such features.

        ADM's file for ImageNet has 10,000 images, and the statistics of all 1.28 million. It does not say of which
        features, but there it can only be the Inception network of 2015.
        """
        if self.images is None or self.known is None:
            return None
        unnamed = not self.known.kind.features and kind.features == INCEPTION
        return self.known.statistics if unnamed or self.known.kind == kind else None

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
    held, known = what_is_in(source), None
    if held.features or held.statistics:
        known = read_features(source) if held.features else read_statistics(source)
    if not held.images:
        if request.n_reference is not None or request.part != "all":
            raise InputError("--n-reference and --part are for real images, and --reference has their features alone")
        assert known is not None
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
    trained = None
    if loaded is not None:
        dataset, trained = part_of(dataset, loaded, request.part)
        known = known if request.part == "all" else None
    elif request.part != "all":
        raise InputError("--part is of a model, which says what its training held out: give --model")
    chosen = some_of(len(dataset), request.n_reference, "--n-reference", dataset.name)
    return Reference(dataset.name, StoredImages(dataset, chosen), known, trained)


def check_reference(reference: Reference | None, extractor: Extractor) -> None:
    """Raises InputError if what a file knows of the reference cannot be that of this extractor. Says what it is."""
    if reference is None:
        return
    if reference.known is not None and reference.images is None:
        check_known(reference.known, extractor, "--reference")
    console.print(escape(f"reference: {_size(reference)} of {printable(reference.name)}"))


def check_known(known: FeatureSet, extractor: Extractor, option: str) -> None:
    """Raises InputError for features of another length, and says so where it is not known which they are."""
    found = len(known.statistics.mean)
    if found != extractor.dimensions:
        raise InputError(
            f"{option}: {printable(known.source)} is of {found} features, and {extractor.kind.features} gives "
            f"{extractor.dimensions}: give --features the network that they are of, or images"
        )
    said = ""
    if not known.kind.digest:
        said = "does not say what its features are: they must be those of --features"
    elif known.kind != extractor.kind:
        said = f"is of {known.kind.features}, {known.kind.resizing}, and not of --features: a comparison means nothing"
    if said:
        console.print(escape(f"{option}: {printable(known.source)} {said}"))


def _size(reference: Reference) -> str:
    return f"{reference.count:,} images" if reference.count else "the statistics"
