"""How two sets of images differ: pixel by pixel, where they have the same noise, and as sets, by the kernel two-sample
test (Gretton et al. 2012), with a Gaussian kernel on pixels and permutations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.errors import InputError


def two_sample_p(first: Tensor, second: Tensor, permutations: int = 2000) -> float:
    """The p-value of "both sets are of one distribution".

    If they are, it is uniform between 0 and 1; it is small where a Gaussian kernel, as wide as the median distance,
    tells the sets apart.

    Args:
        first: Images [n, ...].
        second: As many images; the i-th is of the same class as the i-th of the first set.
        permutations: The number of random exchanges between the sets.

    Raises:
        InputError: The sets are not of one size, or of fewer than two images.
    """
    if first.shape != second.shape or len(first) < 2:
        raise InputError(f"got {list(first.shape)} and {list(second.shape)}; expected as many of both, at least two")
    n = len(first)
    points = torch.cat([first, second]).flatten(1).double()
    distances = torch.cdist(points, points)
    kernel = torch.exp(-0.5 * (distances / distances[distances > 0].median()).square())
    # Classes are even in both sets, so only images of the same one may change places.
    swaps = np.random.default_rng(0).choice([-1.0, 1.0], (permutations + 1, n))
    swaps[0] = 1
    signs = torch.from_numpy(np.concatenate([swaps, -swaps], axis=1))
    # For sets of one size this orders the permutations as the unbiased statistic does.
    statistics = ((signs @ kernel) * signs).sum(1)
    return float((statistics >= statistics[0] * (1 - 1e-12)).double().mean())


def deviations(images: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Says how far images are from others of the same noise; both are uint8 [n, ...], in levels of 0 to 255."""
    levels = np.abs(images.astype(float) - exact).reshape(len(images), -1)
    shares = {"mean_levels": levels.mean(), "differing_share": (levels > 0).mean()}
    shares["worst_image_mean_levels"] = levels.mean(1).max()
    return {name: float(share) for name, share in shares.items()}
