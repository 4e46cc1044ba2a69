"""Models of ours as files of improved- and guided-diffusion: their names and layouts, and the flags that load them.

The flags are guided-diffusion's, whose networks are the more general ones; improved-diffusion's where only its scripts
have a flag for the model.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path
from ddpm_fast.formats.openai.config import CHANNEL_MULT, UPSAMPLER_MULT
from ddpm_fast.formats.openai.flags import GUIDED, IMPROVED
from ddpm_fast.formats.openai.names import to_theirs
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.unet_config import UNetConfig

_NUM_CLASSES = 1000  # of their script_util.py
_SIZES_OF_IMPROVED = (32, 64, 256)
_SIZES_OF_GUIDED = (64, 128, 256, 512)


def export_openai(model: UNet, diffusion: GaussianDiffusion, path: str | os.PathLike) -> str:
    """Write a model as a file that improved- or guided-diffusion loads: a state dict, float32.

    Beside the file, with .flags.txt in the place of its suffix, there will be a text: the flags, and then what
    `export_notes` says.

    Args:
        model: Its weights are written as they are.
        diffusion: What it was trained with.
        path: The file to write, such as model.pt.

    Returns:
        The flags: those of their image_sample.py, or of super_res_sample.py if the network has a condition.

    Raises:
        InputError: If their code has no such network or diffusion, naming what it lacks; if the path cannot be written.
    """
    if not isinstance(model, UNet):
        raise InputError(f"the model is a {type(model).__name__}; expected a UNet of this package")
    flags = export_flags(model.config, diffusion)
    state = to_theirs(model.sampling_state(), model.config.heads, legacy=True)
    copies = {
        name: value.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    save_state(copies, path)
    with atomic_path(Path(path).with_suffix(".flags.txt")) as temporary:
        text = "\n".join([flags, *export_notes(model.config, diffusion)])
        temporary.write_text(f"{text}\n", encoding="utf-8")
    return flags


def save_state(state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Write a state dict as torch.save does, whole or not at all.

    Raises:
        InputError: If the path cannot be written; an older file stays untouched.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # Of a write that fails, such as on a full disk, torch's zip writer only says where it was.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def export_flags(config: UNetConfig, diffusion: GaussianDiffusion) -> str:
    """The flags of their scripts for a network and its diffusion.

    Raises:
        InputError: If their code has no such network or diffusion, naming what it lacks.
    """
    lacks = _unsupported_network(config) + _unsupported_diffusion(config, diffusion)
    if lacks:
        raise InputError(f"improved- and guided-diffusion have no such model: {'; '.join(lacks)}")
    flags = _network_flags(config, is_improved=_needs_improved(config, diffusion))
    flags |= _diffusion_flags(config, diffusion)
    if diffusion.objective.variance == "fixed_small" and _needs_improved(config, diffusion):
        flags["sigma_small"] = True
    return " ".join(f"--{name} {value}" for name, value in flags.items())


def export_notes(config: UNetConfig, diffusion: GaussianDiffusion) -> list[str]:
    """What flags cannot say: what has to be changed in their scripts, and what differs in training. One sentence each.

    Args:
        config: That of a network which export_flags takes.
        diffusion: What it was trained with.
    """
    rows, objective = config.label_rows, diffusion.objective
    code = IMPROVED if _needs_improved(config, diffusion) else GUIDED
    script = "super_res_sample.py" if config.condition_channels else "image_sample.py"
    notes = [f"The flags are those of {script} of {code}."]
    if rows and config.null_class:
        notes.append(f"Class {config.num_classes} is no class, for classifier-free guidance: it has a row of its own.")
    if rows not in (0, _NUM_CLASSES):
        notes.append(f"Set NUM_CLASSES = {rows} in their script_util.py.")
    if config.in_channels != 3:
        notes.append(
            f"Set in_channels={config.in_channels} and out_channels={config.out_channels} where their script_util.py "
            "makes the network."
        )
    if config.height != config.width:
        notes.append(f"Their scripts sample squares; this network is for images of {config.size_name} (height, width).")
    if objective.variance == "fixed_small" and not _needs_improved(config, diffusion):
        notes.append("Give sigma_small=True to their create_gaussian_diffusion: guided-diffusion has no flag for it.")
    if config.augment_channels:
        notes.append("In training the network was told how images were augmented; those weights are left out.")
    if objective.loss == "vlb":
        notes.append("Their use_kl trains with the number of timesteps times this model's loss.")
    if objective.loss_weighting != "none":
        notes.append(f"Their code trains without this model's loss_weighting, {objective.loss_weighting}.")
    if objective.loss == "hybrid" and objective.vlb_weight not in (1 / 1000, 1 / diffusion.num_timesteps):
        notes.append(f"Their code trains with the bound's weight 0.001, not with this model's {objective.vlb_weight}.")
    return notes


def _unsupported_network(config: UNetConfig) -> list[str]:
    """What their networks cannot be, one phrase for each field."""
    fixed: dict[str, object] = {
        "norm_groups": 32,
        "norm_eps": 1e-5,
        "time_denominator": "half",
        "time_order": "cos|sin",
    }
    fixed |= {"middle_attention": "normed"}
    if config.resample == "conv" and len(config.channel_mult) > 1:
        fixed["downsample_padding"] = "symmetric"
    lacks = [
        f"{name} is {getattr(config, name)!r}, and theirs is {value!r}"
        for name, value in fixed.items()
        if getattr(config, name) != value
    ]
    up = config.decoder_attention
    if up is not None and set(up) != set(config.attention_resolutions):
        lacks.append(
            f"decoder_attention is {up}, and theirs is always the same as attention_resolutions, "
            f"{config.attention_resolutions}"
        )
    if config.condition_channels not in (0, config.in_channels):
        lacks.append(
            f"condition_channels is {config.condition_channels}, and an upsampler of theirs has as many as the sample, "
            f"{config.in_channels}"
        )
    return lacks + _unsupported_levels(config)


def _unsupported_levels(config: UNetConfig) -> list[str]:
    if config.condition_channels:
        usual = UPSAMPLER_MULT.get(config.height)
        if usual == config.channel_mult and config.first_channels == config.model_channels:
            return []
        sizes = ", ".join(f"{mult} at {size}" for size, mult in UPSAMPLER_MULT.items())
        return [
            f"channel_mult is {config.channel_mult} at a height of {config.height}, and their upsamplers have {sizes}"
        ]
    is_usual = CHANNEL_MULT.get(config.height) == config.channel_mult
    if not is_usual and any(mult != int(mult) for mult in config.channel_mult):
        return [
            f"channel_mult is {config.channel_mult}, and theirs are whole numbers (but for {CHANNEL_MULT[512]} at 512)"
        ]
    if config.first_channels != config.level_channels[0]:
        return [
            f"the first convolution makes {config.first_channels} channels (stem_channels), and theirs as many as the "
            f"first level has, {config.level_channels[0]}"
        ]
    return []


def _unsupported_diffusion(config: UNetConfig, diffusion: GaussianDiffusion) -> list[str]:
    """What their diffusions cannot be, one phrase for each field."""
    lacks, objective = [], diffusion.objective
    made, steps = diffusion.schedule.to_dict(), diffusion.num_timesteps
    if made not in [{"kind": kind, "T": steps} for kind in ("linear", "cosine")]:
        lacks.append(f"the schedule is {diffusion.schedule.name}, and theirs are linear and cosine over all timesteps")
    if objective.prediction not in ("eps", "x0"):
        lacks.append(f"prediction is {objective.prediction!r}, and theirs are 'eps' and 'x0'")
    if objective.variance == "learned":
        lacks.append("variance is 'learned', and theirs are 'learned_range' and the fixed ones")
    if objective.learned != config.learned_variance:
        lacks.append(
            f"variance is {objective.variance!r}, but the network's learned_variance is {config.learned_variance}"
        )
    if config.timestep_scale != 1 and not math.isclose(config.timestep_scale, 1000 / steps, rel_tol=1e-6):
        lacks.append(
            f"timestep_scale is {config.timestep_scale}, and theirs is 1, or 1000/T = {1000 / steps:g} with "
            "rescale_timesteps"
        )
    return lacks


def _needs_improved(config: UNetConfig, diffusion: GaussianDiffusion) -> bool:
    """Whether only improved-diffusion's scripts have flags for the model: they alone have one for fixed_small."""
    return (
        diffusion.objective.variance == "fixed_small"
        and not config.condition_channels
        and config.height in _SIZES_OF_IMPROVED
        and CHANNEL_MULT[config.height] == config.channel_mult
        and config.resample == "conv"
        and not config.head_channels
    )


def _network_flags(config: UNetConfig, is_improved: bool) -> dict[str, Any]:
    flags: dict[str, Any] = {"image_size": config.height}
    if config.condition_channels:
        flags = {"large_size": config.height}
    flags |= {"num_channels": config.model_channels, "num_res_blocks": config.num_res_blocks}
    # A resolution beyond all levels stands for none: an empty list is an error in their code.
    flags["attention_resolutions"] = ",".join(map(str, config.attention_resolutions)) or 2 * config.height
    is_usual = CHANNEL_MULT.get(config.height) == config.channel_mult
    if not (is_usual and (is_improved or config.height in _SIZES_OF_GUIDED)) and not config.condition_channels:
        flags["channel_mult"] = ",".join(map(str, config.channel_mult))
    if config.head_channels:
        flags["num_head_channels"] = config.head_channels
    else:
        flags["num_heads"] = config.num_heads
    flags |= {"class_cond": bool(config.label_rows), "use_scale_shift_norm": config.scale_shift}
    if config.resample == "resblock":
        flags["resblock_updown"] = True
    return flags | {"dropout": config.dropout, "learn_sigma": config.learned_variance}


def _diffusion_flags(config: UNetConfig, diffusion: GaussianDiffusion) -> dict[str, Any]:
    objective = diffusion.objective
    return {
        "diffusion_steps": diffusion.num_timesteps,
        "noise_schedule": diffusion.schedule.to_dict()["kind"],
        "use_kl": objective.is_bound,
        "predict_xstart": objective.prediction == "x0",
        "rescale_timesteps": config.timestep_scale != 1,
        "rescale_learned_sigmas": objective.loss != "hybrid" or objective.vlb_weight != 1 / diffusion.num_timesteps,
    }
