"""The rows of ops.reverse_step for chains as diffusers has them: any noise level may follow any other.

samplers.py makes tables of a Schedule, whose timesteps follow one another. diffusers' schedulers do not always: its
DDIMScheduler steps by T // n whatever the next timestep is, and its DPM-Solver may end above noise level 0. So these
rows are made of alpha_bar before and after each step. All are float64 on the CPU; cast them last. Nothing here imports
diffusers.

The sources are [H] Ho et al. 2020, [N] Nichol & Dhariwal 2021, [S] Song et al. 2020 and [L] Lu et al. 2022.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.ops.tensors import working_dtype
from ddpm_fast.samplers import towards

# DDPMScheduler's smallest variance, below which its logarithm would be that of 0.
_SMALLEST_VARIANCE = 1e-20


class Levels(NamedTuple):
    """The noise levels of a chain of S steps, and what its network predicts.

    Attributes:
        timesteps: int64 [S], what the network is told, the noisiest first.
        ab: float64 [S], alpha_bar before each step.
        ab_next: float64 [S], alpha_bar after it.
        prediction: "epsilon", "sample" or "v_prediction", as diffusers names it.
        limit: The predicted x_0 is held to [-limit, limit]; infinity for no limit.
    """

    timesteps: Tensor
    ab: Tensor
    ab_next: Tensor
    prediction: str
    limit: float = math.inf


class Rows(NamedTuple):
    """Rows for ops.reverse_step.

    Attributes:
        table: float64 [S, 8]; or [2S, 8], where row S + i takes step i without a step before it.
        reads_output: Whether x0_previous stands for the network's output, and not for the x_0 of the step before.
    """

    table: Tensor
    reads_output: bool = False


class Plan:
    """The rows of one chain of S steps, on the host and, once they were needed there, on devices.

    Attributes:
        reads_output: See Rows.
        looks_back: Whether some step reads the x_0 of the step before it.

    Args:
        rows: The rows.
        steps: S.
        given_x0: Whether x_0 is formed before the op, which then takes it as the output.
    """

    def __init__(self, rows: Rows, steps: int, given_x0: bool) -> None:
        table = rows.table.clone()
        columns = table.T.tolist()
        self._steps = steps
        self._to_x0 = list(zip(columns[0], columns[1], strict=True))
        self._reads = [b_previous != 0 for b_previous in columns[4]]
        self._noisy = [sigma != 0 for sigma in columns[5]]
        if given_x0:
            table[:, 0], table[:, 1], table[:, 6] = 0.0, 1.0, math.inf
        self._table = table
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._numbers: dict[torch.device, Tensor] = {}
        self.reads_output = rows.reads_output
        self.looks_back = len(table) > steps

    def number(self, step: int, has_past: bool) -> int:
        """The number of the row for a step. has_past: whether the x_0 of the step before it is known."""
        return step if has_past or not self.looks_back else step + self._steps

    def reads(self, number: int) -> bool:
        """Whether a row reads x0_previous."""
        return self._reads[number]

    def is_noisy(self, number: int) -> bool:
        """Whether a row adds noise."""
        return self._noisy[number]

    def x0(self, number: int, x: Tensor, output: Tensor) -> Tensor:
        """x_0 by a row, without a limit, in fp32 (float64 for a float64 x)."""
        a_x, a_out = self._to_x0[number]
        dtype = working_dtype(x)
        return a_x * x.to(dtype) + a_out * output.to(dtype)

    def on(self, x: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The table and the number of a row as ops.reverse_step takes them, for a state x. Copied to a device once."""
        place = x.device, working_dtype(x)
        if place not in self._tables:
            with torch.inference_mode(False):  # kept for calls that need a gradient
                self._tables[place] = self._table.to(place[0], place[1])
                self._numbers[x.device] = torch.arange(len(self._table), device=x.device)
        return self._tables[place], self._numbers[x.device][number]


def ddpm_rows(levels: Levels, variance_type: str) -> Rows:
    """Ancestral sampling as DDPMScheduler does it [H eq. 7; N eq. 15]. No noise is added at timestep 0.

    Args:
        levels: The chain.
        variance_type: DDPMScheduler's. With "learned" the network's second group of channels is the variance: give its
            logarithm to the op. "fixed_large_log" is the same as "fixed_large"; DDPMScheduler gives NaN for it.
    """
    ab, ab_next = levels.ab, levels.ab_next
    beta = 1 - ab / ab_next
    small = ((1 - ab_next) / (1 - ab) * beta).clamp(min=_SMALLEST_VARIANCE).log()
    zero = torch.zeros_like(ab)
    base, slope = {
        "fixed_small": (small, zero),
        "fixed_small_log": (small, zero),
        "fixed_large": (beta.log(), zero),
        "fixed_large_log": (beta.log(), zero),
        "learned": (zero, zero + 1),
        "learned_range": ((beta.log() + small) / 2, (beta.log() - small) / 2),
    }[variance_type]
    noisy = levels.timesteps > 0
    return Rows(
        _stacked(
            levels,
            b_x=(ab / ab_next).sqrt() * (1 - ab_next) / (1 - ab),
            b_x0=ab_next.sqrt() * beta / (1 - ab),
            sigma=torch.where(noisy, (base / 2).exp(), zero),
            spread=torch.where(noisy, slope / 2, zero),
        )
    )


def ddim_rows(levels: Levels, eta: float, eps_of_output: bool) -> Rows:
    """DDIM [S eq. 12 and 16].

    Args:
        levels: The chain.
        eta: Scales the noise, from 0 to 1.
        eps_of_output: Whether eps is the network's own although x_0 was limited, as DDIMScheduler has it by default.
            Then eps = e_x x + e_out out, which no row says by x_0; the output enters in the place of x0_previous.
    """
    ab, ab_next = levels.ab, levels.ab_next
    b_x, b_x0, sigma = towards(ab, ab_next, eta)
    if not eps_of_output:
        return Rows(_stacked(levels, b_x=b_x, b_x0=b_x0, sigma=sigma))
    noise, zero = (1 - ab).sqrt(), torch.zeros_like(ab)
    e_x, e_out = {
        "epsilon": (zero, zero + 1),
        "sample": (1 / noise, -ab.sqrt() / noise),
        "v_prediction": (noise, ab.sqrt()),
    }[levels.prediction]
    direction = b_x * noise
    table = _stacked(levels, b_x=direction * e_x, b_x0=ab_next.sqrt(), b_previous=direction * e_out, sigma=sigma)
    return Rows(table, reads_output=True)


def dpmpp_rows(levels: Levels, *, order: int, sde: bool, heun: bool, ends_by_first_order: bool) -> Rows:
    """DPM-Solver++, multistep [L alg. 2], in the two forms of its second order that DPMSolverMultistepScheduler has.

    With h = lambda' - lambda and r = h_previous / h, D_1 is (x_0 - x_0_previous) / r. "midpoint" adds to the first
    order's step (b_x0 / 2) D_1; "heun" alpha' (1 - (1 - e^{-H}) / H) D_1, where H is h, or 2h if sde.

    Args:
        levels: The chain.
        order: 1 or 2.
        sde: Whether to use the stochastic form.
        heun: Whether to use "heun" instead of "midpoint".
        ends_by_first_order: Whether the last step is of order 1 whatever `order` is.

    Returns:
        Rows [2S, 8] for order 2, because a chain may begin at any step: see Rows.
    """
    ab, ab_next = levels.ab, levels.ab_next
    b_x, b_x0, sigma = towards(ab, ab_next, 1.0 if sde else 0.0)
    first = _stacked(levels, b_x=b_x, b_x0=b_x0, sigma=sigma)
    if order == 1:
        return Rows(first)
    h = ((ab_next / (1 - ab_next)).log() - (ab / (1 - ab)).log()) / 2
    before = torch.cat([h.new_full((1,), math.inf), h[:-1]])
    exponent = 2 * h if sde else h
    by_slope = ab_next.sqrt() * (1 + torch.expm1(-exponent) / exponent) if heun else b_x0 / 2
    # A step of length 0 comes of a timestep that is there twice. It changes nothing, and neither does what follows
    # from it: DPMSolverMultistepScheduler divides by 0 there.
    usable = (h > 0) & (before > 0) & h.isfinite()
    if ends_by_first_order:
        usable[-1] = False
    share = torch.where(usable, by_slope * h / before, 0.0)
    second = first.clone()
    second[:, 3] += share
    second[:, 4] = -share
    return Rows(torch.cat([second, first]))


def x0_columns(prediction: str, ab: Tensor) -> tuple[Tensor, Tensor]:
    """(a_x, a_out) of x_0 = a_x x + a_out out at each alpha_bar, float64 [S].

    Raises:
        InputError: For "epsilon" where alpha_bar is 0, since x holds nothing of x_0 there.
    """
    if prediction == "epsilon":
        if (ab == 0).any():
            raise InputError(
                "the chain starts from pure noise (rescale_betas_zero_snr), where x_0 cannot be formed from a "
                "prediction of epsilon: use a model that predicts v, or timestep_spacing='leading', which leaves out "
                "the last timestep"
            )
        return ab.rsqrt(), -((1 - ab) / ab).sqrt()
    if prediction == "sample":
        return torch.zeros_like(ab), torch.ones_like(ab)
    return ab.sqrt(), -(1 - ab).sqrt()


def _stacked(
    levels: Levels,
    *,
    b_x: Tensor,
    b_x0: Tensor,
    b_previous: Tensor | None = None,
    sigma: Tensor | None = None,
    spread: Tensor | None = None,
) -> Tensor:
    """The columns of ops.reverse_step, float64 [S, 8]. A column that is None is 0."""
    zero = torch.zeros_like(b_x)
    a_x, a_out = x0_columns(levels.prediction, levels.ab)
    limit = torch.full_like(b_x, levels.limit)
    b_previous, sigma, spread = (zero if column is None else column for column in (b_previous, sigma, spread))
    return torch.stack([a_x, a_out, b_x, b_x0, b_previous, sigma, limit, spread], dim=1)
