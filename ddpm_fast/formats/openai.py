"""Files of improved- and guided-diffusion (Nichol & Dhariwal 2021; Dhariwal & Nichol 2021) as ours.

A file is a state dict alone. Its shapes tell most of the network (openai_shapes.py); the size of its images, the heads,
the order of queries, keys and values, and the diffusion come from the flags that their scripts were given
(openai_flags.py), whose defaults are those of their code. What both say has to agree (openai_config.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.fit import offenders
from ddpm_fast.formats.flags import parse_flags
from ddpm_fast.formats.imported import Imported
from ddpm_fast.formats.openai_config import learns_variance, make_config
from ddpm_fast.formats.openai_flags import GUIDED, IMPROVED, KNOWN, MODEL_FLAGS, code_of, make_diffusion, rescaling
from ddpm_fast.formats.openai_names import from_theirs, to_theirs
from ddpm_fast.formats.openai_shapes import Shapes, read_shapes
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.unet_config import UNetConfig

_EITHER = f"{IMPROVED} or {GUIDED}"
_NAMES = ("time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight")


def claims(content: object) -> bool:
    """Whether what a file holds is a network of improved- or guided-diffusion, but no classifier. It never raises."""
    return isinstance(content, dict) and all(name in content for name in _NAMES)


def read(content: object, path: Path, flags: str | None) -> Imported:
    """The network of a file, and the diffusion that its flags make.

    Args:
        content: What the file holds: their parameters under their names.
        path: The file, for messages.
        flags: The flags of their scripts, such as "--image_size 64 --num_channels 128 --diffusion_steps 4000". Those
            that are left out are what the shapes say, or their code's defaults. --in_channels and --channel_mult may
            be added where a script has others. --timestep_respacing is kept in the origin and not applied.

    Returns:
        The weights in the dtypes of the file. The origin is {"format", "flags"} and, where there are such,
        "timestep_respacing" and "small_size", the size of the images that an upsampler enlarges.

    Raises:
        InputError: If there are no flags, one is unknown or contradicts the shapes, or one is missing that makes a
            difference and whose default is not known; and if the weights are not those of such a network.
    """
    try:
        state = checked_state(content)
        shapes = read_shapes(state)
        if flags is None:
            raise _without_flags(shapes)
        return _read(state, shapes, flags)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read(state: dict[str, Tensor], shapes: Shapes, flags: str) -> Imported:
    given = parse_flags(flags, KNOWN, _EITHER)
    learned = learns_variance(shapes, given)
    code = code_of(given, shapes.channel_mult, shapes.resblock_updown)
    rescale_timesteps, rescale_learned_sigmas = rescaling(given, code, learned)
    diffusion = make_diffusion(given, learned, rescale_learned_sigmas)
    config = make_config(shapes, given, 1000 / diffusion.num_timesteps if rescale_timesteps else 1.0)
    legacy = not given.get("use_new_attention_order", False)
    _check_fits(state, config, legacy)
    origin: dict[str, Any] = {"format": code or _EITHER, "flags": flags}
    if given.get("timestep_respacing"):
        origin["timestep_respacing"] = given["timestep_respacing"]
    if config.condition_channels:
        origin["small_size"] = given.get("small_size", MODEL_FLAGS["small_size"])
    return Imported(from_theirs(state, config.heads, legacy), config, diffusion, origin=origin)


def _without_flags(shapes: Shapes) -> InputError:
    return InputError(
        f"it is a network of {_EITHER}, and such a file does not say how large the images are, how many heads "
        'and timesteps there are and which noise schedule: give the flags (flags=..., --flags "...") of their '
        f"scripts, such as --image_size 64 --num_channels {shapes.model_channels} --num_res_blocks "
        f"{shapes.num_res_blocks} --diffusion_steps 4000 --noise_schedule cosine"
    )


def checked_state(content: object) -> dict[str, Tensor]:
    """The content as a state dict of weights, none of them larger than the memory behind it.

    Raises:
        InputError: If it holds anything else.
    """
    if not isinstance(content, dict):
        raise InputError(f"it holds a {type(content).__name__}; expected the state dict of a network")
    wrong = [printable(str(name)[:100]) for name, value in content.items() if not _is_weight(name, value)]
    if wrong:
        raise InputError(
            f"{offenders('it has entries that are no floating-point weights under a name:', wrong)[0]}; expected the "
            "state dict of a network alone, as model*.pt and ema_*.pt are"
        )
    return {name: value.detach() for name, value in content.items()}


def _is_weight(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    if value.layout is not torch.strided or not value.is_floating_point():
        return False
    # Strides of 0 make a tensor of any size from one number.
    return value.numel() * value.itemsize <= value.untyped_storage().nbytes()


def _check_fits(state: Mapping[str, Tensor], config: UNetConfig, legacy: bool) -> None:
    """Raise InputError unless the weights have the names and shapes of their network of this config."""
    with torch.device("meta"):
        made = to_theirs(UNet(config).state_dict(), config.heads, legacy)
    wanted = {name: list(value.shape) for name, value in made.items()}
    found = {printable(name[:100]): list(value.shape)[:8] for name, value in state.items()}
    problems = offenders("it lacks", [f"{name} {wanted[name]}" for name in wanted if name not in found])
    problems += offenders("it has", [f"{name} {found[name]}" for name in found if name not in wanted])
    differ = [name for name in wanted if found.get(name, wanted[name]) != wanted[name]]
    problems += offenders("of another shape is", [f"{name} {found[name]} instead of {wanted[name]}" for name in differ])
    if problems:
        raise InputError(f"its weights are not those of a network of {_EITHER}: {'; '.join(problems)}")
