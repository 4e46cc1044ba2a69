"""The models that the page offers: those that ship, and those that were named when it was started. A visitor chooses
one by name and never gives a path."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.checkpoint import DEFAULT_MODEL, available_models
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.load import load_model
from ddpm_fast.loops.network import Network

_LONGEST_NAME = 60
_COLOURS = {1: "grey", 3: "colour", 4: "colour with opacity"}


@dataclass(frozen=True)
class Offered:
    """A model that can be chosen.

    Attributes:
        name: What the page calls it.
        source: What load_model takes.
        shown: What stands for the source in a command to copy.
    """

    name: str
    source: str
    shown: str


class Models:
    """The models, each loaded when it is first used, and kept."""

    def __init__(self, given: Sequence[str], device: torch.device, shows_paths: bool = True):
        """Those that ship, and the given ones, which are loaded at once.

        Args:
            given: Sources of load_model.
            device: Where the models are put.
            shows_paths: Whether commands to copy name a given source as it was given. Otherwise its name stands there:
                whoever comes from elsewhere is not told where files of this machine are.

        Raises:
            InputError: For a source that is no model, or one that the page cannot draw with.
        """
        self.device = device
        self._lock = threading.Lock()
        self._loaded: dict[str, LoadedModel] = {}
        self._offered: dict[str, Offered] = {}
        shipped = sorted(available_models(), key=lambda name: name != DEFAULT_MODEL)
        for source in dict.fromkeys([*given, *shipped]):
            name = source if source in available_models() else self._unused(_short_name(source))
            shown = source if shows_paths or source in available_models() else f"MODEL_{name}"
            self._offered[name] = Offered(name, source, shown)
            if source in given:
                self.get(name)

    @property
    def names(self) -> list[str]:
        """What can be chosen: the given models first, then the default model, and the others that ship."""
        return list(self._offered)

    def offered(self, name: object) -> Offered:
        """The model of that name. Raises InputError if there is none."""
        if not isinstance(name, str) or name not in self._offered:
            raise InputError(f"there is no model {name!r:.100} here; expected one of {', '.join(self.names)}")
        return self._offered[name]

    def get(self, name: object) -> LoadedModel:
        """The model of that name, loaded.

        Raises:
            InputError: If there is none, it cannot be loaded, or the page cannot draw with it.
        """
        offered = self.offered(name)
        with self._lock:
            if offered.name not in self._loaded:
                loaded = load_model(offered.source, self.device)
                _check_drawable(loaded)
                self._loaded[offered.name] = loaded
            return self._loaded[offered.name]

    def without_paths(self, message: str) -> str:
        """A message with each model's path replaced by what the page calls the model."""
        for name, loaded in list(self._loaded.items()):
            message = message.replace(str(loaded.path), name)
        return message

    def _unused(self, name: str) -> str:
        number, free = 1, name
        while free in self._offered or free in available_models():
            number += 1
            free = f"{name} ({number})"
        return free


def describe(loaded: LoadedModel) -> str:
    """A line about a model: its images, its classes, its chain and its size."""
    channels, height, width = loaded.shape
    if loaded.value_range is not None:
        colours = f"{channels} channels of floats"
    else:
        colours = _COLOURS.get(channels, f"{channels} channels")
    parts = [f"images of {width}\u00d7{height}, {colours}"]
    if loaded.classes:
        names = [printable(name) for name in (loaded.label_names or [])[:12]]
        more = ", ..." if names and loaded.classes > len(names) else ""
        parts.append(f"{loaded.classes} classes" + (f" ({', '.join(names)}{more})" if names else ""))
    else:
        parts.append("no classes")
    parts.append(
        f"a chain of {loaded.diffusion.num_timesteps} timesteps, prediction {loaded.diffusion.objective.prediction}"
    )
    millions = sum(weight.numel() for weight in loaded.model.parameters()) / 1e6
    parts.append(f"{millions:.1f} million weights")
    return "; ".join(parts)


def _check_drawable(loaded: LoadedModel) -> None:
    """Raises InputError for a model that needs more than the page asks for."""
    if len(loaded.shape) != 3:
        raise InputError(f"{loaded.path} draws samples of {len(loaded.shape) - 1} dimensions, which are no pictures")
    if Network.of(loaded.model).condition_channels:
        raise InputError(
            f"{loaded.path} enlarges pictures, which this page does not: use python -m ddpm_fast.sample --condition"
        )


def _short_name(source: str) -> str:
    """What to call a source: the last part of its path, or the last two for a run's model.safetensors."""
    path = Path(source)
    name = path.name or source
    if name == "model.safetensors" and path.parent.name:
        name = f"{path.parent.name}/{name}"
    return printable(name)[:_LONGEST_NAME]
