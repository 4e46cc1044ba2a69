"""The scheduler_config.json of diffusers' schedulers as a GaussianDiffusion, and back.

All its schedulers with betas describe one forward process; they differ in how they sample. So what is read are the
betas, what the network predicts and the variance; how a scheduler steps is left to our samplers. diffusers itself is
not needed.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError, check_integer, check_number
from ddpm_fast.nn.config_fields import shown
from ddpm_fast.schedule import Schedule

# Those of its schedulers that have betas, without "Scheduler".
_KINDS = frozenset(
    (
        "DDPM",
        "DDPMFast",  # ours, of diffusers_scheduler.py
        "DDPMParallel",
        "DDIM",
        "DDIMParallel",
        "DDIMInverse",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverMultistepInverse",
        "DPMSolverSDE",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LMSDiscrete",
        "PNDM",
        "RePaint",
        "SASolver",
        "UniPCMultistep",
    )
)
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# The logarithms are the same variances, computed otherwise.
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
    None: "fixed_small",  # a scheduler that has no such field, such as DDIM, whose eta = 1 is this variance
}
_MOST_TIMESTEPS = 1_000_000  # as in schedule.py
# DDPMScheduler's own values of the fields that make a diffusion.
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "variance_type": None,
}


def is_learned(fields: Mapping[str, Any]) -> bool:
    """Whether the network of a scheduler's config has output channels for the variance."""
    return fields.get("variance_type") in ("learned", "learned_range")


def read_diffusion(given: Mapping[str, Any]) -> GaussianDiffusion:
    """The diffusion of a scheduler's config.

    Args:
        given: The fields of its scheduler_config.json. What is left out has the value that DDPMScheduler takes.

    Raises:
        InputError: For a scheduler without betas, and for fields that have no counterpart here.
    """
    kind = given.get("_class_name", "DDPMScheduler")
    if not isinstance(kind, str) or kind.removesuffix("Scheduler") not in _KINDS:
        raise InputError(
            f"_class_name is {shown(kind)}, which ddpm_fast cannot read: expected a scheduler of a chain of betas, "
            "such as DDPMScheduler, DDIMScheduler or DPMSolverMultistepScheduler"
        )
    fields = {**DEFAULTS, **given}
    for name in ("use_flow_sigmas", "use_dynamic_shifting"):
        if fields.get(name):
            raise InputError(f"{name} is {shown(fields[name])}: the network is of flow matching, not of a diffusion")
    if fields.get("predict_epsilon") is False:  # of older versions
        fields["prediction_type"] = "sample"
    prediction = _choice(fields, "prediction_type", _PREDICTIONS)
    if fields["variance_type"] == "learned":
        raise InputError(
            "variance_type is 'learned', by which diffusers means that the network's second half is the variance "
            "itself; here it is its logarithm. Expected learned_range or a fixed variance"
        )
    variance = _choice(fields, "variance_type", _VARIANCES)
    schedule = _schedule(fields)
    rescales = fields["rescale_betas_zero_snr"]
    if rescales not in (True, False):
        raise InputError(f"rescale_betas_zero_snr is {shown(rescales)}; expected true or false")
    if rescales:
        schedule = schedule.zero_terminal_snr()
    _warn_of_clipping(fields)
    return GaussianDiffusion(schedule, prediction, variance, "hybrid" if variance == "learned_range" else "simple")


def scheduler_fields(diffusion: GaussianDiffusion, clip: bool = True) -> dict[str, Any]:
    """The fields of the DDPMScheduler that takes the steps of a diffusion.

    Args:
        diffusion: The diffusion.
        clip: Whether the predicted x_0 is limited to [-1, 1].

    Raises:
        InputError: If DDPMScheduler cannot be this diffusion: its variance is learned as a logarithm, or its chain is
            respaced.
    """
    objective, source = diffusion.objective, diffusion.schedule.source
    if objective.variance == "learned":
        raise InputError(
            "DDPMScheduler has no variance whose logarithm is learned freely; this diffusion's variance is 'learned', "
            "expected learned_range or a fixed one"
        )
    original = Schedule.from_dict({name: value for name, value in source.items() if name != "zero_terminal_snr"})
    T = len(original)
    if diffusion.num_timesteps != T:
        raise InputError(
            f"the diffusion is respaced to {diffusion.num_timesteps} of {T} timesteps; expected the whole chain: give "
            "the diffusion that the network was trained with"
        )
    fields = {**DEFAULTS, "num_train_timesteps": T}
    named = {name: (first, last) for name, first, last in _named(T)}
    kind = source["kind"]
    if kind in named:
        fields |= {"beta_schedule": kind, "beta_start": named[kind][0], "beta_end": named[kind][1]}
    elif kind == "cosine":
        fields["beta_schedule"] = "squaredcos_cap_v2"
    else:
        fields["trained_betas"] = original.betas.tolist()
    return {
        **fields,
        "rescale_betas_zero_snr": bool(source.get("zero_terminal_snr", False)),
        "prediction_type": {ours: theirs for theirs, ours in _PREDICTIONS.items()}[objective.prediction],
        "variance_type": objective.variance,  # fixed_large_log, which some configs have, makes NaN there
        "clip_sample": clip,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "timestep_spacing": "linspace",  # which visits timesteps as our samplers do, and ends at 0
        "steps_offset": 0,
    }


def _schedule(fields: Mapping[str, Any]) -> Schedule:
    """The chain of a config's betas: the one of that name here, where the two are the same, or else of those betas."""
    T = check_integer("num_train_timesteps", fields["num_train_timesteps"], 1, _MOST_TIMESTEPS)
    betas = fields["trained_betas"]
    if betas is not None:
        if not isinstance(betas, (list, tuple)) or len(betas) != T:
            raise InputError(
                f"trained_betas is {shown(betas)}; expected null or a list of num_train_timesteps = {T} betas"
            )
        return Schedule.from_betas(betas)
    kind = fields["beta_schedule"]
    if kind == "squaredcos_cap_v2":
        return Schedule.cosine(T)
    first, last = (
        check_number(name, fields[name], lambda value: 0 < value < 1, "a number in (0, 1)")
        for name in ("beta_start", "beta_end")
    )
    if not isinstance(kind, str) or kind not in _BETAS:
        raise InputError(
            f"beta_schedule is {shown(kind)}, which ddpm_fast cannot read: expected squaredcos_cap_v2, "
            f"{', '.join(_BETAS)} or trained_betas"
        )
    if (kind, first, last) in _named(T):
        return {"linear": Schedule.linear, "scaled_linear": Schedule.scaled_linear}[kind](T)
    return Schedule.from_betas(_BETAS[kind](first, last, T))


def _named(T: int) -> list[tuple[str, float, float]]:
    """The ranges of Schedule.linear(T) and Schedule.scaled_linear(T)."""
    return [
        ("linear", 1000 / T * 1e-4, 1000 / T * 0.02),
        ("scaled_linear", 1000 / T * 0.00085, 1000 / T * 0.012),
    ]


def _evenly(first: float, last: float, T: int) -> Tensor:
    return torch.linspace(first, last, T, dtype=torch.float64)


# beta_schedule -> the betas of (beta_start, beta_end, T), in float64 where diffusers has float32.
_BETAS: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": _evenly,
    "scaled_linear": lambda first, last, T: _evenly(math.sqrt(first), math.sqrt(last), T) ** 2,
    # Xu et al. 2022, "GeoDiff": beta itself is a sigmoid of t, which Schedule.sigmoid is not.
    "sigmoid": lambda first, last, T: torch.sigmoid(_evenly(-6, 6, T)) * (last - first) + first,
}


def _choice(fields: Mapping[str, Any], name: str, choices: Mapping[Any, str]) -> str:
    value = fields[name]
    if (value is not None and not isinstance(value, str)) or value not in choices:
        raise InputError(
            f"{name} is {shown(value)}, which ddpm_fast cannot read: expected one of "
            f"{', '.join(choice for choice in choices if choice)}"
        )
    return choices[value]


def _warn_of_clipping(fields: Mapping[str, Any]) -> None:
    """Say how sampling has to be asked for what a scheduler does to x_0 by its config."""
    if fields.get("thresholding"):
        advice = "thresholding = true: for its dynamic thresholding give dynamic_threshold=0.995 to sample"
    elif fields.get("clip_sample", True) is False:
        advice = "clip_sample = false: for the same samples give clip=False to sample"
    elif fields.get("clip_sample_range", 1.0) != 1.0:
        advice = f"clip_sample_range = {shown(fields['clip_sample_range'])}: here x_0 is clipped to [-1, 1], or not"
    else:
        return
    warnings.warn(f"the scheduler's config says {advice}", stacklevel=3)
