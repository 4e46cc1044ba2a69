"""Reading and writing weights: models to sample from, and training states to resume from, as safetensors files.

A model file is small: bfloat16 weights and the config that builds the model. A training state is everything, bit for
bit. tensorfile.py defines how either is laid out, checked and written.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files import tensorfile
from ddpm_fast.files.atomic import remove_leftovers
from ddpm_fast.files.fit import build, check_finite
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.files.memory import memory_for
from ddpm_fast.values import ValueRange

MODELS = Path(__file__).resolve().parent.parent / "models"  # the models that come with the package
DEFAULT_MODEL = "mnist"  # the one of them that commands take if they are told none

# The entries of a model's config.
_MODEL_KEYS = ("unet", "diffusion", "label_names", "training", "value_range", "origin")


# Models


def available_models() -> list[str]:
    """The names of the models that come with the package, sorted."""
    return sorted(path.stem for path in MODELS.glob("*.safetensors"))


def save_model(
    path: str | os.PathLike,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a model file.

    Args:
        path: The file to write.
        state: A state_dict, on any device.
        config: {"unet": {...}, "diffusion": {...}, "label_names": [...] or None, "training": {...}}, and of float data
            "value_range": ValueRange.to_dict(). It is written as JSON.
        dtype: What the floating tensors of the state are cast to.

    Raises:
        InputError: If weights are not finite (in `dtype`), the config is not JSON, or the path cannot be written; an
            older file stays untouched.
    """
    tensors = {name: t.detach().to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    check_finite(f"the model to be saved as {path}", tensors)
    tensorfile.write(path, tensorfile.MODEL, tensors, config)


def read_model(path_or_name: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state (on the CPU, with the dtypes as stored) and the config of a model.

    Args:
        path_or_name: As for load_model.

    Raises:
        InputError: For an unknown name and for a missing, damaged or foreign file, or one of a newer format.
    """
    return _read(_resolve(path_or_name))


def load_model(
    path_or_name: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Build the U-Net and the diffusion of a model, and load the weights.

    Args:
        path_or_name: One of

            - a model file.
            - a training state (step-*.safetensors). The model is that of its averaged weights.
            - the folder of a training run: its model.safetensors, or, if it has none yet, its newest training state.
            - the name of a model that comes with the package.

        device: Where to put the model.
        dtype: The dtype of the parameters; None means float32.

    Raises:
        InputError: Where `read_model` does, and if the config does not build a model, the weights do not fit it,
            weights are not finite, or the memory is too small.
    """
    path = _resolve(path_or_name)
    return assemble(path, *_read(path), device, dtype)


def assemble(
    path: Path,
    state: Mapping[str, Tensor],
    config: dict[str, Any],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    files: tuple[Path, ...] = (),
) -> LoadedModel:
    """The model of a state and a config, as load_model gives it.

    Args:
        path: Where they are from.
        state: The weights.
        config: What save_model is given.
        device: Where to put the model.
        dtype: The dtype of the parameters; None means float32.
        files: As in LoadedModel.

    Raises:
        InputError: If the config does not build a model, the weights do not fit it, weights are not finite, or the
            memory is too small.
    """
    model, diffusion = build(path, state, config)
    with memory_for(path, sum(t.nbytes for t in model.state_dict().values())):
        model.to(device=device, dtype=dtype).eval()
    entry = config.get("value_range")
    value_range = None if entry is None else ValueRange.from_dict(entry)
    return LoadedModel(model, diffusion, config, config.get("label_names"), path, value_range, files)


def _resolve(path_or_name: str | os.PathLike) -> Path:
    """The path of a model file or training state, from what load_model accepts."""
    name, path = os.fspath(path_or_name), Path(os.path.expanduser(path_or_name))
    if name in available_models():
        return MODELS / f"{name}.safetensors"
    if os.path.isdir(path):
        return _model_of_run(path)
    if path.name == name and not path.suffix and not os.path.exists(path):
        shipped = ", ".join(available_models()) or "none"
        raise InputError(
            f"no model is called {name!r:.200}; expected one of the package's ({shipped}) or a file's path, or that of "
            "a training run's folder"
        )
    return path


def _model_of_run(folder: Path) -> Path:
    """The model of a training run: what it has written for sampling, or else its newest training state."""
    if os.path.lexists(folder / "model.safetensors"):
        return folder / "model.safetensors"
    newest, damaged = newest_readable(folder)
    problems = "".join(f"; {reason}" for _, reason in damaged)
    if newest is None:
        raise InputError(
            f"{folder} is a folder; expected a model, or the folder of a training run that has one, and "
            f"{tensorfile.inside(folder)}{problems}"
        )
    if damaged:
        warnings.warn(
            f"the model is taken from {newest}, the newest training state that is whole{problems}", stacklevel=5
        )
    return newest


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the config of a model file, or those of a training state's averaged model."""
    form, tensors, config = tensorfile.read(path, tensorfile.MODEL, tensorfile.TRAINING)
    if form == tensorfile.MODEL:
        return tensors, config
    return take_prefix("ema.", tensors), model_config(config)


def model_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model of a training state. meta: As `read_training` gives it."""
    return {key: meta[key] for key in _MODEL_KEYS if key in meta}


# Training states


def save_training(path: str | os.PathLike, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a training state.

    Prefixes tell the parts apart: {**add_prefix("model.", model.state_dict()), **add_prefix("ema.", ...)}.

    Args:
        path: The file to write.
        tensors: Of any dtype; they are kept bit for bit.
        meta: The training step, the config and the arguments, which are written as JSON.

    Raises:
        InputError: If the meta is not JSON or the path cannot be written; an older file stays untouched.
    """
    tensorfile.write(path, tensorfile.TRAINING, tensors, meta)


def read_training(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the meta that `save_training` wrote.

    Raises:
        InputError: For a missing, damaged or foreign file.
    """
    return tensorfile.read(Path(os.path.expanduser(path)), tensorfile.TRAINING)[1:]


def add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each named `prefix` + name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def take_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, each named without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def checkpoint_path(folder: str | os.PathLike, step: int) -> Path:
    """The path of the training state after `step` training steps: `folder/step-00001000.safetensors`."""
    return Path(folder) / f"step-{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """The number of training steps in the name of a training state."""
    return int(path.stem.removeprefix("step-"))


def latest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The training state of the highest training step in `folder`; None if there is none, or no such folder."""
    return max(_checkpoints(folder), default=(0, None))[1]


def newest_readable(folder: str | os.PathLike) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest training state in `folder` that is whole.

    Returns:
        Its path, None if there is none; and the newer ones, newest first, each with what is wrong with it.

    Raises:
        InputError: If a state cannot be read though it may be whole: it is of a newer format, this user may not read
            it, or the memory is too small.
    """
    damaged = []
    for _, path in sorted(_checkpoints(folder), reverse=True):
        try:
            read_training(path)
        except tensorfile.DamagedFile as error:
            damaged.append((path, str(error)))
        else:
            return path, damaged
    return None, damaged


def prune_checkpoints(folder: str | os.PathLike, keep: int = 2) -> list[Path]:
    """Remove all training states but the `keep` of the highest training steps, and leftovers of killed writers.

    Returns:
        The training states that were removed.

    Raises:
        InputError: If keep < 1, because the last one must not be removed.
    """
    if keep < 1:
        raise InputError(f"keep is {keep}; expected at least 1: without a checkpoint a run cannot be resumed")
    removed = [path for _, path in sorted(_checkpoints(folder))[:-keep]]
    for path in removed:
        path.unlink(missing_ok=True)
    remove_leftovers(folder)
    return removed


def _checkpoints(folder: str | os.PathLike) -> list[tuple[int, Path]]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:  # a folder that only seems to be empty must not be taken for a new one
        raise InputError(
            f"{os.fspath(folder)} cannot be looked into ({error.strerror or error}); choose another folder, or make it "
            "readable"
        ) from error
    matches = [re.fullmatch(r"step-(\d+)\.safetensors", name) for name in names]
    states = [(int(match[1]), Path(folder) / match[0]) for match in matches if match]
    return [(step, path) for step, path in states if path.is_file()]
