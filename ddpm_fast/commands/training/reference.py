"""The real images that a training run compares its samples with: which ones, and their features, which are computed
once and kept in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.commands.quality.samples import some_of
from ddpm_fast.data import ImageSet
from ddpm_fast.data.arrayfile import Header, read_arrays
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path
from ddpm_fast.metrics import Statistics
from ddpm_fast.metrics.feature_set import FeatureSet
from ddpm_fast.metrics.features.extractor import Extractor

REFERENCE_NAME = "reference.npz"
# So many images are compared with: their features take 50 s on a core and 26 MB. `evaluate` takes all.
MOST = 5000
MOST_HELD_OUT = 1000
LEAST = 10  # images without which neither precision nor density nor copies can be had
_LONGEST_NOTE = 1 << 14  # characters


class Reference:
    """Some or all of the images that a run is trained on, and of those held out, as an extractor sees them.

    Attributes:
        known: The features of the former, in the first process, once they are known.
        held_out: Those of the latter, fp32 [h, d]; None if they are too few, or not known yet.
        said: What says whether features are of these images and this extractor.
    """

    def __init__(self, folder: Path, dataset: ImageSet, held_out: ImageSet | None, extractor: Extractor):
        """Nothing is read yet.

        Args:
            folder: The run's.
            dataset: The images that it is trained on.
            held_out: Images that it is not trained on, or None.
            extractor: What computes the features.
        """
        self._path, self._dataset, self._extractor = folder / REFERENCE_NAME, dataset, extractor
        self._parts = [(dataset, _places(dataset, MOST))]
        if held_out is not None and len(held_out) >= LEAST:
            self._parts.append((held_out, _places(held_out, MOST_HELD_OUT)))
        self._sizes = [len(places) for _, places in self._parts]
        self._features: Tensor | None = None
        self.known: FeatureSet | None = None
        self.held_out: Tensor | None = None
        kind, images = extractor.kind, dataset.recorded()
        del images["data"]  # which is where they are
        self.said = {"features": kind.features, "resizing": kind.resizing, "weights": kind.digest, "sizes": self._sizes}
        self.said |= images

    def __len__(self) -> int:
        return sum(self._sizes)

    def compute(self, part: slice, batch_size: int, check: Callable[[], object]) -> Iterator[Tensor]:
        """The features of some of them, fp32 on the CPU, batch by batch.

        Args:
            part: Which of them, the training images first.
            batch_size: How many are looked at at a time.
            check: Called before each batch; what it raises ends the work.
        """
        first = 0
        for dataset, places in self._parts:
            for some in places[max(0, part.start - first) : max(0, part.stop - first)].split(batch_size):
                if len(some):
                    check()
                    yield self._extractor.compute(dataset.batch(some)[0])[0].float().cpu()
            first += len(places)

    def set(self, features: Tensor) -> None:
        """Take their features [n, d]. Raises InputError if they are not finite."""
        if not torch.isfinite(features).all():
            raise InputError(f"{self._extractor.kind.features} gives features of the images that are not finite")
        real, *others = features.split(self._sizes)
        self.known = FeatureSet(self._extractor.kind, self._dataset.name, Statistics.of(real), real)
        self.held_out = others[0] if others else None
        self._features = features

    def read(self) -> bool:
        """Take them from the run's folder. Returns whether they are there: of these images and this extractor."""
        shape = (len(self), self._extractor.dimensions)

        def check_features(header: Header) -> str | None:
            fits = header.dtype == np.float32 and header.shape == shape
            return None if fits else f"expected float32 {list(shape)}"

        def check_note(header: Header) -> str | None:
            fits = header.dtype.kind == "U" and not header.shape and header.nbytes <= 4 * _LONGEST_NOTE
            return None if fits else "expected a text"

        try:
            arrays = read_arrays(self._path, {"said": check_note, "features": check_features}, "features")
            if str(arrays["said"]) != self._note():
                return False
            self.set(torch.from_numpy(arrays["features"]))
        except (InputError, KeyError, OSError):
            return False  # it is missing, damaged, or of something else: it is computed and written again
        return True

    def write(self) -> None:
        """Keep them in the run's folder. Raises InputError if they cannot be written."""
        assert self._features is not None
        with atomic_path(self._path, durable=False) as temporary, open(temporary, "wb") as file:
            np.savez(file, said=np.array(self._note()), features=self._features.numpy(), allow_pickle=False)

    def _note(self) -> str:
        return json.dumps(self.said, sort_keys=True)


def _places(dataset: ImageSet, most: int) -> Tensor:
    """Which images of a set are meant, int64 [n]: all, or so many of them, always the same ones."""
    n = min(most, len(dataset))
    chosen = some_of(len(dataset), n, "", dataset.name)
    return torch.arange(n) if chosen is None else chosen
