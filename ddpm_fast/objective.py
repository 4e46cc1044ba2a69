"""What the network predicts, how the reverse step's variance is set, how the error is weighted, over t.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (eps, the two fixed variances, L_simple, the bound); Nichol
& Dhariwal 2021, "Improved DDPM" (learned variances, L_hybrid); Salimans & Ho 2022, "Progressive Distillation for Fast
Sampling of Diffusion Models" (v, truncated SNR); Hang et al. 2023, "Efficient Diffusion Training via Min-SNR
Weighting". Code that noises, scores or samples reads these tables and knows none of the names below; a new choice is
one more entry here.
"""

import math
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
    "x0": Prediction(
        target=lambda s: (torch.ones_like(s.betas), torch.zeros_like(s.betas)),
        x0=lambda s: (torch.zeros_like(s.betas), torch.ones_like(s.betas)),
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


def _learned(s: Schedule) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(s.betas), torch.ones_like(s.betas)


def _learned_range(s: Schedule) -> tuple[Tensor, Tensor]:
    # log Sigma = f log beta + (1 - f) log beta~, f = (v + 1)/2 [N eq. 15]. At t = 0 the lower end is that of t = 1.
    low, high = s.posterior_log_variance_clipped, s.betas.log()
    return (high + low) / 2, (high - low) / 2


# (variance, log variance) of p(x_{t-1} | x_t): the two extremes of [H sec. 3.2].
FIXED_VARIANCES = {"fixed_small": _fixed_small, "fixed_large": _fixed_large}
# (base, slope) of a log variance that is base + slope * v, with v the network's second group of channels.
LEARNED_VARIANCES = {"learned": _learned, "learned_range": _learned_range}
VARIANCES = (*FIXED_VARIANCES, *LEARNED_VARIANCES)

# simple and hybrid regress what the network predicts; vlb and rescaled_vlb are the bound itself.
LOSSES = ("simple", "hybrid", "vlb", "rescaled_vlb")

# The weight of |x_0 - predicted x_0|^2 that a weighting stands for, from the SNR and gamma.
WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor] | None] = {
    "none": None,
    "snr": lambda snr, gamma: snr,
    "truncated_snr": lambda snr, gamma: snr.clamp(min=1.0),  # [SH sec. 4]
    "min_snr": lambda snr, gamma: snr.clamp(max=gamma),  # [HA eq. 9]
}

DECODERS = {"paper": 1.0, "exact": 2.0}  # as csrc/bound.h numbers them; 0 is the KL divergence of every other step


def output_channels(channels: int, learned: bool) -> int:
    """The channels of a network's output for images of `channels` channels: twice as many where the variance is
    learned, the prediction and then what sets the variance."""
    return 2 * channels if learned else channels


@dataclass(frozen=True)
class Objective:
    """A choice of prediction, variance, loss and weighting. Tables are float64 on the CPU: cast them last.

    prediction: "eps", "x0" or "v". variance: "fixed_small" (beta~_t), "fixed_large" (beta_t), "learned" (its logarithm
    is the network's second group of C channels) or "learned_range" (that group interpolates between the two fixed
    logarithms). loss, per sample, with MSE the mean over elements of (output - target)^2:

    - "simple": weight_t * MSE [H eq. 14]. With a learned variance it is refused: nothing would train the variance.
    - "hybrid": weight_t * MSE + vlb_weight * T * (the bound's term at t in bits/dim, the mean detached) [N eq. 16];
      with the default weight 0.001 it is OpenAI's `rescaled_mse`, with vlb_weight 1/T their `mse` for learned
      variances. With a fixed variance nothing is left to learn of the second part, and hybrid is simple.
    - "vlb": the bound's term at t, in bits/dim (OpenAI's `kl`); "rescaled_vlb": times T, an estimate of the bound
      (their `rescaled_kl`). Gradients reach mean and variance.

    loss_weighting, of the MSE: "none"; "snr": that of |eps - eps_hat|^2 = SNR |x_0 - x0_hat|^2, whatever is predicted;
    "truncated_snr": max(SNR, 1) |x_0 - x0_hat|^2; "min_snr": min(SNR, min_snr_gamma) |x_0 - x0_hat|^2. In terms of the
    output these are divided by SNR for eps and by SNR + 1 for v, as in lucidrains' code (whose default, without
    min-SNR, is "snr") and in diffusers' scripts (where it is "none"). For x0 the first two are unbounded: the SNR is
    24,221 at t = 0 of cosine-1000.

    Raises InputError for a name that does not exist, a combination that means nothing, and a gamma or vlb_weight that
    is no positive number.
    """

    prediction: str = "eps"
    variance: str = "fixed_large"
    loss: str = "simple"
    loss_weighting: str = "none"
    min_snr_gamma: float = 5.0
    vlb_weight: float = 0.001

    def __post_init__(self):
        for what, choices in (
            *(("prediction", PREDICTIONS), ("variance", VARIANCES), ("loss", LOSSES)),
            ("loss_weighting", WEIGHTINGS),
        ):
            value = getattr(self, what)
            if value not in list(choices):
                raise InputError(f"{what} = {value!r} does not exist: choose one of {', '.join(map(repr, choices))}")
        for what in ("min_snr_gamma", "vlb_weight"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{what} = {value!r}: expected a positive number")
        if self.learned and self.loss == "simple":
            raise InputError(
                f"variance = {self.variance!r} is trained by the bound, and loss = 'simple' has nothing of it: choose "
                "loss = 'hybrid' (or 'vlb', 'rescaled_vlb')"
            )
        if self.loss_weighting != "none" and self.is_bound:
            raise InputError(
                f"loss_weighting = {self.loss_weighting!r} weighs a regression loss, and loss = {self.loss!r} is the "
                "bound, whose weights are given: choose loss_weighting = 'none', or loss = 'simple' or 'hybrid'"
            )

    @property
    def learned(self) -> bool:
        """Whether the network's output has 2C channels: the prediction, then what sets the variance."""
        return self.variance in LEARNED_VARIANCES

    @property
    def is_bound(self) -> bool:
        """Whether the loss is the bound itself rather than a regression."""
        return self.loss in ("vlb", "rescaled_vlb")

    def check_schedule(self, schedule: Schedule) -> None:
        """Raises InputError for eps on a schedule that ends without signal: x_0 would be 0/0 there."""
        if schedule.has_zero_terminal_snr and self.prediction == "eps":
            raise InputError(
                "prediction = 'eps' cannot be used with a zero-terminal-SNR schedule: at its last step x_t is noise "
                "alone, and x_0 would be divided by 0. Choose prediction = 'v' (Lin et al. 2023) or 'x0'"
            )

    def loss_table(self, schedule: Schedule) -> Tensor:
        """float64 [T, 3], columns (c_x0, c_noise, weight): ops.diffusion_loss, weight * mean((output - (c_x0 * x_0 +
        c_noise * eps))^2). weight is loss_weighting's, 1 for "none", which with eps is L_simple [H eq. 14]."""
        return torch.stack([*PREDICTIONS[self.prediction].target(schedule), self._weight(schedule)], 1)

    def bound_table(self, schedule: Schedule, clip: bool = True, decoder: str = "paper") -> Tensor:
        """float64 [T, 9]: ops.vlb_terms, the bound's term at each t. Columns:

        c_x0, c_noise     the output's target, as in loss_table
        a_out             predicted x_0 - x_0 = a_out * (output - target)
        pull              (model mean - posterior mean) / sqrt(beta~) = pull * (predicted x_0 - x_0) [H eq. 7]
        log_beta          log beta~ of the posterior (Schedule.posterior_log_variance_clipped)
        delta, slope      p's log variance is log_beta + delta + slope * v: see log_variance_table
        decoder           0: the KL divergence [H eq. 5]; at t = 0 -log p(x_0 | x_1) [H eq. 13], 1: with the tanh
                          approximation of the normal's CDF that the published numbers rest on, 2: with the CDF itself
        clip              the predicted x_0 is held to [-clip, clip]; infinity for clip=False

        Raises InputError for a decoder other than "paper" and "exact".
        """
        if decoder not in DECODERS:
            raise InputError(f"decoder = {decoder!r} does not exist: choose one of {', '.join(map(repr, DECODERS))}")
        c_x0, c_noise, _ = self.loss_table(schedule).unbind(1)
        kind = torch.zeros_like(c_x0)
        kind[0] = DECODERS[decoder]
        log_beta = schedule.posterior_log_variance_clipped
        base, slope = self.log_variance_table(schedule).unbind(1)
        columns = [
            *(c_x0, c_noise, self.x0_table(schedule)[:, 1]),
            *(schedule.posterior_mean_coef1 * (-0.5 * log_beta).exp(), log_beta, base - log_beta, slope),
            *(kind, torch.full_like(kind, 1.0 if clip else math.inf)),
        ]
        return torch.stack(columns, 1)

    def hybrid_table(self, schedule: Schedule) -> Tensor:
        """float64 [T, 11]: ops.hybrid_loss. bound_table's columns (x_0 unclipped, the paper's decoder), then the
        weights of the MSE and of the bound's term in bits/dim, vlb_weight * T."""
        weight = self._weight(schedule)
        vlb_weight = torch.full_like(weight, self.vlb_weight * len(schedule))
        return torch.cat([self.bound_table(schedule, clip=False), torch.stack([weight, vlb_weight], 1)], 1)

    def x0_table(self, schedule: Schedule) -> Tensor:
        """float64 [T, 2], columns (a_x, a_out): the output's x_0 is a_x * x_t + a_out * output. Raises InputError as
        check_schedule does."""
        self.check_schedule(schedule)
        return torch.stack(PREDICTIONS[self.prediction].x0(schedule), 1)

    def variance_table(self, schedule: Schedule) -> Tensor:
        """float64 [T, 2], columns (variance, log variance) of p(x_{t-1} | x_t) [H sec. 3.2], where it is fixed.

        fixed_small is beta~_t: 0 at t = 0, with beta~ at t = 1 in the logarithm. fixed_large is beta_t, with
        beta~ at t = 1 for t = 0 in both columns. A chain of one step has log beta_0 at t = 0.
        """
        return torch.stack(FIXED_VARIANCES[self.variance](schedule), 1)

    def log_variance_table(self, schedule: Schedule) -> Tensor:
        """float64 [T, 2], columns (base, slope): p's log variance is base + slope * v, with v the second group of the
        output's channels [N eq. 15]; slope is 0 where the variance is fixed."""
        if self.learned:
            return torch.stack(LEARNED_VARIANCES[self.variance](schedule), 1)
        log_variance = self.variance_table(schedule)[:, 1]
        return torch.stack([log_variance, torch.zeros_like(log_variance)], 1)

    def _weight(self, schedule: Schedule) -> Tensor:
        weighting = WEIGHTINGS[self.loss_weighting]
        if weighting is None:
            return torch.ones_like(schedule.betas)
        # From |x_0 - x0_hat|^2 to the output's own error: a_out^2, which for eps is 1/SNR.
        return weighting(schedule.snr, self.min_snr_gamma) * self.x0_table(schedule)[:, 1] ** 2

    def to_dict(self) -> dict:
        """{"prediction": ..., "variance": ..., ...}, from which Objective(**d) is made again."""
        return asdict(self)
