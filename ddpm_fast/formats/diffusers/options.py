"""The options of DDPMFastScheduler: which sampler a config of diffusers means, and what is refused by name.

A config comes from a file that somebody else wrote, so that its numbers are bounded before anything is made of them.
This module needs diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from ddpm_fast.errors import InputError, check_integer, check_number

NAME = "DDPMFastScheduler"
# For each sampler, the class of diffusers that it stands in for, whose options it reads, and what that class is told.
SAMPLERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpmpp_1": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 1}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "sampler": tuple(SAMPLERS),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "variance_type": (
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned",
        "learned_range",
    ),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "solver_type": ("midpoint", "heun"),
    "final_sigmas_type": ("zero", "sigma_min"),
}
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_MOST_TIMESTEPS = 1_000_000


def options_of(kind: type) -> set[str]:
    """The names of the options of one of diffusers' schedulers."""
    return set(inspect.signature(kind).parameters)


def sampler_of(config: Mapping[str, Any]) -> str:
    """The sampler of a config. Raises InputError where the class that it is of has none of ours."""
    if config.get("sampler"):
        return config["sampler"]
    name = config.get("_class_name")
    if name is None:
        # A scheduler that was made by its constructor does not have its name in its config, but first all options of
        # its class, and then what it was given besides.
        given = [key for key in config if not key.startswith("_")]
        kinds = {kind: options_of(kind) for kind, _ in SAMPLERS.values()}
        found = (kind.__name__ for kind, options in kinds.items() if set(given[: len(options)]) == options)
        name = next(found, "a class that is not named in the config")
    if name in ("DDPMScheduler", "DDIMScheduler"):
        return "ddpm" if name == "DDPMScheduler" else "ddim"
    if name != "DPMSolverMultistepScheduler":
        raise InputError(
            f"DDPMFastScheduler has no sampler of {name!s:.100}: choose one, such as "
            "from_config(config, sampler='ddim') or sampler='dpmpp_2m'"
        )
    told = {"algorithm_type": config.get("algorithm_type"), "solver_order": config.get("solver_order")}
    told = {"algorithm_type": "dpmsolver++", "solver_order": 2} | {k: v for k, v in told.items() if v is not None}
    for sampler, (_, wanted) in SAMPLERS.items():
        if wanted == told:
            return sampler
    raise InputError(
        f"DDPMFastScheduler has no DPM-Solver with algorithm_type={told['algorithm_type']!r:.100} and "
        f"solver_order={told['solver_order']!r:.100}: choose sampler='dpmpp_2m' (dpmsolver++ of order 2), "
        "'dpmpp_2m_sde' or 'dpmpp_1'"
    )


def refuse_flows(config: Mapping[str, Any]) -> None:
    """Raises InputError for models that are not noised by betas."""
    name = config.get("_class_name")
    if name not in (None, NAME) and not {"beta_schedule", "trained_betas"} & set(config):
        raise InputError(f"a {name!s:.100} has no betas: DDPMFastScheduler is for models that were noised by betas")
    for option in ("use_flow_sigmas", "use_dynamic_shifting"):
        if config.get(option):
            raise InputError(
                f"{option} is set: DDPMFastScheduler is for models that were noised by betas, not for flows"
            )


def check_options(config: Mapping[str, Any]) -> None:
    """Raises InputError for an option outside its range, by name."""
    for name in _CHOICES:
        check_choice(name, config[name])
    check_integer("num_train_timesteps", config["num_train_timesteps"], 1, _MOST_TIMESTEPS)
    check_integer("steps_offset", config["steps_offset"], 0, _MOST_TIMESTEPS)
    checked_eta(config["eta"])
    check_number("clip_sample_range", config["clip_sample_range"], lambda v: v > 0, "a number above 0")
    check_number("sample_max_value", config["sample_max_value"], lambda v: v >= 1, "a number of at least 1")
    ratio = config["dynamic_thresholding_ratio"]
    check_number("dynamic_thresholding_ratio", ratio, lambda v: 0 <= v <= 1, "a number from 0 to 1")


def check_choice(name: str, value: Any) -> Any:
    if value not in list(_CHOICES[name]):
        raise InputError(f"{name} is {value!r:.200}; DDPMFastScheduler has {', '.join(_CHOICES[name])}")
    return value


def checked_eta(eta: Any) -> float:
    return check_number("eta", eta, lambda v: 0 <= v <= 1, "a number from 0 (no noise) to 1")


def betas_of(config: Mapping[str, Any]) -> Tensor:
    """The betas, fp32 [T], bit for bit those of diffusers. Raises InputError where they make no chain."""
    names = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    try:
        trained = config["trained_betas"]
        check_integer("the number of trained_betas", 1 if trained is None else len(trained), 0, _MOST_TIMESTEPS)
        betas = DDPMScheduler(**{name: config[name] for name in names}).betas
    except (TypeError, ValueError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        raise InputError(f"the config's betas cannot be made: {error!s:.200}") from error
    if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
        raise InputError("the config's betas do not all lie in (0, 1]: check beta_start, beta_end and trained_betas")
    return betas
