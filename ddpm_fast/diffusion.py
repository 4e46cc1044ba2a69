"""The quantities of the papers: q(x_t | x_0), q(x_{t-1} | x_t, x_0), p(x_{t-1} | x_t), the losses and the bound.

The sources are [H] Ho et al. 2020, "Denoising Diffusion Probabilistic Models", and [N] Nichol & Dhariwal 2021,
"Improved DDPM"; the names are theirs. A Schedule says how much noise is added, and an Objective says what the network's
output means. This file applies their tables to tensors. Whatever runs at every training step goes through the fused
ops; the rest is plain torch. loops/likelihood.py sums the bound over the chain.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ddpm_fast import ops
from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.loops.likelihood import BitsPerDim, LikelihoodKeywords, bits_per_dim
from ddpm_fast.noise import NoiseKey
from ddpm_fast.notices import notices
from ddpm_fast.objective import Objective, output_channels
from ddpm_fast.ops.tensors import widen, working_dtype
from ddpm_fast.respacing import TimestepSpec
from ddpm_fast.schedule import Schedule


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0); each tensor has the shape of x_t."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t) and the predicted x_0 that it is formed from; each tensor has the shape of x_t."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_x0: Tensor


class VlbTerms(NamedTuple):
    """Each sample's term of the variational bound at its t, in bits/dim, and its mean squared errors; [N] each."""

    bits_per_dim: Tensor
    mse_x0: Tensor
    mse_eps: Tensor


class GaussianDiffusion:
    """A Schedule joined with an Objective: what the network predicts, its variance and its loss.

    In every method N is the batch size, data is [N, C, ...] with any number of trailing dimensions, and t is int64 [N]
    of indices into the schedule, or one int for all samples. (The network is told `schedule.timesteps[t]`, which
    differs from t if the schedule is respaced.) x_0 lies in [-1, 1], or is uint8 and becomes x/127.5 - 1. With a
    learned variance the network's output is [N, 2C, ...]: the prediction, then the values that set the variance.

    Tables are built when a device first needs them, and are kept there. After that no method waits for the device.
    Capture CUDA graphs after this first use.

    The first batches of float images on the CPU are looked at, and a warning is given if they do not seem to lie in
    [-1, 1]; another if 100 losses with a gradient have met one noise. Each is given once in a process.

    All methods raise InputError for a wrong shape, dtype or device, and for a t outside 0..T-1 if t is on the CPU. On a
    GPU, t is not read back, so torch or the kernel has to deal with such an index.

    Args:
        schedule: The noise schedule.
        prediction: See Objective, as for all that follow.
        variance: How the variance of the reverse step is set.
        loss: Which loss training_losses returns.
        loss_weighting: How a regression loss is weighted over t.
        min_snr_gamma: The largest weight of loss_weighting = "min_snr".
        vlb_weight: The weight of the bound in loss = "hybrid".

    Raises:
        InputError: Where Objective does, and for prediction = "eps" on a schedule that ends in pure noise.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: str = "eps",
        variance: str = "fixed_large",
        loss: str = "simple",
        loss_weighting: str = "none",
        min_snr_gamma: float = 5.0,
        vlb_weight: float = 0.001,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise InputError(f"expected a Schedule, got {type(schedule).__name__}: make one with Schedule.cosine(1000)")
        self.schedule = schedule
        self.objective = Objective(prediction, variance, loss, loss_weighting, min_snr_gamma, vlb_weight)
        self.objective.check_schedule(schedule)
        self._tables: dict[tuple[Any, ...], Tensor] = {}

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return len(self.schedule)

    def table(
        self, name: str, device: torch.device, dtype: torch.dtype = torch.float32, **choices: bool | str
    ) -> Tensor:
        """A table of the schedule or the objective on a device, cast from float64 and kept for later calls.

        Args:
            name: "snr" (Schedule.snr), "q_sample" or "posterior" (Schedule.<name>_table()), or "loss", "hybrid",
                "bound", "x0", "variance" or "log_variance" (Objective.<name>_table(schedule, **choices)).
            device: Where to put it.
            dtype: What to cast it to.
            **choices: Keyword arguments of the Objective's method.
        """
        key = (name, device, dtype, *choices.items())
        if key not in self._tables:
            # A table made in inference mode, while sampling, could not be saved for the backward of a later loss.
            with torch.inference_mode(False):
                if name == "snr":
                    made = self.schedule.snr
                elif name in ("q_sample", "posterior"):
                    made = getattr(self.schedule, f"{name}_table")()
                else:
                    made = getattr(self.objective, f"{name}_table")(self.schedule, **choices)
                self._tables[key] = made.to(device, dtype)
        return self._tables[key]

    def q_sample(
        self, x0: Tensor, t: Tensor | int, noise: "Tensor | NoiseKey", dtype: torch.dtype | None = None
    ) -> Tensor:
        """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) [H eq. 4].

        Args:
            x0: [N, C, ...], in [-1, 1] or uint8.
            t: int64 [N].
            noise: A tensor shaped like x0, or a NoiseKey from which the noise is generated without being stored.
            dtype: Of the result. The default is x0's own dtype, and float32 for uint8.

        Returns:
            x_t, shaped like x0.
        """
        t = self._filled(t, x0=x0)
        notices.see_images(x0, stacklevel=2)
        table = self.table("q_sample", x0.device, working_dtype(x0))
        return ops.q_sample(x0, t, table, noise, dtype=dtype)

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor | int) -> Posterior:
        """q(x_{t-1} | x_t, x_0) [H eq. 6-7]: its mean, variance and log variance.

        It is computed and returned in float32, or in float64 if an input is float64. At t = 0 the variance is 0, and
        the log variance is that of t = 1.
        """
        t = self._filled(t, x_t=x_t)
        self._check(t, x_t=x_t, x0=x0)
        x0, x_t = _promote(x0, x_t)
        return self._q_posterior(x0, x_t, t)

    def p_mean_variance(self, output: Tensor, x_t: Tensor, t: Tensor | int, clip: bool = True) -> PMeanVariance:
        """p(x_{t-1} | x_t), given the network's output at (x_t, t) [H eq. 11, N eq. 15].

        It is computed and returned in float32, or in float64 if an input is float64.

        Args:
            output: The network's output, [N, C or 2C, ...].
            x_t: [N, C, ...].
            t: int64 [N].
            clip: Whether to limit the predicted x_0 to [-1, 1] before the mean is formed from it.
        """
        t = self._filled(t, x_t=x_t)
        self._check(t, x_t=x_t, output=output)
        output, x_t = _promote(output, x_t)
        device, dtype, channels = x_t.device, x_t.dtype, x_t.shape[1]
        a_x, a_out = _rows(self.table("x0", device, dtype), t, x_t)
        pred_x0 = a_x * x_t + a_out * output[:, :channels]
        if clip:
            pred_x0 = pred_x0.clamp(-1, 1)
        if self.objective.learned:
            base, slope = _rows(self.table("log_variance", device, dtype), t, x_t)
            log_variance = base + slope * output[:, channels:]
            variance = log_variance.exp()
        else:
            rows = _rows(self.table("variance", device, dtype), t, x_t)
            variance, log_variance = (column.expand(x_t.shape) for column in rows)
        return PMeanVariance(self._q_posterior(pred_x0, x_t, t).mean, variance, log_variance, pred_x0)

    def training_losses(self, output: Tensor, x0: Tensor, t: Tensor | int, noise: "Tensor | NoiseKey") -> Tensor:
        """Each sample's loss, for the network's output at (q_sample(x0, t, noise), t) [H eq. 14, N eq. 16].

        The objective says which loss it is. Where the loss contains the bound, the predicted x_0 is not clipped, as in
        the papers' code.

        Args:
            output: The network's output, [N, C or 2C, ...].
            x0: [N, C, ...], in [-1, 1] or uint8.
            t: int64 [N].
            noise: What q_sample was given.

        Returns:
            [N], float32, or float64 for a float64 output. It is differentiable with respect to output.
        """
        self._check_groups(output, "x0", x0)
        t = self._filled(t, x0=x0)
        notices.see_images(x0, stacklevel=2)
        if output.requires_grad and torch.is_grad_enabled():
            notices.see_noise(noise, stacklevel=2)
        objective, dtype = self.objective, working_dtype(output)
        if objective.is_bound:
            table = self.table("bound", x0.device, dtype, clip=False)
            bits = ops.vlb_terms(output, x0, t, table, noise).bits_per_dim
            return bits * self.num_timesteps if objective.loss == "rescaled_vlb" else bits
        if objective.learned:
            return ops.hybrid_loss(output, x0, t, self.table("hybrid", x0.device, dtype), noise)
        return ops.diffusion_loss(output, x0, t, self.table("loss", x0.device, dtype), noise)

    def vlb_terms(
        self,
        output: Tensor,
        x0: Tensor,
        t: Tensor | int,
        noise: "Tensor | NoiseKey",
        clip: bool = True,
        decoder: str = "paper",
    ) -> VlbTerms:
        """The bound's term at each sample's t, for the network's output at (q_sample(x0, t, noise), t) [H eq. 5, 13].

        The term is L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and L_0 = -log p(x_0 | x_1) at t = 0.

        Args:
            output: The network's output, [N, C or 2C, ...].
            x0: [N, C, ...], in [-1, 1] or uint8.
            t: int64 [N].
            noise: What q_sample was given.
            clip: Whether to limit the predicted x_0 to [-1, 1] first.
            decoder: How L_0 is computed: "paper" by the approximation of the Gaussian's CDF that the published numbers
                rest on, "exact" by the CDF itself.

        Returns:
            The terms in bits/dim, and the mean squared errors of the predicted x_0 and of the eps that follows from it.
            All are [N], float32, or float64 for a float64 output. bits_per_dim is differentiable with respect to
            output.
        """
        self._check_groups(output, "x0", x0)
        t = self._filled(t, x0=x0)
        dtype = working_dtype(output)
        table = self.table("bound", x0.device, dtype, clip=clip, decoder=decoder)
        bits, mse_x0 = ops.vlb_terms(output, x0, t, table, noise)
        # eps_hat - eps = -(x0_hat - x_0) sqrt(alpha_bar / (1 - alpha_bar)), because both pairs give the same x_t.
        return VlbTerms(bits, mse_x0, mse_x0 * self.table("snr", x0.device, dtype)[t])

    def prior_bits_per_dim(self, x0: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I)) of each sample, in bits/dim [H eq. 5]: how much of x_0 is left at the end.

        Returns:
            [N], float32, or float64 for a float64 x0. It is 0 for a zero-terminal-SNR schedule.
        """
        self._check(None, x0=x0)
        (x,) = _promote(x0)
        alpha_bar = float(self.schedule.alphas_cumprod[-1])
        # 1/2 (-1 - log(1 - ab) + (1 - ab) + ab x_0^2). Without the last term this is ab^2 / 4 + ab^3 / 6 + ...; for a
        # small ab the series is used, because the three terms before it would cancel.
        small = alpha_bar**2 * (0.25 + alpha_bar / 6)
        constant = 0.5 * (-alpha_bar - math.log1p(-alpha_bar)) if alpha_bar > 1e-4 else small
        return (constant + 0.5 * alpha_bar * x.flatten(1).square().mean(1)) / math.log(2)

    def bits_per_dim(self, model: Callable[..., Any], x0: Tensor, **options: Unpack[LikelihoodKeywords]) -> BitsPerDim:
        """The variational bound on -log p(x_0) of each image in bits/dim, with its parts.

        The options are those of loops.likelihood.LikelihoodOptions: steps, labels, seed, first_sample_id, clip,
        decoder, on_step.
        """
        return bits_per_dim(self, model, x0, **options)

    def respace(self, spec: TimestepSpec) -> "GaussianDiffusion":
        """The same diffusion over fewer timesteps: see Schedule.respace."""
        return GaussianDiffusion(self.schedule.respace(spec), **self.objective.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types: {"schedule": {...}, "prediction": ..., "variance": ..., "loss": ..., ...}."""
        return {"schedule": self.schedule.to_dict(), **self.objective.to_dict()}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "GaussianDiffusion":
        """The diffusion that `to_dict` described.

        Raises:
            InputError: If d does not describe one.
        """
        expected = {"schedule", "prediction", "variance", "loss"}
        optional = set(Objective().to_dict()) - expected  # files that are older than these fields lack them
        if not isinstance(d, dict) or not expected <= set(d) <= expected | optional:
            got = sorted(map(str, d)) if isinstance(d, dict) else type(d).__name__
            raise InputError(
                f"a diffusion is described by a dict with the keys {sorted(expected)} and, if they are not the "
                f"defaults, {sorted(optional)}; got {got}"
            )
        options = {name: value for name, value in d.items() if name != "schedule"}
        return cls(Schedule.from_dict(d["schedule"]), **options)

    def __repr__(self) -> str:
        o = self.objective
        return f"GaussianDiffusion({self.schedule.name}, {o.prediction}, {o.variance}, {o.loss})"

    def _q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Posterior:
        table = self.table("posterior", x_t.device, x_t.dtype)
        coef1, coef2, variance, log_variance = _rows(table, t, x_t)
        return Posterior(coef1 * x0 + coef2 * x_t, variance.expand(x_t.shape), log_variance.expand(x_t.shape))

    def _filled(self, t: Tensor | int, **data: Tensor) -> Tensor:
        """t, or an int64 [N] of the one integer that was given for all N samples of the data."""
        ((name, x),) = data.items()
        if not isinstance(x, Tensor):
            raise InputError(f"{name} is a {type(x).__name__}: expected a tensor")
        if isinstance(t, Tensor):
            return t
        if x.ndim < 1:
            raise InputError(f"{name} has shape []: expected [N, C, ...]")
        if not hasattr(t, "__index__"):
            raise InputError(
                f"t is {t!r:.200}, a {type(t).__name__}: expected an int64 tensor [{len(x)}], or one int for all "
                "samples"
            )
        t = check_integer("t", t, 0, self.num_timesteps - 1)
        return torch.full((len(x),), t, dtype=torch.int64, device=x.device)

    def _check(self, t: Tensor | None, **data: Tensor) -> None:
        """Check tensors that belong to one batch.

        Args:
            t: Must be int64 [N] on the device of the data; None if there is no t.
            **data: The tensors by name. Each must have the shape and device of the first. The one called "output" must
                have as many groups of channels as the variance asks for.
        """
        named = data if t is None else {"t": t, **data}
        for name, x in named.items():
            if not isinstance(x, Tensor):
                raise InputError(f"{name} is a {type(x).__name__}: expected a tensor")
        first_name, first = next(iter(data.items()))
        if first.ndim < 2:
            raise InputError(f"{first_name} has shape {list(first.shape)}: expected [N, C, ...]")
        for name, x in data.items():
            if x.layout is not torch.strided:
                raise InputError(f"{name} is a {x.layout} tensor: expected a dense one, call .to_dense()")
            if not (x.is_floating_point() or (name == "x0" and x.dtype == torch.uint8)):
                expected = "a floating dtype or uint8" if name == "x0" else "a floating dtype"
                raise InputError(f"{name} is {x.dtype}: expected {expected}")
            if name == "output":
                self._check_groups(x, first_name, first)
            elif x.shape != first.shape:
                raise InputError(
                    f"{name} has shape {list(x.shape)}: expected the shape of {first_name}, {list(first.shape)}"
                )
        for name, x in named.items():
            if x.device != first.device:
                raise InputError(
                    f"{name} is on {x.device} but {first_name} on {first.device}: move one to the other's device"
                )
        if t is not None:
            self._check_t(t, first_name, len(first))

    def _check_t(self, t: Tensor, first_name: str, n: int) -> None:
        T = self.num_timesteps
        if t.dtype != torch.int64 or t.shape != (n,):
            raise InputError(
                f"t is {t.dtype} {list(t.shape)}: expected int64 [{n}], one index per sample of {first_name}"
            )
        # Reading values back from a GPU would wait for it. Under a compiler it would break the graph.
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ((t < 0) | (t >= T)).nonzero()
            if len(wrong):
                i = int(wrong[0])
                raise InputError(
                    f"t[{i}] = {int(t[i])} is outside 0..{T - 1} ({len(wrong)} of {n} values are): t must be an index "
                    f"into this schedule's {T} steps"
                )

    def _check_groups(self, output: Tensor, name: str, image: Tensor) -> None:
        """The output must have the image's shape, or twice its channels if the variance is learned."""
        for what, x in (("output", output), (name, image)):
            if not isinstance(x, Tensor):
                raise InputError(f"{what} is a {type(x).__name__}: expected a tensor")
        if output.ndim < 2 or image.ndim < 2:
            raise InputError(f"output has shape {list(output.shape)}, {name} {list(image.shape)}: expected [N, C, ...]")
        shape = list(image.shape)
        learned = self.objective.learned
        expected = [shape[0], output_channels(shape[1], learned), *shape[2:]]
        other = [shape[0], output_channels(shape[1], not learned), *shape[2:]]
        if list(output.shape) == expected:
            return
        advice = ""
        if list(output.shape) == other and learned:
            advice = (
                ". A learned variance needs a second group of channels: build the network with learned_variance=True, "
                "or choose variance = 'fixed_small' or 'fixed_large'"
            )
        elif list(output.shape) == other:
            advice = (
                ". A network of twice the channels learns its variance: choose variance = 'learned_range' "
                "(or 'learned')"
            )
        raise InputError(
            f"output has shape {list(output.shape)}: expected {expected}, because {name} has {shape} and variance is "
            f"{self.objective.variance!r}{advice}"
        )


def _rows(table: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The columns of the table at t, each [N, 1, ...] so that it broadcasts against `like`."""
    return table.index_select(0, t).view(len(t), table.shape[1], *[1] * (like.ndim - 1)).unbind(1)


def _promote(*data: Tensor) -> list[Tensor]:
    """All tensors in float64 if one of them is, else in float32. uint8 becomes x/127.5 - 1."""
    dtype = working_dtype(*data)
    return [widen(x, dtype) for x in data]
