"""Files of improved- and guided-diffusion (Nichol & Dhariwal 2021; Dhariwal & Nichol 2021) as ours.

A file is a state dict alone. Its shapes tell most of the network (shapes.py); the size of its images, the heads, the
order of queries, keys and values, and the diffusion come from the flags that their scripts were given (flags.py), whose
defaults are those of their code. What both say has to agree (config.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.formats.flags import parse_flags
from ddpm_fast.formats.imported import Imported
from ddpm_fast.formats.openai.config import learns_variance, make_config
from ddpm_fast.formats.openai.flags import GUIDED, IMPROVED, KNOWN, MODEL_FLAGS, code_of, make_diffusion, rescaling
from ddpm_fast.formats.openai.names import from_theirs, to_theirs
from ddpm_fast.formats.openai.shapes import Shapes, read_shapes
from ddpm_fast.formats.openai.weights import check_fits, checked_state, unfilled
from ddpm_fast.nn.unet import UNet

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
    wanted = to_theirs(unfilled(lambda: UNet(config)), config.heads, legacy)
    check_fits(state, wanted, f"a network of {_EITHER}")
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
