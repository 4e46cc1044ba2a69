"""What a training state says about itself, and whether its tensors are a trainer's: checked before anything is changed.

A state may be of an older version, or edited by hand, and still have the right checksum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint, tensorfile
from ddpm_fast.files.fit import offenders
from ddpm_fast.loops.train_config import DROPOUTS, ORDERS
from ddpm_fast.nn import UNetConfig
from ddpm_fast.nn.power_average import LEAST_WIDTH, MOST_WIDTH

_MOST = 2**48  # training steps and examples, which are multiplied by batch sizes in 64 bits


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_training(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    history = value.get("history", [])
    return (
        _is_count(value.get("batch_size"))
        and isinstance(value.get("data"), str)
        and isinstance(value.get("digest", ""), str)
        and isinstance(history, list)
        and all(isinstance(entry, dict) for entry in history)
        and value.get("order", 1) in ORDERS
        and value.get("dropout", 1) in DROPOUTS
        and _are_widths(value.get("average_widths", []))
    )


def _are_widths(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(type(width) is float and LEAST_WIDTH <= width <= MOST_WIDTH for width in value)
        and len({f"{width:.3f}" for width in value}) == len(value)
    )


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


_ENTRIES: dict[str, Callable[[object], bool]] = {
    "step": _is_count,
    "arguments": _is_object,
    "unet": _is_object,
    "label_names": _is_names,
    "training": _is_training,
}
_LATER_ENTRIES: dict[str, Callable[[object], bool]] = {"examples": _is_count, "machine": _is_object}


def read_state(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) of a training state and what it says about itself.

    Raises:
        InputError: If it is missing, damaged or foreign, or says what no trainer has written.
    """
    tensors, meta = checkpoint.read_training(path)
    wrong = [name for name, is_right in _ENTRIES.items() if not is_right(meta.get(name))]
    wrong += [name for name, is_right in _LATER_ENTRIES.items() if name in meta and not is_right(meta[name])]
    if wrong:
        raise InputError(
            f"{path}: {', '.join(wrong)} in its meta is not what a training writes: use a state that nobody edited"
        )
    return tensors, meta


def versions(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a run keeps as it began with it, as fields of TrainConfig. A state that names no version is of version 1.

    meta: What the state says about itself, as read_state gives it.
    """
    training = meta["training"]
    return {
        "order": training.get("order", 1),
        "dropout_version": training.get("dropout", 1),
        "average_widths": tuple(training.get("average_widths", ())),
    }


def check_network(path: Path, meta: Mapping[str, Any], network: UNetConfig) -> None:
    """Raises InputError unless the state is one of this network. meta: What the state says about itself."""
    own, stored = network.to_dict(), meta["unet"]
    if differing := sorted(name for name in own.keys() | stored.keys() if own.get(name) != stored.get(name)):
        details = ", ".join(f"{name} is {stored.get(name)!r:.99} and here {own.get(name)}" for name in differing)
        raise InputError(
            f"{path} holds another network than this run's ({details}): resume with the arguments, and with images of "
            "the size, channels and classes, that the run was started with"
        )


def check_tensors(path: Path, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises InputError unless the tensors of a state have the names, dtypes and shapes of the trainer's own."""
    kinds, expected = ({name: tensorfile.kind(tensor) for name, tensor in tensors.items()} for tensors in (found, own))
    problems = offenders("missing", [name for name in expected if name not in kinds])
    problems += offenders("unexpected", [name for name in kinds if name not in expected])
    differ = [name for name in expected if kinds.get(name, expected[name]) != expected[name]]
    problems += offenders("of another kind", [f"{n} {kinds[n]} instead of {expected[n]}" for n in differ])
    if problems:
        raise InputError(f"{path}: its weights are not this network's: {'; '.join(problems)}. Use another state")


def machine(device: torch.device) -> dict[str, Any]:
    """What the bits of a training step depend on besides its arguments; kept in the training states."""
    return {"device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
