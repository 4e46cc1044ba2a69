"""Precision and recall [Kynkaanniemi et al. 2019], density and coverage [Naeem et al. 2020]: how far the samples lie
where the real images do, and the other way round.

A set is taken for the union of balls around its images, each of which reaches to the k-th nearest other image. For
precision and recall, the surface of a ball belongs to it, as in the code of guided-diffusion and torch-fidelity; for
density and coverage it does not, as in the code of their authors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.errors import check_integer
from ddpm_fast.metrics.distances import comparable, nearest_of, squared_distances
from ddpm_fast.metrics.inputs import Array, as_vectors, check_same_length


class PrecisionRecall(NamedTuple):
    """Shares of 0 to 1.

    Attributes:
        precision: The share of the samples that lie in a ball of a real image.
        recall: The share of the real images that lie in a ball of a sample.
    """

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """What replaces precision and recall where outliers make balls too large.

    Attributes:
        density: In how many balls of real images a sample lies, on average, divided by k: about 1 for samples that are
            like the real images, and more where the real images are dense.
        coverage: The share of the real images whose balls hold a sample.
    """

    density: float
    coverage: float


def precision_recall(real: Array, fake: Array, k: int = 3) -> PrecisionRecall:
    """Precision and recall [Kynkaanniemi et al. 2019, eq. 1-2].

    Distances are computed in float32, or in float64 if the features are float64; where the real ones are.

    Args:
        real: Features of the real images, [n, d].
        fake: Features of the samples, [m, d].
        k: A ball reaches to the k-th nearest other image.

    Raises:
        InputError: If a set has no more than k images, or the features do not fit each other.
    """
    real, fake = _checked(real, fake, k, "the k-th nearest other image")
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    is_real = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    is_reached = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for place, block in squared_distances(real, fake):
        is_real |= (block <= real_radii[place, None]).any(0)
        is_reached[place] = (block <= fake_radii).any(1)
    return PrecisionRecall(float(is_real.double().mean()), float(is_reached.double().mean()))


def density_coverage(real: Array, fake: Array, k: int = 5) -> DensityCoverage:
    """Density and coverage [Naeem et al. 2020, eq. 5-6].

    Args:
        real: Features of the real images, [n, d]; see precision_recall.
        fake: Features of the samples, [m, d], m at least 1.
        k: A ball reaches to the k-th nearest other real image.

    Raises:
        InputError: Where precision_recall raises it.
    """
    inside, is_covered = _inside(real, fake, k)
    return DensityCoverage(float(inside.double().mean()) / k, float(is_covered.double().mean()))


def sample_densities(real: Array, fake: Array, k: int = 5) -> Tensor:
    """The density of each sample, float64 [m] on the CPU: 0 for one that lies in no ball. Their mean is the density.

    Args:
        real: Features of the real images, [n, d]; see precision_recall.
        fake: Features of the samples, [m, d], m at least 1.
        k: A ball reaches to the k-th nearest other real image.

    Raises:
        InputError: Where precision_recall raises it.
    """
    return _inside(real, fake, k)[0].double().cpu() / k


def _inside(real: Array, fake: Array, k: int) -> tuple[Tensor, Tensor]:
    """In how many balls of real images each sample lies, and whether there is a sample in each ball."""
    real, fake = _checked(real, fake, k, "the k-th nearest other image", least_fake=1)
    radii = _radii(real, k)
    inside = torch.zeros(len(fake), dtype=torch.int64, device=real.device)
    is_covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for place, block in squared_distances(real, fake):
        holds = block < radii[place, None]
        inside += holds.sum(0)
        is_covered[place] = holds.any(1)
    return inside, is_covered


def _checked(real: Array, fake: Array, k: int, why: str, least_fake: int | None = None) -> tuple[Tensor, Tensor]:
    least = check_integer("k", k, 1) + 1
    first = as_vectors("features of the real images", real, least, f"{why} (k = {k})")
    second = as_vectors("features of the samples", fake, least_fake or least, f"{why} (k = {k})")
    check_same_length("features of the real images", first, "features of the samples", second)
    moved_fake, moved_real = comparable(second.to(first.device), first)
    return moved_real, moved_fake


def _radii(vectors: Tensor, k: int) -> Tensor:
    """The squared distance of each vector from its k-th nearest other one."""
    return nearest_of(vectors, vectors, k, skip_self=True).squares[:, -1]
