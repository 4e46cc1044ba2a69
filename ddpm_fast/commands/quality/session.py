"""What a command has opened and checked before anything is drawn, and how it measures samples with that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from ddpm_fast.commands.common import choose_device, console
from ddpm_fast.commands.precision import choose_dtype
from ddpm_fast.commands.quality.classes import choose_classes
from ddpm_fast.commands.quality.counting import Counted, count, probe
from ddpm_fast.commands.quality.drawing import DrawnImages, complete_folder, keep_array, open_folder
from ddpm_fast.commands.quality.files import FeaturesAlone, what_is_in
from ddpm_fast.commands.quality.reference import Reference, check_known, check_reference, open_reference
from ddpm_fast.commands.quality.samples import Images, StoredImages, check_channels, check_images, some_of
from ddpm_fast.commands.quality.settings import DEFAULT_N, DEFAULT_STEPS, Request
from ddpm_fast.commands.ranks import Ranks
from ddpm_fast.commands.together import in_all
from ddpm_fast.data import open_dataset
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.load import load_model
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.metrics.feature_set import FeatureSet
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.features.file import read_features
from ddpm_fast.metrics.features.load import load_extractor
from ddpm_fast.metrics.measure import measure

# What the metrics look at: k + 1 images for precision, recall, density and coverage, an image for each split.
_LEAST = {"fid": 2, "kid": 4, "pr": 6, "is": 10}
# Up to so many numbers of all features together, they are kept for fid too, for the estimate of its bias.
_FOR_BIAS = 1 << 25
_MOST_WRITTEN = 4 << 30  # bytes of images in a file that is written of the reference


@dataclass(frozen=True)
class Outcome:
    """What was found about samples.

    Attributes:
        samples: The samples.
        values: What measure.measure says of them.
        fake: Their features.
        real: Those of the reference, or None where no metric needs one.
        seconds: How long the first rank took for "drawing" (or reading) the samples, for their "features", and for the
            "metrics".
    """

    samples: Images
    values: dict[str, Any]
    fake: FeatureSet
    real: FeatureSet | None
    seconds: dict[str, float]


@dataclass
class Session:
    """What a command has opened. The methods that compute are called by all ranks at the same time, inside `running`.

    Attributes:
        request: What was asked for.
        ranks: This process among those that share the work.
        extractor: What computes features.
        loaded: The model that draws the samples, or None.
        stored: The samples that exist, where no model draws any; else None.
        reference: The real images, or None.
        metrics: What is measured.
        keeps: What is kept of each image, see counting.count.
        drawn: The samples that the model draws as it was asked to, or None.
        check: Called again and again; what it raises ends the work.
    """

    request: Request
    ranks: Ranks
    extractor: Extractor
    loaded: LoadedModel | None
    stored: StoredImages | FeaturesAlone | None
    reference: Reference | None
    metrics: tuple[str, ...]
    keeps: frozenset[str]
    drawn: DrawnImages | None = None
    check: Callable[[], object] = lambda: None
    _real: FeatureSet | None = field(default=None, init=False)
    _knows_real: bool = field(default=False, init=False)

    def draws(self, **changes: Any) -> DrawnImages:
        """The samples that the model draws, with changes of some fields of SamplingOptions.

        Raises:
            InputError: If the model cannot draw so.
        """
        assert self.loaded is not None
        request, T = self.request, self.loaded.diffusion.num_timesteps
        options = SamplingOptions(
            sampler=request.sampler,
            steps=min(DEFAULT_STEPS, T) if request.steps is None else request.steps,
            guidance=request.guidance,
            seed=request.seed,
            batch_size=request.batch_size,
        )
        options, n = replace(options, **changes), request.n or DEFAULT_N
        real = None if self.reference is None else self.reference.images
        classes = choose_classes(self.loaded, request.labels, n, options.guidance, real)
        return DrawnImages.of(self.loaded, n, options, classes)

    def samples(self) -> Images:
        """The samples that were asked for; a folder is completed first."""
        if self.drawn is None:
            assert self.stored is not None
            return self.stored
        path = self.request.folder
        if path is None:
            return self.drawn
        drawn, (folder, batch_size) = self.drawn, open_folder(path, self.drawn, self.request.batch_size)
        if folder.finished:
            console.print(f"{folder.finished} of {len(drawn)} images are in {escape(str(path))} already and are kept")
        in_all(lambda: complete_folder(folder, drawn, self.check, self.ranks, batch_size))
        return StoredImages(open_dataset(path, channels=drawn.shape[0]), torch.arange(len(drawn)))

    def real(self) -> FeatureSet | None:
        """The features of the reference, in the first rank; they are computed once. None in the others."""
        if self.reference is None or self.reference.images is None:
            return None if self.reference is None else self.reference.known
        given = self.reference.statistics_for(self.extractor.kind)
        if given is not None and "features" not in self.keeps:
            return FeatureSet(self.extractor.kind, self.reference.name, given)
        if not self._knows_real:
            batches = self._batches(self.reference.images, "features of the reference")
            counted = count(batches, self.extractor, self.keeps - {"logits"}, self.reference.name)
            self._real, self._knows_real = None if counted is None else counted.features, True
            if self._real is not None and given is not None:
                self._real = replace(self._real, statistics=given)
        return self._real

    def reference_images(self) -> Tensor | None:
        """All real images, where the file that is asked for has them: uint8 [n, C, H, W]."""
        images = None if self.reference is None else self.reference.images
        if self.request.reference_form != "adm" or images is None:
            return None
        return images.take(torch.arange(len(images)))

    def fake(self, samples: Images, title: str = "sampling") -> Counted | None:
        """The features of samples, in the first rank; None in the others. title: what the bar calls the drawing."""
        if isinstance(samples, FeaturesAlone):
            return Counted(samples.features, 0.0, 0.0) if self.ranks.is_first else None
        is_drawn = isinstance(samples, DrawnImages)
        batches = self._batches(samples, title if is_drawn else "features of the samples")
        if self.request.array is not None and is_drawn:
            labels = samples.labels(torch.arange(len(samples)))
            batches = keep_array(batches, self.request.array, (len(samples), *samples.shape), labels)
        keeps = self.keeps
        if "fid" in self.metrics and len(samples) * self.extractor.dimensions <= _FOR_BIAS:
            keeps |= {"features"}
        return count(batches, self.extractor, keeps, samples.name)

    def _batches(self, images: Images, title: str) -> Iterator[tuple[int, Tensor]]:
        """This rank's batches of images, whose bar says that they are only its own."""
        if self.ranks.world_size > 1:
            title += f" (one of {self.ranks.world_size} ranks)"
        return images.batches(title, self.check, self.ranks, self.request.batch_size)

    def measured(self, samples: Images, title: str = "sampling") -> Outcome | None:
        """What the metrics say of samples, in the first rank; None in the others. title: see fake."""
        real, fake = self.real(), self.fake(samples, title)
        if fake is None:
            return None
        console.print(f"computing {', '.join(self.metrics)} ...") if console.is_terminal else None
        started = time.perf_counter()
        values = measure(fake.features, fake.features if real is None else real, self.metrics)
        seconds = {"drawing": fake.getting, "features": fake.looking, "metrics": time.perf_counter() - started}
        return Outcome(samples, values, fake.features, real, seconds)


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
    metrics = _with_logits(request, has_logits)
    check_reference(reference, request, extractor)
    _check_written_reference(request, reference)
    keeps = {"features"} if request.needs_features else set()
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


def _with_logits(request: Request, has_logits: bool) -> tuple[str, ...]:
    """The metrics that can be had of such features. Raises InputError if one was asked for that cannot."""
    if has_logits or "is" not in request.metrics:
        return tuple(request.metrics)
    if request.chooses:
        raise InputError(
            "the inception score needs logits, and the network of --features has none: leave `is` out, or give one "
            "that has, such as efficientnet-lite0"
        )
    return tuple(name for name in request.metrics if name != "is")


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
