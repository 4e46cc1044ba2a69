"""How much noise at which step: beta_t, and everything that follows from beta_t alone.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (the forward process and its posterior); Nichol &
Dhariwal 2021, "Improved DDPM" (the cosine schedule, and running a chain on a subset of its timesteps, whose
choice is respacing.py's); Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (a
last step of pure noise).

Tables are float64 on the CPU; whoever uses them on a device casts last. In float32, a beta recomputed from
alpha_bar is off by 4.9e-4 (relative; linear, T = 1000). `1 - alpha_bar` is a plain subtraction, as in the
code that the published numbers come from: an expm1 of summed logarithms differs from it by 2e-12 at T = 4000,
four orders below float32's rounding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.respacing import check_timesteps, kept_timesteps

# sqrt(1 / alpha_bar) must be finite in float32, in which kernels form x_0.
_SMALLEST_ALPHA_BAR = torch.finfo(torch.float32).max ** -2


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """A chain of T noising steps, made by one of SCHEDULES, `from_betas` or `from_dict`. Tables are read-only.

    Every table is float64 [T] on the CPU; index t stands for the paper's step t + 1. [H] is Ho et al. 2020.

    betas                           variance added by step t
    timesteps                       int64: the step of the original chain that index t stands for, which is
                                    what a network is told; 0..T-1 unless the chain was respaced
    source                          dict: how the original chain was made, as in `to_dict`
    alphas_cumprod                  alpha_bar_t = prod_{s<=t} (1 - beta_s)
    alphas_cumprod_prev             alpha_bar_{t-1}, 1 at t = 0
    posterior_variance              beta~_t [H eq. 7]; 0 at t = 0
    posterior_log_variance_clipped  its logarithm; at t = 0, where that is log 0, the value at t = 1 (and
                                    log beta_0 for a chain of one step, whose reverse adds no noise)
    posterior_mean_coef1, _coef2    mu~_t = coef1 * x_0 + coef2 * x_t [H eq. 7]
    sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod
                                    x_t = the first * x_0 + the second * eps [H eq. 4]
    sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod
                                    x_0 = the first * x_t - the second * eps: the roots of 1/alpha_bar and
                                    1/alpha_bar - 1; both inf at the last step of a zero-terminal chain, where
                                    x_t holds nothing of x_0
    snr                             alpha_bar_t / (1 - alpha_bar_t); 0 at the last step of a zero-terminal chain
    has_zero_terminal_snr           bool: whether the last step is pure noise, with alpha_bar exactly 0
    """

    betas: Tensor
    timesteps: Tensor
    source: dict
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

    def __post_init__(self):
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
            # Asked for when tables are made, which may be while a compiler traces: reading it back then would not do.
            "has_zero_terminal_snr": ab[-1].item() == 0,
        }
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    @classmethod
    def linear(cls, T: int) -> "Schedule":
        """beta rises evenly from 1e-4 to 0.02 [H sec. 4], scaled by 1000/T so that the total noise does not
        depend on T.

        Raises InputError for T <= 20: beta would reach 1 (20/T at the last step) and alpha_bar 0.
        """
        betas = _evenly(*_scaled_ends("linear", T, 1e-4, 0.02), T)
        return cls(betas, torch.arange(T), {"kind": "linear", "T": T})

    @classmethod
    def cosine(cls, T: int) -> "Schedule":
        """alpha_bar_t = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) * pi/2), s = 0.008, beta <= 0.999.

        Nichol & Dhariwal 2021, eq. 17. The cap acts at the last step alone.
        """
        _check_count("T", T)

        def f(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - f((t + 1) / T) / f(t / T), 0.999) for t in range(T)]
        return cls(torch.tensor(betas, dtype=torch.float64), torch.arange(T), {"kind": "cosine", "T": T})

    @classmethod
    def sigmoid(cls, T: int) -> "Schedule":
        """alpha_bar_t = (sig(3) - sig(6t/T - 3)) / (sig(3) - sig(-3)), sig the logistic function, beta <= 0.999.

        Jabri et al. 2022, "Scalable Adaptive Computation for Iterative Generation", with its start -3, end 3, tau
        1; the cap is that of the code it is best known from (lucidrains' denoising-diffusion-pytorch) and acts at
        the last step alone. What diffusers calls "sigmoid" is another schedule: beta a sigmoid of t (GeoDiff).
        """
        _check_count("T", T)
        # 1 - alpha_bar_t / alpha_bar_{t-1}, with sig(x) - sig(y) = sinh((x - y)/2) / (2 cosh(x/2) cosh(y/2)) put
        # in: nothing cancels, neither in the small betas at the start nor in the small alpha_bar at the end.
        betas = [
            math.sinh(3 / T) * math.cosh(1.5) / (math.sinh(3 * (T - t) / T) * math.cosh(3 * (t + 1) / T - 1.5))
            for t in range(T)
        ]
        betas = torch.tensor(betas, dtype=torch.float64).clamp(max=0.999)
        return cls(betas, torch.arange(T), {"kind": "sigmoid", "T": T})

    @classmethod
    def scaled_linear(cls, T: int) -> "Schedule":
        """sqrt(beta) rises evenly from sqrt(0.00085) to sqrt(0.012), as in latent diffusion (Rombach et al. 2022).

        beta is scaled by 1000/T, as in `linear`. Raises InputError for T <= 12: beta would reach 1.
        """
        first, last = _scaled_ends("scaled_linear", T, 0.00085, 0.012)
        betas = _evenly(math.sqrt(first), math.sqrt(last), T) ** 2
        return cls(betas, torch.arange(T), {"kind": "scaled_linear", "T": T})

    @classmethod
    def from_betas(cls, betas) -> "Schedule":
        """The chain with the given betas: a non-empty 1-D tensor, array or list of numbers in (0, 1); copied.

        Raises InputError naming the worst element and its index. A last beta of 1 is for `zero_terminal_snr`.
        """
        betas = _checked_betas(betas)
        return cls(betas, torch.arange(len(betas)), {"kind": "betas", "betas": betas.tolist()})

    @classmethod
    def from_dict(cls, d: dict) -> "Schedule":
        """The schedule that `to_dict` described. Raises InputError when d does not describe one."""
        makers = {**SCHEDULES, "betas": cls.from_betas}
        kind = d.get("kind") if isinstance(d, dict) else None
        if kind not in list(makers):
            raise InputError(f"{d!r:.200} describes no schedule: expected a dict whose 'kind' is one of {list(makers)}")
        argument = "betas" if kind == "betas" else "T"
        if argument not in d or set(d) - {"kind", argument, "zero_terminal_snr", "timesteps"}:
            raise InputError(
                f"a {kind!r} schedule is described by the keys 'kind', {argument!r} and, where they apply, "
                f"'zero_terminal_snr' and 'timesteps'; got {sorted(map(str, d))}"
            )
        schedule = makers[kind](d[argument])
        rescaled = d.get("zero_terminal_snr", False)
        if not isinstance(rescaled, bool):
            raise InputError(f"'zero_terminal_snr' of a schedule must be true or false, got {rescaled!r:.200}")
        if rescaled:
            schedule = schedule.zero_terminal_snr()
        if "timesteps" not in d:
            return schedule
        return schedule._keep(check_timesteps(d["timesteps"], len(schedule)))

    def to_dict(self) -> dict:
        """How the schedule was made, in JSON's types: {"kind": "cosine", "T": 1000}, {"kind": "betas",
        "betas": [...]}; a zero-terminal one adds "zero_terminal_snr": true; a respaced one adds "timesteps", the
        steps of the original chain that it keeps (of the rescaled chain, where both are there)."""
        respaced = {"timesteps": self.timesteps.tolist()} if self._is_respaced else {}
        return {**self.source, **respaced}

    def respace(self, spec: "int | str | Sequence[int] | Tensor") -> "Schedule":
        """The chain over a subset of this one's timesteps (Nichol & Dhariwal 2021, sec. 4).

        Its betas are rebuilt from alpha_bar, so x_t at a kept step is distributed as before, and its
        `timesteps` name the steps of the original chain. spec is one of

        - 25 or "25": that many steps, evenly over 0..T-1 with both ends (a single one is T-1, which sampling
          starts at);
        - "10,15,20": T divided into equal sections with so many steps each, as in the paper's code (a
          section's single step is its first);
        - "ddim50": every k-th step from 0, for the integer k that leaves 50 (Song et al. 2020);
        - [0, 10, 999]: these steps, as indices into this schedule.

        Respacing a respaced schedule composes. Raises InputError when the spec asks for more steps than there
        are, has no integer stride, or lists timesteps that are unsorted, repeated or outside 0..T-1.
        """
        kept = kept_timesteps(spec, len(self))
        if len(kept) == len(self):
            return self
        return self._original._keep(self.timesteps[kept].tolist())

    def zero_terminal_snr(self) -> "Schedule":
        """The chain rescaled to end in pure noise: alpha_bar_{T-1} = 0 exactly, alpha_bar_0 unchanged, betas[-1] = 1.

        sqrt(alpha_bar) is shifted and scaled, and the betas rebuilt from it (Lin et al. 2023, alg. 1). At the last
        step x_t says nothing of x_0, so a network that predicts eps cannot be sampled from there: predict v or x0.
        Of a respaced chain, the original is rescaled and the same steps kept; a rescaled chain stays as it is.

        Raises InputError for a chain of one step, and for a respaced one that does not keep the original's last.
        """
        if self.has_zero_terminal_snr:
            return self
        original, last = self._original, self._original_T - 1
        if last == 0:
            raise InputError("alpha_bar of a chain of one step cannot both stay and become 0: use T >= 2")
        if self.timesteps[-1] != last:
            raise InputError(
                f"{self.name} ends at step {self.timesteps[-1]} of the original chain, but alpha_bar becomes 0 at "
                f"step {last} alone: respace to steps that include it"
            )
        root = original.sqrt_alphas_cumprod - original.sqrt_alphas_cumprod[-1]
        # Scaling the root back to its old first value would leave these quotients as they are.
        betas = torch.cat([original.betas[:1], 1.0 - (root[1:] / root[:-1]) ** 2])
        betas[-1] = 1.0
        source = {**original.source, "zero_terminal_snr": True}
        rescaled = Schedule(_checked_betas(betas, last_may_be_1=True), original.timesteps, source)
        return rescaled._keep(self.timesteps.tolist()) if self._is_respaced else rescaled

    def q_sample_table(self) -> Tensor:
        """float64 [T, 2], columns (sqrt(alpha_bar), sqrt(1 - alpha_bar)): x_t's parts of x_0, eps."""
        return torch.stack([self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod], 1)

    def posterior_table(self) -> Tensor:
        """float64 [T, 4], columns (coef1, coef2, variance, log variance) of the posterior [H eq. 6-7]."""
        mean = [self.posterior_mean_coef1, self.posterior_mean_coef2]
        return torch.stack([*mean, self.posterior_variance, self.posterior_log_variance_clipped], 1)

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps."""
        return len(self.betas)

    @property
    def name(self) -> str:
        """For labels: cosine-1000, cosine-1000/50 when 50 of the 1000 steps are kept, cosine-1000-zero-snr."""
        rescaled = "-zero-snr" if "zero_terminal_snr" in self.source else ""
        return f"{self.source['kind']}-{self._original_T}{rescaled}" + (f"/{len(self)}" if self._is_respaced else "")

    def __len__(self) -> int:
        return len(self.betas)

    def __repr__(self) -> str:
        return f"Schedule({self.name})"

    @property
    def _original_T(self) -> int:
        return self.source["T"] if "T" in self.source else len(self.source["betas"])

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


# The schedules with a name and a length, for commands and files to choose from.
SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "linear": Schedule.linear,
    "cosine": Schedule.cosine,
    "sigmoid": Schedule.sigmoid,
    "scaled_linear": Schedule.scaled_linear,
}


def _check_count(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} = {value!r} is not a number of steps: expected an int of at least 1")


def _scaled_ends(kind: str, T: int, first: float, last: float) -> tuple[float, float]:
    _check_count("T", T)
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


def _checked_betas(betas, last_may_be_1: bool = False) -> Tensor:
    try:
        betas = torch.as_tensor(betas, dtype=torch.float64).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"betas must be a 1-D tensor, array or list of numbers: {error}") from error
    if betas.ndim != 1 or len(betas) == 0:
        raise InputError(f"betas must be 1-D and not empty, got shape {list(betas.shape)}: give one beta per step")
    # 1 - beta must differ from both 0 and 1 in float64, or 1 - alpha_bar_0 would be 0 and the tables NaN.
    wrong = ~((betas < 1) & (1 - betas < 1))
    if last_may_be_1:
        wrong[-1] &= betas[-1] != 1
    if wrong.any():
        # NaN and infinity are the worst; among finite ones, the farthest outside.
        distance = torch.maximum(-betas, betas - 1).nan_to_num(nan=math.inf).masked_fill(~wrong, -math.inf)
        i = int(distance.argmax())
        pure_noise = i == len(betas) - 1 and betas[i] == 1
        hint = "; a chain that ends in pure noise is made by .zero_terminal_snr()" if pure_noise else ""
        raise InputError(
            f"{int(wrong.sum())} of {len(betas)} betas lie outside (0, 1), the worst betas[{i}] = "
            f"{betas[i].item()!r}: each must be finite, below 1, and at least 1.2e-16 (else 1 - beta is 1){hint}"
        )
    return betas


def _check_alphas_cumprod(ab: Tensor) -> None:
    small = ab < _SMALLEST_ALPHA_BAR
    small[-1] &= ab[-1] != 0  # a last beta of 1, where no x_0 is formed from eps: zero terminal SNR
    if small.any():
        t = int(small.nonzero()[0])
        raise InputError(
            f"alpha_bar falls to {ab[t].item():.3g} at t = {t} (of T = {len(ab)}): below "
            f"{_SMALLEST_ALPHA_BAR:.2g} sqrt(1/alpha_bar) overflows float32 and x_0 cannot be formed; use "
            "fewer steps or smaller betas"
        )
