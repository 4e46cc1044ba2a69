"""The noise schedule: how much noise each timestep adds, and every quantity that follows from that alone.

The sources are Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (the forward process and its posterior);
Nichol & Dhariwal 2021, "Improved DDPM" (the cosine schedule, and a chain over a subset of the timesteps, which
respacing.py chooses); and Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (schedules
whose last timestep is pure noise).

All tables are float64 on the CPU. Code that uses them on a device casts them last: in float32, a beta that is
recomputed from alpha_bar has a relative error of 4.9e-4 (linear schedule, T = 1000). `1 - alpha_bar` is a plain
subtraction, as in the code that the published numbers come from. The more exact expm1 of summed logarithms differs
from it by 2e-12 at T = 4000, four orders of magnitude below the rounding of float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.respacing import check_timesteps, kept_timesteps

# What `from_betas` accepts.
Numbers: TypeAlias = Tensor | npt.ArrayLike

# The kernels form x_0 in float32, where sqrt(1 / alpha_bar) must be finite.
_SMALLEST_ALPHA_BAR = torch.finfo(torch.float32).max ** -2


# A chain this long takes a second to make. Nobody trains longer ones, but a damaged or hostile file may ask for them.
_MOST_TIMESTEPS = 1_000_000


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """A chain of T noising timesteps, as read-only tables.

    Make one with a class method such as `Schedule.cosine`, with `from_betas` or with `from_dict`. Every table is
    float64 [T] on the CPU, and its index t stands for step t + 1 of the papers. [H] is Ho et al. 2020.

    Attributes:
        betas: The variance that timestep t adds.
        timesteps: int64 [T]: for each index t, the timestep of the original chain, which is what the network is told.
            These are 0..T-1 unless the chain was respaced.
        source: How the original chain was made, as in `to_dict`.
        alphas_cumprod: alpha_bar_t = prod_{s<=t} (1 - beta_s).
        alphas_cumprod_prev: alpha_bar_{t-1}, which is 1 at t = 0.
        posterior_variance: beta~_t [H eq. 7], which is 0 at t = 0.
        posterior_log_variance_clipped: The logarithm of beta~_t. At t = 0, where that would be log 0, it has the value
            of t = 1. A chain of one timestep has log beta_0, as its reverse adds no noise.
        posterior_mean_coef1: mu~_t = posterior_mean_coef1 * x_0 + posterior_mean_coef2 * x_t [H eq. 7].
        posterior_mean_coef2: See posterior_mean_coef1.
        sqrt_alphas_cumprod: x_t = sqrt_alphas_cumprod * x_0 + sqrt_one_minus_alphas_cumprod * eps [H eq. 4].
        sqrt_one_minus_alphas_cumprod: See sqrt_alphas_cumprod.
        sqrt_recip_alphas_cumprod: sqrt(1/alpha_bar), so that
            x_0 = sqrt_recip_alphas_cumprod * x_t - sqrt_recipm1_alphas_cumprod * eps.
            Both are infinite at the last timestep of a zero-terminal-SNR chain, where x_t holds nothing of x_0.
        sqrt_recipm1_alphas_cumprod: sqrt(1/alpha_bar - 1). See sqrt_recip_alphas_cumprod.
        snr: The signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t); 0 at the last timestep of a zero-terminal-SNR
            chain.
        has_zero_terminal_snr: Whether the last timestep is pure noise, with an alpha_bar of exactly 0.
    """

    betas: Tensor
    timesteps: Tensor
    source: dict[str, Any]
    alphas_cumprod: Tensor = field(init=False)
    alphas_cumprod_prev: Tensor = field(init=False)
    posterior_variance: Tensor = field(init=False)
    posterior_log_variance_clipped: Tensor = field(init=False)
    posterior_mean_coef1: Tensor = field(init=False)
    posterior_mean_coef2: Tensor = field(init=False)
    sqrt_alphas_cumprod: Tensor = field(init=False)
    sqrt_one_minus_alphas_cumprod: Tensor = field(init=False)
    sqrt_recip_alphas_cumprod: Tensor = field(init=False)
    sqrt_recipm1_alphas_cumprod: Tensor = field(init=False)
    snr: Tensor = field(init=False)
    has_zero_terminal_snr: bool = field(init=False)

    def __post_init__(self) -> None:
        betas = self.betas
        alphas = 1.0 - betas
        ab = torch.cumprod(alphas, 0)
        _check_alphas_cumprod(ab)
        ab_prev = torch.cat([ab.new_ones(1), ab[:-1]])
        variance = betas * (1.0 - ab_prev) / (1.0 - ab)
        first = variance[1:2] if len(betas) > 1 else betas
        tables = {
            "alphas_cumprod": ab,
            "alphas_cumprod_prev": ab_prev,
            "posterior_variance": variance,
            "posterior_log_variance_clipped": torch.cat([first, variance[1:]]).log(),
            "posterior_mean_coef1": betas * ab_prev.sqrt() / (1.0 - ab),
            "posterior_mean_coef2": (1.0 - ab_prev) * alphas.sqrt() / (1.0 - ab),
            "sqrt_alphas_cumprod": ab.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1.0 - ab).sqrt(),
            "sqrt_recip_alphas_cumprod": (1.0 / ab).sqrt(),
            "sqrt_recipm1_alphas_cumprod": ((1.0 - ab) / ab).sqrt(),
            "snr": ab / (1.0 - ab),
            # Whoever makes tables needs this, perhaps while a compiler traces, when no tensor can be read back.
            "has_zero_terminal_snr": ab[-1].item() == 0,
        }
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    @classmethod
    def linear(cls, T: int) -> "Schedule":
        """beta rises evenly from 1e-4 to 0.02 [H sec. 4], times 1000/T so that the total noise does not depend on T.

        Raises:
            InputError: If T <= 20, because beta would reach 1 (it is 20/T at the last timestep) and alpha_bar 0.
        """
        T = check_integer("T", T, 1, _MOST_TIMESTEPS)
        betas = _evenly(*_scaled_ends("linear", T, 1e-4, 0.02), T)
        return cls(betas, torch.arange(T), {"kind": "linear", "T": T})

    @classmethod
    def cosine(cls, T: int) -> "Schedule":
        """alpha_bar_t = f(t)/f(0), with f(t) = cos^2((t/T + s)/(1 + s) * pi/2) and s = 0.008; beta is at most 0.999.

        This is eq. 17 of Nichol & Dhariwal 2021. The limit on beta takes effect only at the last timestep.

        Raises:
            InputError: If T is not a number of timesteps.
        """
        T = check_integer("T", T, 1, _MOST_TIMESTEPS)

        def f(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - f((t + 1) / T) / f(t / T), 0.999) for t in range(T)]
        return cls(torch.tensor(betas, dtype=torch.float64), torch.arange(T), {"kind": "cosine", "T": T})

    @classmethod
    def sigmoid(cls, T: int) -> "Schedule":
        """alpha_bar_t = (sig(3) - sig(6t/T - 3)) / (sig(3) - sig(-3)) with the logistic function sig; beta <= 0.999.

        This is the schedule of Jabri et al. 2022, "Scalable Adaptive Computation for Iterative Generation", with its
        start of -3, end of 3 and tau of 1. The limit on beta is that of lucidrains' denoising-diffusion-pytorch, the
        best-known code that has this schedule, and it takes effect only at the last timestep. The schedule that
        diffusers calls "sigmoid" is a different one (GeoDiff): there beta itself is a sigmoid of t.

        Raises:
            InputError: If T is not a number of timesteps.
        """
        T = check_integer("T", T, 1, _MOST_TIMESTEPS)
        # 1 - alpha_bar_t / alpha_bar_{t-1}, where sig(x) - sig(y) is written as
        # sinh((x - y)/2) / (2 cosh(x/2) cosh(y/2)). This way nothing cancels, neither in the small betas at the start
        # nor in the small alpha_bar at the end.
        betas = [
            math.sinh(3 / T) * math.cosh(1.5) / (math.sinh(3 * (T - t) / T) * math.cosh(3 * (t + 1) / T - 1.5))
            for t in range(T)
        ]
        limited = torch.tensor(betas, dtype=torch.float64).clamp(max=0.999)
        return cls(limited, torch.arange(T), {"kind": "sigmoid", "T": T})

    @classmethod
    def scaled_linear(cls, T: int) -> "Schedule":
        """sqrt(beta) rises evenly from sqrt(0.00085) to sqrt(0.012), as in latent diffusion (Rombach et al. 2022).

        beta is multiplied by 1000/T, as in `linear`.

        Raises:
            InputError: If T <= 12, because beta would reach 1.
        """
        T = check_integer("T", T, 1, _MOST_TIMESTEPS)
        first, last = _scaled_ends("scaled_linear", T, 0.00085, 0.012)
        betas = _evenly(math.sqrt(first), math.sqrt(last), T) ** 2
        return cls(betas, torch.arange(T), {"kind": "scaled_linear", "T": T})

    @classmethod
    def from_betas(cls, betas: Numbers) -> "Schedule":
        """The chain with the given betas.

        Args:
            betas: A non-empty 1-D tensor, array or list of numbers in (0, 1), one per timestep. It is copied.

        Raises:
            InputError: If they are anything else; the message names the worst element and its index. A last beta of 1
                is refused as well: `zero_terminal_snr` makes such chains.
        """
        checked = _checked_betas(betas)
        return cls(checked, torch.arange(len(checked)), {"kind": "betas", "betas": checked.tolist()})

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "Schedule":
        """The schedule that `to_dict` described.

        Raises:
            InputError: If d does not describe a schedule.
        """
        makers: dict[str, Callable[[Any], Schedule]] = {**SCHEDULES, "betas": cls.from_betas}
        kind = d.get("kind") if isinstance(d, dict) else None
        if kind is None or kind not in list(makers):
            raise InputError(
                f"{d!r:.200} does not describe a schedule: expected a dict whose 'kind' is one of {list(makers)}"
            )
        argument = "betas" if kind == "betas" else "T"
        if argument not in d or set(d) - {"kind", argument, "zero_terminal_snr", "timesteps"}:
            raise InputError(
                f"a {kind!r} schedule is described by the keys 'kind' and {argument!r} and, if they apply, "
                f"'zero_terminal_snr' and 'timesteps'; got {sorted(map(str, d))}"
            )
        schedule = makers[kind](d[argument])
        rescaled = d.get("zero_terminal_snr", False)
        if not isinstance(rescaled, bool):
            raise InputError(f"a schedule's 'zero_terminal_snr' must be true or false, got {rescaled!r:.200}")
        if rescaled:
            schedule = schedule.zero_terminal_snr()
        if "timesteps" not in d:
            return schedule
        return schedule._keep(check_timesteps(d["timesteps"], len(schedule)))

    def to_dict(self) -> dict[str, Any]:
        """How the schedule was made, in JSON's types, such as {"kind": "cosine", "T": 1000}.

        A chain of given betas is {"kind": "betas", "betas": [...]}. A zero-terminal-SNR chain adds
        "zero_terminal_snr": true. A respaced chain adds "timesteps", the timesteps of the original chain that it keeps;
        where a chain has both, it was rescaled first and respaced second.
        """
        respaced = {"timesteps": self.timesteps.tolist()} if self._is_respaced else {}
        return {**self.source, **respaced}

    def respace(self, spec: "int | str | Sequence[int] | Tensor") -> "Schedule":
        """The chain over a subset of this one's timesteps (Nichol & Dhariwal 2021, sec. 4).

        The betas are rebuilt from alpha_bar, so x_t at a kept timestep has the same distribution as before. `timesteps`
        of the new chain refers to the original chain. Respacing a respaced schedule composes.

        Args:
            spec: Which timesteps to keep, as one of

                - 25 or "25": that many timesteps, spaced evenly over 0..T-1 including both ends. A single one is T-1,
                  where sampling starts.
                - "10,15,20": T is divided into sections of equal size, and this many timesteps are kept in each, as in
                  the paper's code. The single timestep of a section is its first.
                - "ddim50": every k-th timestep from 0, for the integer k that leaves 50 (Song et al. 2020).
                - [0, 10, 999]: exactly these, as indices into this schedule.

        Raises:
            InputError: If the spec asks for more timesteps than there are, has no integer stride, or lists timesteps
                that are unsorted, repeated or outside 0..T-1.
        """
        kept = kept_timesteps(spec, len(self))
        if len(kept) == len(self):
            return self
        return self._original._keep(self.timesteps[kept].tolist())

    def zero_terminal_snr(self) -> "Schedule":
        """The chain rescaled to end in pure noise: alpha_bar_{T-1} = 0 exactly, alpha_bar_0 unchanged, betas[-1] = 1.

        sqrt(alpha_bar) is shifted and scaled, and the betas are rebuilt from it (Lin et al. 2023, alg. 1). At the last
        timestep x_t says nothing about x_0, so a network that predicts eps cannot be sampled from there; let it predict
        v or x0. For a respaced chain, the original chain is rescaled and the same timesteps are kept. A chain that was
        rescaled already stays as it is.

        Raises:
            InputError: If the chain has one timestep, or if it is respaced and does not keep the original's last
                timestep.
        """
        if self.has_zero_terminal_snr:
            return self
        original, last = self._original, self._original_T - 1
        if last == 0:
            raise InputError(
                "a chain of one step cannot be rescaled: its only alpha_bar cannot both stay and become 0; use T >= 2"
            )
        if self.timesteps[-1] != last:
            raise InputError(
                f"{self.name} ends at step {self.timesteps[-1]} of the original chain, but alpha_bar becomes 0 only at "
                f"step {last}: respace to steps that include it"
            )
        root = original.sqrt_alphas_cumprod - original.sqrt_alphas_cumprod[-1]
        # The paper also scales the root back to its old first value. That would not change these quotients.
        betas = torch.cat([original.betas[:1], 1.0 - (root[1:] / root[:-1]) ** 2])
        betas[-1] = 1.0
        source = {**original.source, "zero_terminal_snr": True}
        rescaled = Schedule(_checked_betas(betas, last_may_be_1=True), original.timesteps, source)
        return rescaled._keep(self.timesteps.tolist()) if self._is_respaced else rescaled

    def q_sample_table(self) -> Tensor:
        """The factors of x_0 and eps in x_t: float64 [T, 2], columns (sqrt(alpha_bar), sqrt(1 - alpha_bar)).

        For a loop of one's own: ops.q_sample(x0, t, schedule.q_sample_table().float(), noise).
        """
        return torch.stack([self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod], 1)

    def posterior_table(self) -> Tensor:
        """The posterior [H eq. 6-7]: float64 [T, 4], columns (coef1, coef2, variance, log variance)."""
        mean = [self.posterior_mean_coef1, self.posterior_mean_coef2]
        return torch.stack([*mean, self.posterior_variance, self.posterior_log_variance_clipped], 1)

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return len(self.betas)

    @property
    def name(self) -> str:
        """A label: cosine-1000, cosine-1000/50 if 50 of the 1000 timesteps are kept, cosine-1000-zero-snr."""
        rescaled = "-zero-snr" if "zero_terminal_snr" in self.source else ""
        return f"{self.source['kind']}-{self._original_T}{rescaled}" + (f"/{len(self)}" if self._is_respaced else "")

    def __len__(self) -> int:
        return len(self.betas)

    def __repr__(self) -> str:
        return f"Schedule({self.name})"

    @property
    def _original_T(self) -> int:
        return int(self.source["T"]) if "T" in self.source else len(self.source["betas"])

    @property
    def _is_respaced(self) -> bool:
        return len(self) < self._original_T

    @property
    def _original(self) -> "Schedule":
        return Schedule.from_dict(self.source) if self._is_respaced else self

    def _keep(self, timesteps: list[int]) -> "Schedule":
        index = torch.tensor(timesteps)
        ab = self.alphas_cumprod[index]
        betas = 1.0 - ab / torch.cat([ab.new_ones(1), ab[:-1]])
        return Schedule(_checked_betas(betas, last_may_be_1=bool(ab[-1] == 0)), index, self.source)


# The schedules that a name and a length determine. Commands and files choose from these.
SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "linear": Schedule.linear,
    "cosine": Schedule.cosine,
    "sigmoid": Schedule.sigmoid,
    "scaled_linear": Schedule.scaled_linear,
}


def _scaled_ends(kind: str, T: int, first: float, last: float) -> tuple[float, float]:
    limit = round(1000 * last)
    if limit >= T:
        raise InputError(
            f"a {kind} schedule of T = {T} steps ends at beta = {limit}/T = {limit / T:.4g}, but beta must stay "
            f"below 1: use T >= {limit + 1}, or Schedule.cosine({T})"
        )
    return 1000 / T * first, 1000 / T * last


def _evenly(first: float, last: float, T: int) -> Tensor:
    values = torch.arange(T, dtype=torch.float64) * ((last - first) / (T - 1)) + first
    values[-1] = last
    return values


def _checked_betas(given: Numbers, last_may_be_1: bool = False) -> Tensor:
    try:
        betas = torch.as_tensor(given, dtype=torch.float64).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"betas must be a 1-D tensor, array or list of numbers: {error}") from error
    if betas.ndim != 1 or len(betas) == 0:
        raise InputError(f"betas must be 1-D and not empty, got shape {list(betas.shape)}: give one beta per step")
    # 1 - beta must differ from both 0 and 1 in float64, or 1 - alpha_bar_0 would be 0 and the tables NaN.
    wrong = ~((betas < 1) & (1 - betas < 1))
    if last_may_be_1:
        wrong[-1] &= betas[-1] != 1
    if wrong.any():
        # NaN and infinity are the worst; among finite values, the one farthest outside is.
        distance = torch.maximum(-betas, betas - 1).nan_to_num(nan=math.inf).masked_fill(~wrong, -math.inf)
        i = int(distance.argmax())
        pure_noise = i == len(betas) - 1 and betas[i] == 1
        hint = "; .zero_terminal_snr() makes a chain that ends in pure noise" if pure_noise else ""
        raise InputError(
            f"{int(wrong.sum())} of {len(betas)} betas lie outside (0, 1), the worst betas[{i}] = "
            f"{betas[i].item()!r}: each must be finite, below 1, and at least 1.2e-16, or 1 - beta would be 1{hint}"
        )
    return betas


def _check_alphas_cumprod(ab: Tensor) -> None:
    small = ab < _SMALLEST_ALPHA_BAR
    small[-1] &= ab[-1] != 0  # with zero terminal SNR, no x_0 is formed from eps at the last timestep
    if small.any():
        t = int(small.nonzero()[0])
        raise InputError(
            f"alpha_bar falls to {ab[t].item():.3g} at t = {t} (of T = {len(ab)}): below "
            f"{_SMALLEST_ALPHA_BAR:.2g}, sqrt(1/alpha_bar) overflows float32, and x_0 cannot be formed; use "
            "fewer steps or smaller betas"
        )
