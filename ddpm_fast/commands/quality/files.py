"""What a file holds that is given as samples or as a reference: images, features, or statistics of features."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ddpm_fast.commands.ranks import Ranks
from ddpm_fast.data import BUILTIN
from ddpm_fast.data.arrayfile import open_arrays
from ddpm_fast.errors import InputError, printable
from ddpm_fast.metrics.feature_set import FeatureSet

_IMAGES = {"images", "arr_0"}
_STATISTICS = ({"mu", "sigma"}, {"m2", "s2"}, {"ours_mu", "ours_sigma"})


@dataclass(frozen=True)
class Held:
    """What a file or folder holds.

    Attributes:
        images: Images; also said of what is no file, or none that can be read, which a data set's errors speak of.
        features: Features of each image.
        statistics: Their mean and covariance.
    """

    images: bool = True
    features: bool = False
    statistics: bool = False


def what_is_in(source: str) -> Held:
    """What the source holds, by the names of its arrays, and of an .npy by its shape."""
    path = Path(source)
    if source in BUILTIN or not path.is_file():
        return Held()
    if path.suffix.lower() == ".npy":
        with open_arrays(path, "images or features") as file:
            header = file.headers["images"]
        is_features = header.dtype.kind == "f" and len(header.shape) == 2
        return Held(images=not is_features, features=is_features)
    if path.suffix.lower() != ".npz":
        return Held()
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return Held()
    statistics = any(pair <= names for pair in _STATISTICS)
    features = "features" in names
    return Held(bool(names & _IMAGES) or not (statistics or features), features, statistics)


@dataclass(frozen=True)
class FeaturesAlone:
    """Samples of which only the features are known; see samples.Images.

    Attributes:
        features: Their features.
    """

    features: FeatureSet

    @property
    def name(self) -> str:
        """That of the file."""
        return self.features.source

    @property
    def shape(self) -> tuple[int, int, int]:
        """Raises InputError: it is not known."""
        raise self._refusal()

    def __len__(self) -> int:
        return self.features.n

    def batches(
        self, title: str, check: Callable[[], object], ranks: Ranks, batch_size: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Raises InputError: there are no images."""
        raise self._refusal()

    def take(self, indices: Tensor) -> Tensor:
        """Raises InputError: there are no images."""
        raise self._refusal()

    def labels(self, indices: Tensor) -> Tensor | None:
        """None: they are not known."""
        return None

    def _refusal(self) -> InputError:
        return InputError(f"{printable(self.name)} holds features alone, and the images are needed: give these")
