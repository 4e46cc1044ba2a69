"""What a trained network is worth: images are drawn from it and compared with the data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.data import Dataset
from ddpm_fast.metrics.feature_set import FeatureSet, Kind
from ddpm_fast.metrics.features.extract import extract
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.features.load import load_extractor
from ddpm_fast.metrics.measure import measure
from ddpm_fast.nn import UNet
from ddpm_fast.pictures.images import to_uint8

METRICS = ("fid", "kid", "pr")
BATCH = 128  # images that are drawn at a time


@dataclass(frozen=True)
class Drawing:
    """How images are drawn.

    Attributes:
        n: How many.
        sampler: See SamplingOptions, as for `steps`.
        steps: How many steps of the sampler.
        seed: Of the noise.
    """

    n: int
    sampler: str = "dpmpp_2m"
    steps: int = 20
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return asdict(self)

    def draw(self, model: UNet, diffusion: df.GaussianDiffusion, n: int, first: int = 0) -> Tensor:
        """n of the images, from the one whose number is `first`: [n, C, H, W] in [-1, 1]."""
        options: Any = {"sampler": self.sampler, "steps": self.steps, "seed": self.seed}
        return df.sample(model, diffusion, n, first_sample_id=first, **options)


class Judge:
    """Measures networks against a data set.

    Attributes:
        about: What the numbers are of.
    """

    def __init__(self, data: Dataset, extractor: Extractor):
        self._extractor, self._data = extractor, data
        self.about = {"features": extractor.kind.features, "resizing": extractor.kind.resizing, "reference": data.name}

    @cached_property
    def _real(self) -> FeatureSet:
        return extract(self._extractor, self._data.images.split(BATCH), source=self._data.name)

    def score(
        self, model: UNet, diffusion: df.GaussianDiffusion, drawing: Drawing, progress: Callable[[int], object]
    ) -> dict[str, Any]:
        """The metrics of images that are drawn from a network. progress: Told how many there are."""
        parts: list[Tensor] = []
        for first in range(0, drawing.n, BATCH):
            n = min(BATCH, drawing.n - first)
            drawn = to_uint8(drawing.draw(model, diffusion, n, first))
            parts.append(torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous())
            progress(first + n)
        fake = extract(self._extractor, parts, source="samples")
        return {name: measure(fake, self._real, METRICS)[name] for name in METRICS}


def extractor_of(source: str | None, device: torch.device, quick: bool) -> Extractor:
    """What turns images into features. quick: A made-up one that takes no time, whose numbers mean nothing."""
    return _made_up() if quick else load_extractor(source, device)


def _made_up() -> Extractor:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(16, 4, generator=generator)

    def compute(images: Tensor) -> tuple[Tensor, None]:
        grey = images.float().mean(1, keepdim=True)
        return torch.nn.functional.adaptive_avg_pool2d(grey, 4).flatten(1) @ matrix / 255, None

    digest = hashlib.sha256(matrix.numpy().tobytes()).hexdigest()
    return Extractor(Kind("made up", "to 4x4", digest), 4, torch.device("cpu"), compute)
