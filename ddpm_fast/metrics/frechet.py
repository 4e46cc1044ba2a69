"""The Frechet distance of two sets of features, taken for Gaussians, and how biased it is with few images.

    d^2 = |mu1 - mu2|^2 + Tr(S1) + Tr(S2) - 2 Tr((S1 S2)^(1/2))    [Heusel et al. 2017, eq. 6; Dowson and Landau 1982]

With A A^T = S1, the trace of the root is the sum of the roots of the eigenvalues of A^T S2 A. That matrix is symmetric
and has no negative eigenvalues except by rounding, also where a covariance is singular, as it is with fewer images than
numbers in a feature. The root of a matrix that other codes compute (scipy's sqrtm) may then fail or become complex.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.metrics.inputs import Array, as_tensor, as_vectors
from ddpm_fast.metrics.statistics import Statistics

# How far a covariance may be from symmetric, and its smallest eigenvalue below 0, as shares of its largest number or
# eigenvalue. One that was stored in float32 is off by up to 1e-7 for each of its numbers.
_ROUNDING = 1e-5


class FrechetEstimate(NamedTuple):
    """A Frechet distance from a number of images, and how much of it comes from there being no more.

    Attributes:
        value: The distance.
        bias: By how much it is too large, as far as halves of the images tell.
    """

    value: float
    bias: float


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """The squared Frechet distance of two Gaussians [Heusel et al. 2017, eq. 6]; of Inception's features it is FID.

    It is computed in float64 on the CPU.

    Args:
        mu1: The mean of the first, [d].
        sigma1: Its covariance [d, d], which may be singular.
        mu2: The mean of the second, [d].
        sigma2: Its covariance.

    Raises:
        InputError: If shapes do not fit, numbers are not finite, or a covariance is not symmetric or has eigenvalues
            below 0 that no rounding explains.
    """
    first = _moments("first", mu1, sigma1)
    second = _moments("second", mu2, sigma2)
    if len(first[0]) != len(second[0]):
        raise InputError(
            f"the first mean has {len(first[0])} numbers and the second {len(second[0])}; expected features of one "
            "extractor"
        )
    return _distance(first, second, _root("second", second[1]))


def estimate_frechet(features: Array, mu: Array, sigma: Array, seed: int = 0) -> FrechetEstimate:
    """The Frechet distance of images from a reference, and its bias.

    A distance from n images is too large by about c / n [Chong and Forsyth 2020, sec. 3]. So one from half of them is
    too large by twice as much, and what it is larger by is the bias. That holds where n is several times d; with fewer
    images the bias is larger than what this says.

    Args:
        features: Of the images, [n, d], n at least 4.
        mu: The mean of the reference, [d].
        sigma: Its covariance, [d, d].
        seed: Which images form the halves. Both halves count.

    Raises:
        InputError: Where frechet_distance raises it, and for fewer images.
    """
    vectors = as_vectors("features", features, 4, "the bias of a Frechet distance").cpu()
    reference = _moments("reference", mu, sigma)
    if vectors.shape[1] != len(reference[0]):
        raise InputError(
            f"the features have {vectors.shape[1]} numbers for each image and the reference {len(reference[0])}; "
            "expected features of one extractor"
        )
    root = _root("reference", reference[1])
    value = _distance_of(vectors, reference, root)
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(vectors)))
    size = len(vectors) // 2
    halves = [_distance_of(vectors[part], reference, root) for part in (order[:size], order[size : 2 * size])]
    # size / (n - size) is 1 for even n.
    return FrechetEstimate(value, (sum(halves) / 2 - value) * size / (len(vectors) - size))


def _moments(which: str, mu: Array, sigma: Array) -> tuple[Tensor, Tensor]:
    """A mean and a covariance in float64 on the CPU, checked."""
    mean = as_tensor(f"{which} mean", mu, "[d]", 1).to("cpu", torch.float64)
    covariance = as_tensor(f"{which} covariance", sigma, "[d, d]", 2).to("cpu", torch.float64)
    if not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"the {which} mean has shape {list(mean.shape)} and its covariance {list(covariance.shape)}; expected [d] "
            "and [d, d]"
        )
    off = float((covariance - covariance.T).abs().max())
    if off > _ROUNDING * float(covariance.abs().max()):
        raise InputError(
            f"the {which} covariance is not symmetric: numbers on both sides of its diagonal differ by up to {off:.3g}"
        )
    return mean, (covariance + covariance.T) / 2


def _root(which: str, covariance: Tensor) -> Tensor:
    """A with A A^T = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    if float(values[0]) < -_ROUNDING * max(0.0, float(values[-1])):
        raise InputError(
            f"the {which} covariance has an eigenvalue of {float(values[0]):.3g}, and its largest is "
            f"{float(values[-1]):.3g}; expected none below 0"
        )
    return vectors * values.clamp(min=0).sqrt()


def _distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], root: Tensor) -> float:
    """The distance of two pairs of mean and covariance, with the root of the second's covariance."""
    product = root.T @ first[1] @ root
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    if float(values[0]) < -_ROUNDING * max(0.0, float(values[-1])):
        _root("first", first[1])  # says what is wrong
    return _sum(first[0] - second[0], first[1].trace() + second[1].trace(), values)


def _distance_of(vectors: Tensor, reference: tuple[Tensor, Tensor], root: Tensor) -> float:
    """The distance of vectors [n, d], n at least 2, from a mean and a covariance."""
    n, d = vectors.shape
    if n >= d:
        statistics = Statistics.of(vectors)
        return _distance((statistics.mean, statistics.covariance), reference, root)
    # The product of n x n numbers has the same eigenvalues as that of d x d, but for zeros.
    mean = vectors.double().mean(0)
    centred = (vectors - mean) / (n - 1) ** 0.5
    rotated = centred @ root
    values = torch.linalg.eigvalsh(rotated @ rotated.T)
    return _sum(mean - reference[0], centred.square().sum() + reference[1].trace(), values)


def _sum(apart: Tensor, traces: Tensor, values: Tensor) -> float:
    """The distance from the difference of the means, the sum of the traces, and the eigenvalues of the product."""
    # Equal sets may come out below 0 by rounding.
    return max(0.0, float(apart.square().sum() + traces - 2 * values.clamp(min=0).sqrt().sum()))
