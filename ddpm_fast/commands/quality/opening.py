"""Everything that a command of quality/ needs, opened and checked before anything is drawn."""

from __future__ import annotations

import math

import torch
from rich.markup import escape
from torch import Tensor

from ddpm_fast.commands.common import choose_device, console
from ddpm_fast.commands.precision import choose_dtype
from ddpm_fast.commands.quality.counting import probe
from ddpm_fast.commands.quality.drawing import open_folder
from ddpm_fast.commands.quality.files import FeaturesAlone, what_is_in
from ddpm_fast.commands.quality.reference import Reference, check_known, check_reference, open_reference
from ddpm_fast.commands.quality.samples import StoredImages, check_channels, check_images, some_of
from ddpm_fast.commands.quality.session import Session
from ddpm_fast.commands.quality.settings import Request
from ddpm_fast.commands.ranks import Ranks
from ddpm_fast.data import open_dataset
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.load import load_model
from ddpm_fast.metrics.feature_set import FeatureSet
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.features.file import read_features
from ddpm_fast.metrics.features.load import load_extractor

# What the metrics look at: k + 1 images for precision, recall, density and coverage, an image for each split.
_LEAST = {"fid": 2, "kid": 4, "pr": 6, "is": 10}
_MOST_WRITTEN = 4 << 30  # bytes of images in a file that is written of the reference


def open_session(request: Request, ranks: Ranks) -> Session:
    """Open and check everything. Nothing is drawn and nothing is written, except the record of a new folder.

    Raises:
        InputError: For whatever would go wrong later, as far as that can be known.
    """
    device = choose_device(request.device)
    loaded = None
    if request.model is not None:
        loaded = load_model(request.model, device, choose_dtype(request.precision, device), request.flags)
        _check_model(loaded)
    stored = None
    if request.samples is not None and loaded is None:
        stored = _open_samples(request.samples, request.n)
    shape = None if loaded is None else loaded.shape
    if isinstance(stored, StoredImages):
        shape = stored.shape
    reference = open_reference(request, shape, loaded)
    if isinstance(stored, FeaturesAlone) and (reference is None or reference.images is None):
        extractor = _of_nothing(stored.features)
    else:
        extractor = load_extractor(request.features, device, request.feature_size)
    if shape is None and reference is not None and reference.images is not None:
        shape = reference.images.shape
    has_logits = shape is not None and probe(extractor, shape)
    if isinstance(stored, FeaturesAlone):
        has_logits = stored.features.logits is not None
        check_known(stored.features, extractor, "--samples")
    metrics = _possible(request, has_logits, reference)
    check_reference(reference, extractor)
    _check_written_reference(request, reference)
    keeps = {"features"} if {"kid", "pr"} & set(metrics) else set()
    session = Session(
        request=request,
        ranks=ranks,
        extractor=extractor,
        loaded=loaded,
        stored=stored,
        reference=reference,
        metrics=metrics,
        keeps=frozenset(keeps | ({"logits"} if "is" in metrics else set())),
    )
    if loaded is not None:
        session.drawn = session.draws()
    _check_counts(session)
    if session.drawn is not None and request.folder is not None:
        open_folder(request.folder, session.drawn, request.batch_size)
    return session


def _of_nothing(known: FeatureSet) -> Extractor:
    """An extractor that stands for features of a file, where no image is looked at."""

    def compute(images: Tensor) -> tuple[Tensor, Tensor | None]:
        raise InputError(f"there is no network of {known.kind.features}, only features of {printable(known.source)}")

    return Extractor(known.kind, len(known.statistics.mean), torch.device("cpu"), compute)


def _check_model(loaded: LoadedModel) -> None:
    """Raises InputError for a model whose images have no features."""
    if loaded.value_range is not None:
        raise InputError(
            f"{loaded.name} was trained on floats, and features are those of 8-bit images: give a model of such images"
        )
    check_channels(loaded.shape[0], f"--model: {printable(loaded.name)}")


def _open_samples(source: str, n: int | None) -> StoredImages | FeaturesAlone:
    """The samples that exist, n of them, or all."""
    if what_is_in(source).features:
        features = read_features(source)
        if n not in (None, features.n):
            raise InputError(f"--n is {n}, and --samples are the features of {features.n} images: leave --n out")
        return FeaturesAlone(features)
    dataset = open_dataset(source)
    check_images(dataset, "--samples")
    return StoredImages(dataset, some_of(len(dataset), n, "--n", dataset.name))


def _possible(request: Request, has_logits: bool, reference: Reference | None) -> tuple[str, ...]:
    """The metrics that can be had of such features and such a reference. What is left out is said.

    Raises:
        InputError: If one was asked for by name that cannot be had.
    """
    why: dict[str, str] = {}
    if not has_logits:
        why["is"] = "it needs logits, and the network of --features has none, as efficientnet-lite0 has"
    if reference is not None and not reference.has_features:
        lacking = f"{printable(reference.name)} is a file of statistics, which is enough for fid alone"
        why |= {name: f"it compares images one by one, and {lacking}: give the real images" for name in ("kid", "pr")}
    for name in request.metrics:
        if name in why and request.chooses:
            raise InputError(f"{name} cannot be had: {why[name]}")
        if name in why:
            console.print(escape(f"{name} is left out: {why[name]}"))
    return tuple(name for name in request.metrics if name not in why)


def _check_written_reference(request: Request, reference: Reference | None) -> None:
    """Raises InputError if the file that is asked for cannot hold the reference."""
    if request.write_reference is None or request.reference_form != "adm" or reference is None:
        return
    images = reference.images
    if images is None:
        raise InputError("--reference-form adm is a file with images, and --reference has none: give the real images")
    if (size := len(images) * math.prod(images.shape)) > _MOST_WRITTEN:
        raise InputError(
            f"--reference-form adm is a file with all images, here {size / 2**30:.1f} GiB, which are held in memory "
            f"up to {_MOST_WRITTEN / 2**30:g} GiB: give --n-reference, or the form edm, which has none"
        )


def _check_counts(session: Session) -> None:
    """Raises InputError if there are too few images for a metric."""
    samples = session.stored if session.drawn is None else session.drawn
    there = {} if samples is None else {"--n": (len(samples), "samples")}
    if session.reference is not None and session.reference.count:  # a file of statistics need not say how many
        there["--reference"] = session.reference.count, "real images"
    for metric in session.metrics:
        for option, (found, name) in there.items():
            if found < _LEAST[metric] and not (metric == "is" and option == "--reference"):
                raise InputError(f"{option}: {metric} needs at least {_LEAST[metric]} {name}, and there are {found}")
