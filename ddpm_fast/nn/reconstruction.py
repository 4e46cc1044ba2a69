"""Averages of any width from those that were saved while training: Karras et al. 2024, "Analyzing and Improving the
Training Dynamics of Diffusion Models", sec. 3.2 and appendix C.

An average is linear in the weights of all training steps, so a sum of averages is the average whose profile is the sum
of theirs. The sum whose profile is nearest to the wanted one is found by least squares, from inner products of profiles
that have a closed form. The weights themselves play no part in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddpm_fast.nn.power_average import gamma_of


class Profile(NamedTuple):
    """How much each training step counts in a power-function average (power_average.py).

    Attributes:
        step: The number of training steps after which the average was taken, at least 1.
        width: Its standard deviation, as a share of them.
    """

    step: int
    width: float


class Reconstruction(NamedTuple):
    """What sums of averages come nearest to others.

    Attributes:
        coefficients: What each given average is multiplied by, float64 [given, wanted]. Each column adds up to 1.
        errors: How far the profile of each sum is from the wanted one, float64 [wanted]: the root of the integral of
            the squared difference, relative to the same of the wanted profile.
    """

    coefficients: np.ndarray
    errors: np.ndarray


def inner_products(these: Sequence[Profile], those: Sequence[Profile]) -> np.ndarray:
    """The integral over all training steps of the product of two profiles, for each pair: eq. 151.

    A profile is (gamma + 1) / T * (tau / T)^gamma up to tau = T, its step, and 0 afterwards.

    Returns:
        float64 [these, those].
    """
    a, b = _columns(these)[:, :, None], _columns(those)[:, None, :]
    # The product ends with the shorter of the two, where that one is at its height and the longer one is not yet.
    is_shorter = a[0] <= b[0]
    shorter, longer = np.where(is_shorter, a, b), np.where(is_shorter, b, a)
    rise = (shorter[0] / longer[0]) ** longer[1]
    return (a[1] + 1) * (b[1] + 1) / (a[1] + b[1] + 1) * rise / longer[0]


def reconstruct(given: Sequence[Profile], wanted: Sequence[Profile]) -> Reconstruction:
    """The sums of given averages that come nearest to the wanted ones.

    An average that is among the given ones gets the coefficient 1, and the others 0 (but for rounding).

    Args:
        given: The averages that there are, at least one, all different.
        wanted: The averages to approximate.
    """
    products = inner_products(given, given)
    # One by one, so that the bits of each do not depend on which others are wanted.
    found = [_nearest(products, given, profile) for profile in wanted]
    return Reconstruction(np.stack([one for one, _ in found], axis=1), np.array([error for _, error in found]))


def _nearest(products: np.ndarray, given: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The coefficients of one sum, and its error. products: Of the given profiles."""
    targets, square = inner_products(given, [wanted])[:, 0], inner_products([wanted], [wanted]).item()
    coefficients = np.linalg.solve(products, targets)
    coefficients /= coefficients.sum()
    apart = square - 2 * coefficients @ targets + coefficients @ products @ coefficients
    return coefficients, float(np.sqrt(max(apart, 0.0) / square))


def _columns(profiles: Sequence[Profile]) -> np.ndarray:
    """The steps and the exponents, float64 [2, profiles]."""
    return np.array([[profile.step, gamma_of(profile.width)] for profile in profiles], dtype=np.float64).T
