"""What a command has opened (opening.py), and how it measures samples with that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from ddpm_fast.commands.common import console
from ddpm_fast.commands.quality.classes import choose_classes
from ddpm_fast.commands.quality.counting import Counted, count
from ddpm_fast.commands.quality.drawing import DrawnImages, complete_folder, keep_array, open_folder
from ddpm_fast.commands.quality.files import FeaturesAlone
from ddpm_fast.commands.quality.reference import Reference
from ddpm_fast.commands.quality.samples import Images, StoredImages
from ddpm_fast.commands.quality.settings import DEFAULT_N, DEFAULT_STEPS, Request
from ddpm_fast.commands.ranks import Ranks
from ddpm_fast.commands.together import in_all
from ddpm_fast.data import open_dataset
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.metrics.feature_set import FeatureSet
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.measure import measure

# Up to so many numbers of all features together, they are kept for fid too, for the estimate of its bias.
_FOR_BIAS = 1 << 25


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
