"""What the papers ask of a diffusion: q(x_t | x_0), q(x_{t-1} | x_t, x_0), p(x_{t-1} | x_t), the loss.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", in that paper's names. A Schedule says how much
noise is added, an Objective what the network's output means; this file joins their tables with tensors. What
runs at every training step goes through the fused ops; the rest is plain torch.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.errors import InputError
from ddpm_fast.objective import Objective
from ddpm_fast.schedule import Schedule

if TYPE_CHECKING:
    from ddpm_fast.noise import NoiseKey


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0), each shaped like x_t."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t) and the x_0 it rests on, each shaped like x_t."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_x0: Tensor


class DeviceTables(NamedTuple):
    """The tables of a diffusion on one device in one dtype; rows are indexed by t."""

    q_sample: Tensor  # [T, 2]
    loss: Tensor  # [T, 3]
    x0: Tensor  # [T, 2]
    posterior: Tensor  # [T, 4]
    variance: Tensor  # [T, 2]


class GaussianDiffusion:
    """A Schedule bound to what the network predicts, its variance and its loss (the choices: see Objective).

    In every method N is the batch, data is [N, C, ...] with any number of trailing dimensions, and t is int64
    [N] of indices into the schedule (a respaced schedule's network is told `schedule.timesteps[t]`). x_0 lies
    in [-1, 1], or is uint8 and becomes x/127.5 - 1. Tables are built on the first use on a device and kept
    there, after which nothing waits for the device; capture CUDA graphs after that first use.

    Methods raise InputError for a wrong shape, dtype or device, and for t outside 0..T-1 when t is on the CPU
    (on a GPU t is not read back, and an index outside is torch's or the kernel's to answer).
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: str = "eps",
        variance: str = "fixed_large",
        loss: str = "simple",
    ):
        if not isinstance(schedule, Schedule):
            raise InputError(f"expected a Schedule, got {type(schedule).__name__}: make one with Schedule.cosine(1000)")
        self.schedule = schedule
        self.objective = Objective(prediction, variance, loss)
        self._tables: dict[tuple[torch.device, torch.dtype], DeviceTables] = {}

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps."""
        return len(self.schedule)

    def tables(self, device: torch.device, dtype: torch.dtype = torch.float32) -> DeviceTables:
        """The tables on a device, cast from float64; built once per device and dtype."""
        key = (device, dtype)
        if key not in self._tables:
            s, o = self.schedule, self.objective
            # If made while sampling under inference_mode, a later loss could not save them for its backward.
            with torch.inference_mode(False):
                made = DeviceTables(
                    q_sample=s.q_sample_table(),
                    loss=o.loss_table(s),
                    x0=o.x0_table(s),
                    posterior=s.posterior_table(),
                    variance=o.variance_table(s),
                )
                self._tables[key] = DeviceTables(*(table.to(device, dtype) for table in made))
        return self._tables[key]

    def q_sample(self, x0: Tensor, t: Tensor, noise: "Tensor | NoiseKey", dtype: torch.dtype | None = None) -> Tensor:
        """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) [H eq. 4], shaped like x0.

        noise is a tensor shaped like x0, or a NoiseKey from which it is drawn without being stored. dtype is
        that of the result: by default x0's own, and float32 for uint8.
        """
        table = self.tables(x0.device, _compute_dtype(x0)).q_sample
        return ops.q_sample(x0, t, table, noise, dtype=dtype)

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Posterior:
        """q(x_{t-1} | x_t, x_0) [H eq. 6-7]: its mean, variance and log variance.

        Computed and returned in float32, or in float64 if an input is float64. At t = 0 the variance is 0 and
        the log variance that of t = 1.
        """
        self._check(t, x_t=x_t, x0=x0)
        return self._q_posterior(*_promote(x0, x_t), t)

    def p_mean_variance(self, output: Tensor, x_t: Tensor, t: Tensor, clip: bool = True) -> PMeanVariance:
        """p(x_{t-1} | x_t) given the network's output at (x_t, t) [H eq. 11].

        Computed and returned in float32, or in float64 if an input is float64. clip limits the predicted x_0
        to [-1, 1] before the mean is formed from it.
        """
        self._check(t, x_t=x_t, output=output)
        output, x_t = _promote(output, x_t)
        tables = self.tables(x_t.device, x_t.dtype)
        a_x, a_out = _rows(tables.x0, t, x_t)
        pred_x0 = a_x * x_t + a_out * output
        if clip:
            pred_x0 = pred_x0.clamp(-1, 1)
        variance, log_variance = (column.expand(x_t.shape) for column in _rows(tables.variance, t, x_t))
        return PMeanVariance(self._q_posterior(pred_x0, x_t, t).mean, variance, log_variance, pred_x0)

    def training_losses(self, output: Tensor, x0: Tensor, t: Tensor, noise: "Tensor | NoiseKey") -> Tensor:
        """Each sample's loss [N] for the network's output at (q_sample(x0, t, noise), t) [H eq. 14].

        noise is what q_sample was given. float32, or float64 for a float64 output; differentiable with
        respect to output.
        """
        table = self.tables(x0.device, _compute_dtype(output)).loss
        return ops.diffusion_loss(output, x0, t, table, noise)

    def respace(self, spec) -> "GaussianDiffusion":
        """The same diffusion over fewer steps: see Schedule.respace."""
        return GaussianDiffusion(self.schedule.respace(spec), **self.objective.to_dict())

    def to_dict(self) -> dict:
        """In JSON's types: {"schedule": {...}, "prediction": ..., "variance": ..., "loss": ...}."""
        return {"schedule": self.schedule.to_dict(), **self.objective.to_dict()}

    @classmethod
    def from_dict(cls, d: dict) -> "GaussianDiffusion":
        """The diffusion that `to_dict` described. Raises InputError when d does not describe one."""
        expected = ["schedule", "prediction", "variance", "loss"]
        if not isinstance(d, dict) or set(d) != set(expected):
            got = sorted(map(str, d)) if isinstance(d, dict) else type(d).__name__
            raise InputError(f"a diffusion is described by a dict with the keys {expected}, got {got}")
        return cls(**{**d, "schedule": Schedule.from_dict(d["schedule"])})

    def __repr__(self) -> str:
        o = self.objective
        return f"GaussianDiffusion({self.schedule.name}, {o.prediction}, {o.variance}, {o.loss})"

    def _q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Posterior:
        table = self.tables(x_t.device, x_t.dtype).posterior
        coef1, coef2, variance, log_variance = _rows(table, t, x_t)
        return Posterior(coef1 * x0 + coef2 * x_t, variance.expand(x_t.shape), log_variance.expand(x_t.shape))

    def _check(self, t: Tensor, **data: Tensor) -> None:
        """Every tensor in data must have the first one's shape and device, and t be int64 [N] there."""
        for name, x in {"t": t, **data}.items():
            if not isinstance(x, Tensor):
                raise InputError(f"{name} is a {type(x).__name__}: expected a tensor")
        first_name, first = next(iter(data.items()))
        if first.ndim < 2:
            raise InputError(f"{first_name} has shape {list(first.shape)}: expected [N, C, ...]")
        for name, x in data.items():
            if not (x.is_floating_point() or (name == "x0" and x.dtype == torch.uint8)):
                expected = "a floating dtype or uint8" if name == "x0" else "a floating dtype"
                raise InputError(f"{name} is {x.dtype}: expected {expected}")
            if x.shape != first.shape:
                raise InputError(
                    f"{name} has shape {list(x.shape)}: expected that of {first_name}, {list(first.shape)}"
                )
        for name, x in {"t": t, **data}.items():
            if x.device != first.device:
                raise InputError(f"{name} is on {x.device}, {first_name} on {first.device}: move one to the other")
        n, T = len(first), len(self.schedule)
        if t.dtype != torch.int64 or t.shape != (n,):
            raise InputError(
                f"t is {t.dtype} {list(t.shape)}: expected int64 [{n}], one index per sample of {first_name}"
            )
        # Reading values back from a GPU would wait for it; under a compiler it would break the graph.
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ((t < 0) | (t >= T)).nonzero()
            if len(wrong):
                i = int(wrong[0])
                raise InputError(
                    f"t[{i}] = {int(t[i])} is outside 0..{T - 1} ({len(wrong)} of {n} are): t indexes this "
                    f"schedule's {T} steps"
                )


def _rows(table: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The columns of table at t, each [N, 1, ...] to broadcast against `like`."""
    return table.index_select(0, t).view(len(t), table.shape[1], *[1] * (like.ndim - 1)).unbind(1)


def _compute_dtype(*data: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in data) else torch.float32


def _promote(*data: Tensor) -> list[Tensor]:
    """All in float64 if one is, else in float32; uint8 becomes x/127.5 - 1."""
    dtype = _compute_dtype(*data)
    return [x.to(dtype) / 127.5 - 1 if x.dtype == torch.uint8 else x.to(dtype) for x in data]
