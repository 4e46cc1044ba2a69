"""`python -m ddpm_fast.train --init-from MODEL`: a new run that begins with a model's weights.

What the network and the diffusion are follows the model. An option that contradicts the network's weights is refused;
another size of the images, and what changes the diffusion, is followed, and said.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from ddpm_fast.commands.sizes import as_argument, parse_size
from ddpm_fast.commands.training.log import say
from ddpm_fast.commands.training.resuming import Options, State
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.checkpoint import available_models
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.load import load_model
from ddpm_fast.formats.repository import PREFIX
from ddpm_fast.loops.training import Trainer
from ddpm_fast.nn import UNetConfig
from ddpm_fast.objective import LEARNED_VARIANCES
from ddpm_fast.schedule import SCHEDULES

_NAMED = 20  # of many classes, so many are named


def _text(numbers: tuple[float, ...]) -> str:
    return ",".join(map(str, numbers))


# The options that say what the network is, as the command line has them; of a model these are what its network is.
_NETWORK: dict[str, Callable[[UNetConfig], Any]] = {
    "image_size": lambda network: as_argument(network.image_size),
    "channels": lambda network: network.in_channels,
    "model_channels": lambda network: network.model_channels,
    "channel_mult": lambda network: _text(network.channel_mult),
    "num_res_blocks": lambda network: network.num_res_blocks,
    "attention": lambda network: _text(network.attention_resolutions),
    "num_heads": lambda network: network.num_heads,
    "scale_shift": lambda network: network.scale_shift,
}
_OBJECTIVE = ("prediction", "variance", "loss", "loss_weighting")
_SCHEDULE = {"schedule", "timesteps", "zero_terminal_snr"}


def stored_name(init_from: str) -> str:
    """The model's path from wherever the run will be resumed, or the name of one that ships or is on the Hub."""
    is_name = init_from in available_models() or init_from.startswith(PREFIX)
    return init_from if is_name else str(Path(init_from).absolute())


@dataclass(frozen=True)
class Beginning:
    """What a run that begins with a model is made of.

    Attributes:
        network: The model's network, of the size that was asked for; the run's may have other classes.
        diffusion: What it is trained for.
        loaded: The model; None if the run is resumed.
    """

    network: UNetConfig
    diffusion: GaussianDiffusion
    loaded: LoadedModel | None


def begin(options: Options, state: State | None) -> Beginning | None:
    """What a run with --init-from is made of; None without that option. A new run's arguments become the model's.

    Args:
        options: The options.
        state: What the run is resumed from, or None for a new one.

    Raises:
        InputError: If there is no such model, or an option contradicts its network.
    """
    arguments, name = options.arguments, options.arguments["init_from"]
    if name is None:
        if arguments["flags"] is not None:
            raise InputError("--flags are those of the model that --init-from names: give that, or leave them out")
        return None
    if state is not None:  # the model may be gone, or another one, by now
        diffusion = GaussianDiffusion.from_dict(state.meta.get("diffusion"))  # type: ignore[arg-type]
        return Beginning(UNetConfig.from_dict(state.meta["unet"]), diffusion, None)
    if os.path.abspath(name) == os.path.abspath(arguments["out"]):
        raise InputError(f"--init-from is the folder of this run, {name}: to go on with it give --resume instead")
    loaded = load_model(name, flags=arguments["flags"])
    network = _adopt_network(options, loaded)
    if loaded.value_range is not None and arguments["value_range"] is None:
        arguments["value_range"] = ",".join(map(repr, loaded.value_range.ends))
    diffusion = _choose_diffusion(options, loaded)
    say(escape(printable(_description(loaded, network))))
    # The new network has a null class, which training needs.
    return Beginning(replace(network, null_class=True), diffusion, loaded)


def _adopt_network(options: Options, loaded: LoadedModel) -> UNetConfig:
    """Make the arguments about the network the model's.

    Returns:
        The model's network, for images of the size that was given, if one was.

    Raises:
        InputError: If an argument was given that contradicts it.
    """
    arguments, network = options.arguments, loaded.unet.config
    if "image_size" in options.given and arguments["image_size"] is not None:
        network = network.resized(*parse_size(arguments["image_size"]))
    for name, value_of in _NETWORK.items():
        value = value_of(network)
        shown = "none" if value == "" else value
        if name in options.given and _plain(name, arguments[name]) != _plain(name, value):
            raise InputError(
                f"--{name.replace('_', '-')} is {arguments[name]}, and {loaded.path} has {shown}, which its "
                "weights are made for: leave the option out, or start without --init-from"
            )
        arguments[name] = value
    if "dropout" not in options.given:
        arguments["dropout"] = network.dropout
    return network


def _plain(name: str, value: Any) -> Any:
    """What two texts of the same numbers have in common; other values as they are."""
    if name not in ("channel_mult", "attention"):
        return value
    numbers = [float(part) for part in str(value).split(",") if part.strip()]
    return sorted(set(numbers)) if name == "attention" else numbers


def _choose_diffusion(options: Options, loaded: LoadedModel) -> GaussianDiffusion:
    """The model's diffusion, but for the options that were given, which are said. The others become the model's."""
    arguments, given, theirs = options.arguments, options.given, loaded.diffusion
    objective = theirs.objective.to_dict()
    source = theirs.schedule.to_dict()
    follows = {name: objective[name] for name in _OBJECTIVE} | {
        "schedule": source["kind"],
        "timesteps": len(theirs.schedule),
        "zero_terminal_snr": source.get("zero_terminal_snr", False),
    }
    changed = [name for name in follows if name in given and arguments[name] not in (None, follows[name])]
    told = ", ".join(f"{name} {follows[name]} -> {arguments[name]}" for name in changed)
    arguments |= {name: value for name, value in follows.items() if name not in changed}
    schedule = theirs.schedule
    if set(changed) & _SCHEDULE:
        if "schedule" in changed and arguments["schedule"] not in SCHEDULES:
            raise InputError(f"schedule {arguments['schedule']!r} is unknown; there are {', '.join(SCHEDULES)}")
        if "schedule" not in changed and (source["kind"] not in SCHEDULES or "timesteps" in source):
            raise InputError(
                f"the noise schedule of {loaded.path} is a list of its own, which --timesteps and --zero-terminal-snr "
                "cannot change: leave them out, or give --schedule too"
            )
        schedule = SCHEDULES[arguments["schedule"]](arguments["timesteps"])
        schedule = schedule.zero_terminal_snr() if arguments["zero_terminal_snr"] else schedule
    if (arguments["variance"] in LEARNED_VARIANCES) != theirs.objective.learned:
        raise InputError(
            f"--variance is {arguments['variance']}, and {loaded.path} has {theirs.objective.variance}: a network that "
            "learns the variance has other outputs than one that does not; leave the option out"
        )
    diffusion = GaussianDiffusion(schedule, **(objective | {name: arguments[name] for name in _OBJECTIVE}))
    if told:
        say(f"Changed from the model: {escape(told)}")
    return diffusion


def _description(loaded: LoadedModel, network: UNetConfig) -> str:
    theirs = loaded.unet.config
    owner = "as the model has them"
    if network.image_size != theirs.image_size:
        owner = f"where the model has {theirs.height}x{theirs.width}"
    shape = f"{network.height}x{network.width}"
    channels = {1: "grey", 3: "RGB"}.get(network.in_channels, f"{network.in_channels} channels")
    return (
        f"Starting from {loaded.path}; pictures of another size or other colours are scaled, cut and converted to "
        f"{shape} and {channels}, {owner}"
    )


def load_weights(trainer: Trainer, loaded: LoadedModel) -> None:
    """Let a new training begin with a model's weights, and say which classes begin anew."""
    start, label_names = trainer.start_from(loaded), trainer.dataset.label_names
    if not start.new:
        return
    names = [label_names[i] if label_names else str(i) for i in start.new]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    listed = printable(", ".join(names[:_NAMED])) + more
    say(escape(f"The model has {start.known} of the {start.known + len(names)} classes; new ones begin anew: {listed}"))
