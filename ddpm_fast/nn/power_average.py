"""The power-function average of a model's weights: Karras et al. 2024, "Analyzing and Improving the Training Dynamics
of Diffusion Models", sec. 3.1 and appendix C.

After t training steps the weights of step tau count in proportion to tau^gamma, so that the average is as wide in a
long run as in a short one, and forgets the beginning. Its width is the standard deviation of that profile as a share of
t. Averages of any width are computed afterwards from those of two widths (reconstruction.py).
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_fast.errors import check_number
from ddpm_fast.nn.average import WeightAverage
from ddpm_fast.wide import wide

LEAST_WIDTH, MOST_WIDTH = 0.001, 0.288  # 12 ** -0.5 = 0.2887 is the width of the mean over all training steps


def width_of(gamma: float) -> float:
    """The width of the profile tau^gamma: sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))), eq. 123."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(width: float) -> float:
    """The exponent of the profile of a width: eq. 126, the largest root of a cubic.

    Raises:
        InputError: If the width is not from LEAST_WIDTH to MOST_WIDTH.
    """
    check_width("the width of an average", width)
    ratio = width**-2  # (gamma + 2)^2 (gamma + 3) = ratio (gamma + 1)
    return float(np.roots([1, 7, 16 - ratio, 12 - ratio]).real.max())


def check_width(name: str, width: object) -> float:
    """The width as a number. Raises InputError, naming it so, if it is not from LEAST_WIDTH to MOST_WIDTH."""
    return check_number(
        name, width, lambda w: LEAST_WIDTH <= w <= MOST_WIDTH, f"a width from {LEAST_WIDTH} to {MOST_WIDTH}"
    )


class PowerAverage(WeightAverage):
    """average_t = beta_t average_(t-1) + (1 - beta_t) weights_t, with beta_t = (1 - 1/t)^(gamma + 1): eq. 127.

    Then the weights of training step tau count for (tau^(gamma+1) - (tau-1)^(gamma+1)) / t^(gamma+1): the integral of
    the profile over that step. The first step counts for all there is, so the initial weights count for nothing.

    Args:
        model: The network whose parameters are averaged; it keeps its own weights.
        width: The profile's standard deviation as a share of the steps so far, from LEAST_WIDTH to MOST_WIDTH.

    Raises:
        InputError: If the width is not.
    """

    def __init__(self, model: nn.Module, width: float):
        self.width, self.gamma = width, gamma_of(width)
        super().__init__(model)

    def _share(self, step: int | Tensor, device: torch.device) -> Tensor:
        """1 - beta_t of the training step t = step + 1, in float64 (where there is one) and rounded once."""
        t = 1 + torch.as_tensor(step, dtype=wide(device), device=device)
        return -torch.expm1((self.gamma + 1) * torch.log1p(-1 / t)).float()
