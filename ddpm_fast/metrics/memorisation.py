"""Whether samples are copies of training images: their distances from the nearest training image, with held-out images
as the yardstick [Meehan et al. 2020]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.errors import check_integer
from ddpm_fast.metrics.distances import comparable, nearest_of
from ddpm_fast.metrics.inputs import Array, as_vectors, check_same_length

# A sample counts as a copy if it is nearer to a training image than all but this share of the held-out images are.
COPY_QUANTILE = 0.01


class Nearest(NamedTuple):
    """The nearest images of another set.

    Attributes:
        distances: float [n, k] on the CPU, from the smallest.
        indices: int64 [n, k], which images have these distances.
    """

    distances: Tensor
    indices: Tensor


class Memorisation(NamedTuple):
    """How the samples' distances from the nearest training image compare with those of held-out images.

    Attributes:
        nearer: The probability that a sample is nearer to its nearest training image than a held-out image is to its
            own; ties count half. 0.5 says that the samples are as new as held-out images; 1, that all are copies.
        z: How many standard deviations the samples' distances lie from 0.5, as Mann and Whitney's test has it for
            independent images; below 0 for samples that are nearer. It is the C_T of Meehan et al. with one cell.
        copies: The share of the samples that are nearer than all but 1% of the held-out images. So about 0.01 of new
            images count as copies.
        threshold: The distance below which a sample counts as a copy.
        distances: float [n] on the CPU, of each sample from its nearest training image.
        indices: int64 [n], which training image that is.
    """

    nearer: float
    z: float
    copies: float
    threshold: float
    distances: Tensor
    indices: Tensor


def nearest(fake: Array, real: Array, k: int = 1) -> Nearest:
    """The k nearest real images of each sample, by the Euclidean distance of their features.

    Distances are computed in float32, or in float64 if the features are float64, a block at a time.

    Args:
        fake: Features of the samples, [n, d].
        real: Features of the real images, [m, d], m at least k.
        k: How many.

    Raises:
        InputError: If there are fewer than k real images, or the features do not fit each other.
    """
    least = check_integer("k", k, 1)
    rows = as_vectors("features of the samples", fake, 1, "a nearest image")
    columns = as_vectors("features of the real images", real, least, f"{least} nearest images")
    check_same_length("features of the samples", rows, "features of the real images", columns)
    rows, columns = comparable(rows, columns)
    found = nearest_of(rows, columns, least)
    return Nearest(found.squares.sqrt().cpu(), found.indices.cpu())


def memorisation(fake: Array, train: Array, held_out: Array) -> Memorisation:
    """Compare samples with held-out images by their distances from the nearest training image.

    Args:
        fake: Features of the samples, [n, d].
        train: Features of the training images, [m, d].
        held_out: Features of images that are of the same kind, and were not trained on, [h, d], h at least 2.

    Raises:
        InputError: If the features do not fit each other, or there are too few of them.
    """
    held_out = as_vectors("features of the held-out images", held_out, 2, "a yardstick")
    distances, indices = (found[:, 0] for found in nearest(fake, train))
    yardstick = nearest(held_out, train).distances[:, 0].sort().values
    values = distances.to(torch.promote_types(distances.dtype, yardstick.dtype))
    yardstick = yardstick.to(values.dtype)
    n, h = len(values), len(yardstick)
    below = torch.searchsorted(yardstick, values, right=False)
    up_to = torch.searchsorted(yardstick, values, right=True)
    # U counts the pairs in which the held-out image is the nearer one; its variance is that of distinct distances.
    u = float((below + up_to).double().sum()) / 2
    threshold = float(yardstick[int(COPY_QUANTILE * h)])
    return Memorisation(
        nearer=1 - u / (n * h),
        z=(u - n * h / 2) / (n * h * (n + h + 1) / 12) ** 0.5,
        copies=float((values < threshold).double().mean()),
        threshold=threshold,
        distances=distances,
        indices=indices,
    )
