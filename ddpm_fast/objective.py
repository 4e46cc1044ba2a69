"""The training objective over t: what the network predicts, how the reverse variance is set, how the error is weighted.

The sources are [H] Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (eps, the two fixed variances, L_simple,
the variational bound); [N] Nichol & Dhariwal 2021, "Improved DDPM" (learned variances, L_hybrid); [SH] Salimans & Ho
2022, "Progressive Distillation for Fast Sampling of Diffusion Models" (v, truncated SNR); and [HA] Hang et al. 2023,
"Efficient Diffusion Training via Min-SNR Weighting". Code that adds noise, computes losses or samples reads these
tables and does not know the names of the choices. A new choice is one more entry in this file.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.errors import InputError, check_number
from ddpm_fast.schedule import Schedule

Columns = Callable[[Schedule], tuple[Tensor, ...]]


class Prediction(NamedTuple):
    """One meaning of the network's output, as columns over t.

    Attributes:
        target: Gives (c_x0, c_noise): the output should become c_x0 * x_0 + c_noise * eps.
        x0: Gives (a_x, a_out): x_0 = a_x * x_t + a_out * output.
    """

    target: Columns
    x0: Columns


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
    # v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 [SH app. D]. (x_t, v) is a rotation of (x_0, eps), so x_0
    # follows without a division.
    "v": Prediction(
        target=lambda s: (-s.sqrt_one_minus_alphas_cumprod, s.sqrt_alphas_cumprod),
        x0=lambda s: (s.sqrt_alphas_cumprod, -s.sqrt_one_minus_alphas_cumprod),
    ),
}


def _fixed_small(s: Schedule) -> tuple[Tensor, Tensor]:
    return s.posterior_variance, s.posterior_log_variance_clipped


def _fixed_large(s: Schedule) -> tuple[Tensor, Tensor]:
    # At t = 0 this is beta~ at t = 1 instead of beta_0, as in the papers' code, for a better likelihood of x_0.
    variance = torch.cat([s.posterior_log_variance_clipped[:1].exp(), s.betas[1:]])
    return variance, variance.log()


def _learned(s: Schedule) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(s.betas), torch.ones_like(s.betas)


def _learned_range(s: Schedule) -> tuple[Tensor, Tensor]:
    # log Sigma = f log beta + (1 - f) log beta~ with f = (v + 1)/2 [N eq. 15]. At t = 0 the lower end is that of t = 1.
    low, high = s.posterior_log_variance_clipped, s.betas.log()
    return (high + low) / 2, (high - low) / 2


# (variance, log variance) of p(x_{t-1} | x_t): the two extremes of [H sec. 3.2].
FIXED_VARIANCES = {"fixed_small": _fixed_small, "fixed_large": _fixed_large}
# (base, slope) of a log variance that is base + slope * v, where v is the network's second group of channels.
LEARNED_VARIANCES = {"learned": _learned, "learned_range": _learned_range}
VARIANCES = (*FIXED_VARIANCES, *LEARNED_VARIANCES)

# "simple" and "hybrid" are regressions on the network's target. "vlb" and "rescaled_vlb" are the bound itself.
LOSSES = ("simple", "hybrid", "vlb", "rescaled_vlb")

# The weight of |x_0 - predicted x_0|^2 that each weighting means, as a function of the SNR and min_snr_gamma.
WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor] | None] = {
    "none": None,
    "snr": lambda snr, gamma: snr,
    "truncated_snr": lambda snr, gamma: snr.clamp(min=1.0),  # [SH sec. 4]
    "min_snr": lambda snr, gamma: snr.clamp(max=gamma),  # [HA eq. 9]
}

# The numbers of csrc/bound.h. There 0 means the KL divergence, which is the term of every timestep but the first.
DECODERS = {"paper": 1.0, "exact": 2.0}


def output_channels(channels: int, learned: bool) -> int:
    """The channels of a network's output for images of `channels` channels: twice as many where the variance is
    learned, the prediction and then what sets the variance."""
    return 2 * channels if learned else channels


@dataclass(frozen=True)
class Objective:
    """A choice of prediction, variance, loss and weighting.

    Attributes:
        prediction: "eps", "x0" or "v".
        variance: How the variance of the reverse step is set:

            - "fixed_small": beta~_t.
            - "fixed_large": beta_t.
            - "learned": its logarithm is the network's second group of C channels.
            - "learned_range": that group interpolates between the logarithms of the two fixed variances.

        loss: The loss of each sample. MSE is the mean of (output - target)^2 over the sample's elements:

            - "simple": weight_t * MSE [H eq. 14]. With a learned variance it is refused, because nothing would train
              the variance.
            - "hybrid": weight_t * MSE + vlb_weight * T * (the bound's term at t in bits/dim, with the mean detached)
              [N eq. 16]. With the default vlb_weight of 0.001 it is OpenAI's `rescaled_mse`, and with 1/T their `mse`
              for learned variances. With a fixed variance the second part trains nothing, and hybrid equals simple.
            - "vlb": the bound's term at t, in bits/dim (OpenAI's `kl`). Gradients reach the mean and the variance.
            - "rescaled_vlb": T times "vlb", which is an estimate of the whole bound (OpenAI's `rescaled_kl`).

        loss_weighting: How the MSE is weighted, as a weight of the squared error of the predicted x_0:

            - "none": the MSE of the output is not weighted.
            - "snr": SNR |x_0 - x0_hat|^2 = |eps - eps_hat|^2, whatever is predicted.
            - "truncated_snr": max(SNR, 1) |x_0 - x0_hat|^2.
            - "min_snr": min(SNR, min_snr_gamma) |x_0 - x0_hat|^2.

            As weights of the output's own error these are divided by SNR for eps and by SNR + 1 for v, as in
            lucidrains' code (whose default without min-SNR is "snr") and in diffusers' scripts (whose default is
            "none"). For x0 "snr" and "truncated_snr" are unbounded: the SNR is 24,221 at t = 0 of cosine-1000.
        min_snr_gamma: The largest weight of "min_snr".
        vlb_weight: The weight of the bound in "hybrid".

    All tables are float64 on the CPU; cast them last.

    Raises:
        InputError: If a name does not exist, a combination has no meaning, or min_snr_gamma or vlb_weight is not a
            positive number.
    """

    prediction: str = "eps"
    variance: str = "fixed_large"
    loss: str = "simple"
    loss_weighting: str = "none"
    min_snr_gamma: float = 5.0
    vlb_weight: float = 0.001

    def __post_init__(self) -> None:
        names: dict[str, Iterable[str]] = {
            "prediction": PREDICTIONS,
            "variance": VARIANCES,
            "loss": LOSSES,
            "loss_weighting": WEIGHTINGS,
        }
        for what, choices in names.items():
            value = getattr(self, what)
            if value not in list(choices):
                raise InputError(
                    f"{what} = {value!r:.200} does not exist: choose one of {', '.join(map(repr, choices))}"
                )
        for what in ("min_snr_gamma", "vlb_weight"):
            value = check_number(what, getattr(self, what), lambda v: 0 < v < math.inf, "a positive number")
            object.__setattr__(self, what, value)
        if self.learned and self.loss == "simple":
            raise InputError(
                f"only the variational bound trains variance = {self.variance!r}, and loss = 'simple' does not contain "
                "it: choose loss = 'hybrid' (or 'vlb', 'rescaled_vlb')"
            )
        if self.loss_weighting != "none" and self.is_bound:
            raise InputError(
                f"loss_weighting = {self.loss_weighting!r} is for a regression loss, but loss = {self.loss!r} is the "
                "variational bound, which has its own weights: choose loss_weighting = 'none', or loss = 'simple' or "
                "'hybrid'"
            )

    @property
    def learned(self) -> bool:
        """Whether the network's output has 2C channels: the prediction, then the values that set the variance."""
        return self.variance in LEARNED_VARIANCES

    @property
    def is_bound(self) -> bool:
        """Whether the loss is the variational bound itself rather than a regression."""
        return self.loss in ("vlb", "rescaled_vlb")

    def check_schedule(self, schedule: Schedule) -> None:
        """Check that the schedule suits the prediction.

        Raises:
            InputError: For eps on a schedule that ends in pure noise, where x_0 would be 0/0.
        """
        if schedule.has_zero_terminal_snr and self.prediction == "eps":
            raise InputError(
                "prediction = 'eps' cannot be used with a zero-terminal-SNR schedule: at its last step x_t is pure "
                "noise, and forming x_0 would divide by 0. Choose prediction = 'v' (Lin et al. 2023) or 'x0'"
            )

    def loss_table(self, schedule: Schedule) -> Tensor:
        """The table of ops.diffusion_loss: float64 [T, 3], columns (c_x0, c_noise, weight).

        The loss is weight * mean((output - (c_x0 * x_0 + c_noise * eps))^2). weight comes from loss_weighting and is 1
        for "none", which for eps is L_simple [H eq. 14].

        For a loop of one's own: ops.diffusion_loss(output, x0, t, objective.loss_table(schedule).float(), noise).
        """
        return torch.stack([*PREDICTIONS[self.prediction].target(schedule), self._weight(schedule)], 1)

    def bound_table(self, schedule: Schedule, clip: bool = True, decoder: str = "paper") -> Tensor:
        """The table of ops.vlb_terms, the bound's term at each t: float64 [T, 9], with the columns

            c_x0, c_noise     the output's target, as in loss_table
            a_out             predicted x_0 - x_0 = a_out * (output - target)
            pull              (model mean - posterior mean) / sqrt(beta~) = pull * (predicted x_0 - x_0) [H eq. 7]
            log_beta          log beta~ of the posterior (Schedule.posterior_log_variance_clipped)
            delta, slope      p's log variance is log_beta + delta + slope * v: see log_variance_table
            decoder           0: the KL divergence [H eq. 5]. At t = 0, -log p(x_0 | x_1) [H eq. 13], as 1: with the
            tanh
                              approximation of the Gaussian's CDF that the published numbers rest on, or 2: with the
                              exact CDF
            clip              the predicted x_0 is limited to [-clip, clip]; infinity for clip=False

        Args:
            schedule: The noise schedule.
            clip: Whether to limit the predicted x_0 to [-1, 1].
            decoder: "paper" (1 above) or "exact" (2 above).

        Raises:
            InputError: For another decoder.
        """
        if decoder not in DECODERS:
            raise InputError(f"decoder = {decoder!r} does not exist: choose one of {', '.join(map(repr, DECODERS))}")
        c_x0, c_noise, _ = self.loss_table(schedule).unbind(1)
        kind = torch.zeros_like(c_x0)
        kind[0] = DECODERS[decoder]
        log_beta = schedule.posterior_log_variance_clipped
        base, slope = self.log_variance_table(schedule).unbind(1)
        a_out = self.x0_table(schedule)[:, 1]
        pull = schedule.posterior_mean_coef1 * (-0.5 * log_beta).exp()
        limit = torch.full_like(kind, 1.0 if clip else math.inf)
        return torch.stack([c_x0, c_noise, a_out, pull, log_beta, base - log_beta, slope, kind, limit], 1)

    def hybrid_table(self, schedule: Schedule) -> Tensor:
        """The table of ops.hybrid_loss: float64 [T, 11].

        The first nine columns are those of bound_table, with x_0 unclipped and the paper's decoder. Then follow the
        weight of the MSE and vlb_weight * T, the weight of the bound's term in bits/dim.
        """
        weight = self._weight(schedule)
        vlb_weight = torch.full_like(weight, self.vlb_weight * len(schedule))
        return torch.cat([self.bound_table(schedule, clip=False), torch.stack([weight, vlb_weight], 1)], 1)

    def x0_table(self, schedule: Schedule) -> Tensor:
        """How x_0 follows from the output: float64 [T, 2], columns (a_x, a_out), x_0 = a_x * x_t + a_out * output.

        Raises:
            InputError: Where check_schedule does.
        """
        self.check_schedule(schedule)
        return torch.stack(PREDICTIONS[self.prediction].x0(schedule), 1)

    def variance_table(self, schedule: Schedule) -> Tensor:
        """The fixed variance of p(x_{t-1} | x_t) [H sec. 3.2]: float64 [T, 2], columns (variance, log variance).

        fixed_small is beta~_t. At t = 0 that is 0, and its logarithm has the value of t = 1. fixed_large is beta_t; at
        t = 0 both columns have the value of beta~ at t = 1. A chain of one timestep has log beta_0 at t = 0.
        """
        return torch.stack(FIXED_VARIANCES[self.variance](schedule), 1)

    def log_variance_table(self, schedule: Schedule) -> Tensor:
        """The log variance of p(x_{t-1} | x_t) as base + slope * v: float64 [T, 2], columns (base, slope) [N eq. 15].

        v is the second group of the output's channels. slope is 0 where the variance is fixed.
        """
        if self.learned:
            return torch.stack(LEARNED_VARIANCES[self.variance](schedule), 1)
        log_variance = self.variance_table(schedule)[:, 1]
        return torch.stack([log_variance, torch.zeros_like(log_variance)], 1)

    def _weight(self, schedule: Schedule) -> Tensor:
        weighting = WEIGHTINGS[self.loss_weighting]
        if weighting is None:
            return torch.ones_like(schedule.betas)
        # |x_0 - x0_hat|^2 is a_out^2 times the output's own squared error. For eps, a_out^2 is 1/SNR.
        return weighting(schedule.snr, self.min_snr_gamma) * self.x0_table(schedule)[:, 1] ** 2

    def to_dict(self) -> dict[str, Any]:
        """The fields as {"prediction": ..., "variance": ..., ...}. Objective(**d) makes the objective again."""
        return asdict(self)
