"""What the network predicts, how the reverse step's variance is set, how the error is weighted, over t.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (eps, the two fixed variances, L_simple); Salimans
& Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models" (v). Code that noises, scores or
samples reads these tables and knows none of the names below; a new choice is one more entry here.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.schedule import Schedule

Columns = Callable[[Schedule], tuple[Tensor, ...]]


class Prediction(NamedTuple):
    """One meaning of the network's output, as columns over t."""

    target: Columns  # (c_x0, c_noise): the output to be learned is c_x0 * x_0 + c_noise * eps
    x0: Columns  # (a_x, a_out): x_0 = a_x * x_t + a_out * output


PREDICTIONS = {
    # [H eq. 11] solved for x_0. a_x reaches sqrt(1/alpha_bar_T) = 20,291 for cosine-1000.
    "eps": Prediction(
        target=lambda s: (torch.zeros_like(s.betas), torch.ones_like(s.betas)),
        x0=lambda s: (s.sqrt_recip_alphas_cumprod, -s.sqrt_recipm1_alphas_cumprod),
    ),
    # v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 [SH app. D]: with x_t, a rotation of (x_0, eps), so
    # never divides.
    "v": Prediction(
        target=lambda s: (-s.sqrt_one_minus_alphas_cumprod, s.sqrt_alphas_cumprod),
        x0=lambda s: (s.sqrt_alphas_cumprod, -s.sqrt_one_minus_alphas_cumprod),
    ),
}


def _fixed_small(s: Schedule) -> tuple[Tensor, Tensor]:
    return s.posterior_variance, s.posterior_log_variance_clipped


def _fixed_large(s: Schedule) -> tuple[Tensor, Tensor]:
    # At t = 0, beta~ at t = 1 instead of beta_0, as in the papers' code, for a better likelihood of x_0.
    variance = torch.cat([s.posterior_log_variance_clipped[:1].exp(), s.betas[1:]])
    return variance, variance.log()


# (variance, log variance) of p(x_{t-1} | x_t): the two extremes of [H sec. 3.2].
VARIANCES = {"fixed_small": _fixed_small, "fixed_large": _fixed_large}

# (weight,) of the mean squared error at t.
LOSSES = {"simple": lambda s: (torch.ones_like(s.betas),)}


@dataclass(frozen=True)
class Objective:
    """A choice of prediction ("eps", "v"), variance ("fixed_small", "fixed_large") and loss ("simple").

    Every table is float64 on the CPU: cast it last. Raises InputError for a name that does not exist.
    """

    prediction: str = "eps"
    variance: str = "fixed_large"
    loss: str = "simple"

    def __post_init__(self):
        for what, choices in (("prediction", PREDICTIONS), ("variance", VARIANCES), ("loss", LOSSES)):
            value = getattr(self, what)
            if value not in list(choices):
                raise InputError(f"{what} = {value!r} does not exist: choose one of {', '.join(map(repr, choices))}")

    def loss_table(self, schedule: Schedule) -> Tensor:
        """float64 [T, 3], columns (c_x0, c_noise, weight).

        A sample's loss is weight * mean((output - (c_x0 * x_0 + c_noise * eps))^2); "simple" has weight
        1, which with eps is L_simple [H eq. 14].
        """
        return torch.stack([*PREDICTIONS[self.prediction].target(schedule), *LOSSES[self.loss](schedule)], 1)

    def x0_table(self, schedule: Schedule) -> Tensor:
        """float64 [T, 2], columns (a_x, a_out): the output's x_0 is a_x * x_t + a_out * output."""
        return torch.stack(PREDICTIONS[self.prediction].x0(schedule), 1)

    def variance_table(self, schedule: Schedule) -> Tensor:
        """float64 [T, 2], columns (variance, log variance) of p(x_{t-1} | x_t) [H sec. 3.2].

        fixed_small is beta~_t: 0 at t = 0, with beta~ at t = 1 in the logarithm. fixed_large is beta_t, with
        beta~ at t = 1 for t = 0 in both columns. A chain of one step has log beta_0 at t = 0.
        """
        return torch.stack(VARIANCES[self.variance](schedule), 1)

    def to_dict(self) -> dict:
        """{"prediction": ..., "variance": ..., "loss": ...}, from which Objective(**d) is made again."""
        return asdict(self)
