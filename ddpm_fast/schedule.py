"""How much noise at which step: beta_t, and everything that follows from beta_t alone.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (the forward process and its posterior); Nichol &
Dhariwal 2021, "Improved DDPM" (the cosine schedule, and running a chain on a subset of its timesteps).

Tables are float64 on the CPU; whoever uses them on a device casts last. In float32, a beta recomputed from
alpha_bar is off by 4.9e-4 (relative; linear, T = 1000). `1 - alpha_bar` is a plain subtraction, as in the
code that the published numbers come from: an expm1 of summed logarithms differs from it by 2e-12 at T = 4000,
four orders below float32's rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddpm_fast.errors import InputError

# sqrt(1 / alpha_bar) must be finite in float32, in which kernels form x_0.
_SMALLEST_ALPHA_BAR = torch.finfo(torch.float32).max ** -2


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """A chain of T noising steps: see `linear`, `cosine`, `from_betas`, `from_dict`. Tables are read-only.

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
                                    1/alpha_bar - 1
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
        }
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    @classmethod
    def linear(cls, T: int) -> "Schedule":
        """beta rises evenly from 1e-4 to 0.02 [H sec. 4], scaled by 1000/T so that the total noise does not
        depend on T.

        Raises InputError for T <= 20: beta would reach 1 (20/T at the last step) and alpha_bar 0.
        """
        _check_count("T", T)
        if T <= 20:
            raise InputError(
                f"a linear schedule of T = {T} steps ends at beta = 20/T = {20 / T:.4g}, but beta must stay "
                f"below 1: use T >= 21, or Schedule.cosine({T})"
            )
        first, last = 1000 / T * 1e-4, 1000 / T * 0.02
        betas = torch.arange(T, dtype=torch.float64) * ((last - first) / (T - 1)) + first
        betas[-1] = last
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
    def from_betas(cls, betas) -> "Schedule":
        """The chain with the given betas: a non-empty 1-D tensor, array or list of numbers in (0, 1); copied.

        Raises InputError naming the worst element and its index.
        """
        betas = _checked_betas(betas)
        return cls(betas, torch.arange(len(betas)), {"kind": "betas", "betas": betas.tolist()})

    @classmethod
    def from_dict(cls, d: dict) -> "Schedule":
        """The schedule that `to_dict` described. Raises InputError when d does not describe one."""
        makers = {
            "linear": (cls.linear, "T"),
            "cosine": (cls.cosine, "T"),
            "betas": (cls.from_betas, "betas"),
        }
        kind = d.get("kind") if isinstance(d, dict) else None
        if kind not in list(makers):
            raise InputError(f"{d!r:.200} describes no schedule: expected a dict whose 'kind' is one of {list(makers)}")
        make, argument = makers[kind]
        if argument not in d or set(d) - {"kind", argument, "timesteps"}:
            raise InputError(
                f"a {kind!r} schedule is described by the keys 'kind', {argument!r} and, if respaced, "
                f"'timesteps'; got {sorted(map(str, d))}"
            )
        schedule = make(d[argument])
        if "timesteps" not in d:
            return schedule
        return schedule._keep(_check_timesteps(d["timesteps"], len(schedule)))

    def to_dict(self) -> dict:
        """How the schedule was made, in JSON's types: {"kind": "cosine", "T": 1000}, {"kind": "betas",
        "betas": [...]}; a respaced one adds "timesteps", the steps of the original chain that it keeps."""
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
        kept = _kept_timesteps(spec, len(self))
        if len(kept) == len(self):
            return self
        original = Schedule.from_dict(self.source) if self._is_respaced else self
        return original._keep(self.timesteps[kept].tolist())

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
        """For labels: cosine-1000, and cosine-1000/50 when 50 of the 1000 steps are kept."""
        return f"{self.source['kind']}-{self._original_T}" + (f"/{len(self)}" if self._is_respaced else "")

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

    def _keep(self, timesteps: list[int]) -> "Schedule":
        index = torch.tensor(timesteps)
        ab = self.alphas_cumprod[index]
        betas = 1.0 - ab / torch.cat([ab.new_ones(1), ab[:-1]])
        return Schedule(_checked_betas(betas), index, self.source)


def _check_count(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} = {value!r} is not a number of steps: expected an int of at least 1")


def _checked_betas(betas) -> Tensor:
    try:
        betas = torch.as_tensor(betas, dtype=torch.float64).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"betas must be a 1-D tensor, array or list of numbers: {error}") from error
    if betas.ndim != 1 or len(betas) == 0:
        raise InputError(f"betas must be 1-D and not empty, got shape {list(betas.shape)}: give one beta per step")
    # 1 - beta must differ from both 0 and 1 in float64, or 1 - alpha_bar_0 would be 0 and the tables NaN.
    wrong = ~((betas < 1) & (1 - betas < 1))
    if wrong.any():
        # NaN and infinity are the worst; among finite ones, the farthest outside.
        distance = torch.maximum(-betas, betas - 1).nan_to_num(nan=math.inf).masked_fill(~wrong, -math.inf)
        i = int(distance.argmax())
        raise InputError(
            f"{int(wrong.sum())} of {len(betas)} betas lie outside (0, 1), the worst betas[{i}] = "
            f"{betas[i].item()!r}: each must be finite, below 1, and at least 1.2e-16 (else 1 - beta is 1)"
        )
    return betas


def _check_alphas_cumprod(ab: Tensor) -> None:
    if ab[-1] < _SMALLEST_ALPHA_BAR:
        t = int((ab < _SMALLEST_ALPHA_BAR).nonzero()[0])
        raise InputError(
            f"alpha_bar falls to {ab[t].item():.3g} at t = {t} (of T = {len(ab)}): below "
            f"{_SMALLEST_ALPHA_BAR:.2g} sqrt(1/alpha_bar) overflows float32 and x_0 cannot be formed; use "
            "fewer steps or smaller betas"
        )


def _kept_timesteps(spec, T: int) -> list[int]:
    if isinstance(spec, str) and spec.startswith("ddim"):
        return _ddim_timesteps(_count(spec[4:], spec), T)
    if isinstance(spec, str):
        return _section_timesteps([_count(part, spec) for part in spec.split(",")], T)
    if isinstance(spec, int) and not isinstance(spec, bool):
        return _section_timesteps([spec], T)
    if hasattr(spec, "__len__"):
        return _check_timesteps(spec, T)
    raise _unreadable(spec)


def _count(text: str, spec: str) -> int:
    if not text.strip().isdecimal():
        raise _unreadable(spec)
    return int(text)


def _unreadable(spec) -> InputError:
    return InputError(
        f"cannot read the respacing {spec!r}: expected a number of steps (25 or '25'), one per section "
        "('10,15,20'), 'ddim50', or a list of timesteps"
    )


def _ddim_timesteps(count: int, T: int) -> list[int]:
    strides = {len(range(0, T, stride)): stride for stride in range(T, 0, -1)}
    if count not in strides:
        below, above = [n for n in strides if n < count], [n for n in strides if n > count]
        near = [f"'ddim{n}'" for n in (*below[-1:], *above[:1])] + [f"'{count}'"] * (1 <= count <= T)
        raise InputError(
            f"'ddim{count}': no integer stride leaves {count} of {T} timesteps; {' or '.join(near)} would do"
        )
    return list(range(0, T, strides[count]))


def _section_timesteps(counts: list[int], T: int) -> list[int]:
    if min(counts) < 0 or sum(counts) == 0:
        raise InputError(f"respacing to {','.join(map(str, counts))} keeps no timesteps: ask for at least 1")
    if counts == [1]:
        return [T - 1]
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        if count > size:
            where = f"section {i} of {len(counts)} has" if len(counts) > 1 else "the schedule has"
            raise InputError(f"cannot keep {count} timesteps where {where} {size} (T = {T}): ask for {size} or fewer")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed, not multiplied: the paper's code rounds the running sum, and the two differ where it lands
        # near a half.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept


def _check_timesteps(timesteps, T: int) -> list[int]:
    if hasattr(timesteps, "tolist"):
        timesteps = timesteps.tolist()
    if not isinstance(timesteps, Sequence) or not all(type(t) is int for t in timesteps):
        raise InputError(f"timesteps must be a list of ints in 0..{T - 1}, got {timesteps!r:.200}")
    if len(timesteps) == 0:
        raise InputError(f"the list of timesteps is empty: give at least one in 0..{T - 1}")
    for i, t in enumerate(timesteps):
        if not 0 <= t < T:
            raise InputError(f"timesteps[{i}] = {t} is outside 0..{T - 1}: this schedule has T = {T} steps")
        if i and t <= timesteps[i - 1]:
            what = "repeats" if t == timesteps[i - 1] else "is below"
            raise InputError(
                f"timesteps[{i}] = {t} {what} timesteps[{i - 1}] = {timesteps[i - 1]}: give them ascending, each once"
            )
    return list(timesteps)
