"""How far a metric of samples would differ for other samples: the jackknife of Quenouille and Tukey by groups [Efron &
Tibshirani 1993, ch. 11]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ddpm_fast.errors import check_integer


def jackknife(measure: Callable[[Tensor], Mapping[str, float]], n: int, groups: int = 10) -> dict[str, float]:
    """Standard errors, from what is measured without each of some groups of the samples:

        sqrt((G - 1) / G * sum over the groups of (value without it - mean of these)^2).

    A bias that depends on the number of samples, as that of the Frechet distance, is the same in all values and so does
    not count. What the choice of the real images adds is not in it.

    Args:
        measure: Takes the numbers of some of the samples, int64 [m], ascending; gives values by their names.
        n: How many samples there are.
        groups: How many groups G, of 2 to n; the samples are divided among them at random, always in the same way.

    Returns:
        The standard error of each value.
    """
    groups = check_integer("groups", groups, 2, max(2, check_integer("n", n, 2)))
    group = torch.randperm(n, generator=torch.Generator().manual_seed(0)) % groups
    without = [measure((group != one).nonzero()[:, 0]) for one in range(groups)]
    errors = {}
    for name in without[0]:
        values = torch.tensor([found[name] for found in without], dtype=torch.float64)
        errors[name] = float(((values - values.mean()).square().sum() * (groups - 1) / groups).sqrt())
    return errors
