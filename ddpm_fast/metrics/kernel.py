"""The kernel distance of two sets of features (KID): the unbiased squared maximum mean discrepancy with a polynomial
kernel [Binkowski et al. 2018, sec. 4], as the mean over subsets.

    k(a, b) = (a . b / d + 1)^3
    MMD^2 = mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean over i, j of k(x_i, y_j)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.metrics.inputs import Array, as_vectors, check_same_length

_BLOCK = 1 << 24  # numbers of a kernel that are held at once: 128 MiB


class KernelDistance(NamedTuple):
    """A kernel distance.

    Attributes:
        value: The mean of the subsets' distances.
        error: Their standard deviation (divided by the number of subsets). For subsets of half of the images this is
            the standard error of the value; for smaller ones, that of a value from so few images.
    """

    value: float
    error: float


def kernel_distance(x: Array, y: Array, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> KernelDistance:
    """The kernel distance of two sets, without bias: its expectation is 0 for sets of one distribution.

    It is computed in float64, where x is. The subsets are those that torch-fidelity draws with the same seed, for which
    2020 is its default.

    Args:
        x: Features of the first set, [n, d].
        y: Features of the second, [m, d].
        subsets: How many subsets.
        subset_size: How many images each has, of either set. They are drawn without replacement.
        seed: Of the subsets, 0 to 2^32 - 1.

    Raises:
        InputError: If a set is smaller than a subset, or the features do not fit each other.
    """
    size = check_integer("subset_size", subset_size, 2)
    check_integer("subsets", subsets, 1)
    first = as_vectors("first features", x, 2, "a kernel distance")
    second = as_vectors("second features", y, 2, "a kernel distance").to(first.device)
    check_same_length("first features", first, "second features", second)
    n, m = len(first), len(second)
    if size > min(n, m):
        raise InputError(f"the sets have {n} and {m} images, and subset_size is {size}; take smaller subsets")
    random = np.random.RandomState(check_integer("seed", seed, 0, 2**32 - 1))
    drawn = [(_choice(random, n, size, first), _choice(random, m, size, first)) for _ in range(subsets)]
    if n * n + m * m + n * m <= 3 * subsets * size * size:
        distances = _from_all(first, second, drawn)
    else:
        distances = _one_by_one(first, second, drawn)
    return KernelDistance(float(distances.mean()), float(distances.std(correction=0)))


def _choice(random: np.random.RandomState, n: int, size: int, like: Tensor) -> Tensor:
    return torch.from_numpy(random.choice(n, size, replace=False)).to(like.device)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().T / a.shape[1] + 1).pow(3)


def _diagonal(a: Tensor) -> Tensor:
    return (a.double().square().sum(1) / a.shape[1] + 1).pow(3)


def _from_all(x: Tensor, y: Tensor, drawn: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The subsets' distances from the kernel of all pairs, which is less work where the subsets share many of them."""
    in_x = _members(len(x), [chosen for chosen, _ in drawn], x)
    in_y = _members(len(y), [chosen for _, chosen in drawn], x)
    size = len(drawn[0][0])
    within = _sums(x, x, in_x, in_x) - _diagonal(x) @ in_x + _sums(y, y, in_y, in_y) - _diagonal(y) @ in_y
    return within / (size * (size - 1)) - 2 * _sums(x, y, in_x, in_y) / size**2


def _members(n: int, chosen: list[Tensor], like: Tensor) -> Tensor:
    """float64 [n, subsets]: 1 where an image belongs to a subset."""
    members = torch.zeros(n, len(chosen), dtype=torch.float64, device=like.device)
    members.scatter_(0, torch.stack(chosen, 1), 1.0)
    return members


def _sums(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor) -> Tensor:
    """The sum of the kernel over the pairs of each subset, [subsets]; a block of rows at a time."""
    total = torch.zeros(in_a.shape[1], dtype=torch.float64, device=a.device)
    rows = max(1, _BLOCK // len(b))
    for part, members in zip(a.split(rows), in_a.split(rows), strict=True):
        total += (members * (_kernel(part, b) @ in_b)).sum(0)
    return total


def _one_by_one(x: Tensor, y: Tensor, drawn: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The subsets' distances, of each from its own pairs."""
    distances = []
    for in_x, in_y in drawn:
        a, b = x[in_x], y[in_y]
        whole = torch.ones(len(a), 1, dtype=torch.float64, device=a.device)
        within = _sums(a, a, whole, whole) - _diagonal(a).sum() + _sums(b, b, whole, whole) - _diagonal(b).sum()
        distances.append(within / (len(a) * (len(a) - 1)) - 2 * _sums(a, b, whole, whole) / len(a) ** 2)
    return torch.cat(distances)
