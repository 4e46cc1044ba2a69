"""What a training has reached, as it is written to the disk: beside the training that goes on, or while it waits.

Processes that train together all have the same state. Each computes a checksum of it, and only the first one writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.files import checkpoint
from ddpm_fast.files.averages import average_prefix, save_average
from ddpm_fast.loops.metrics import NonFiniteLoss
from ddpm_fast.nn.reconstruction import Profile

KEEP_CHECKPOINTS = 2
MODEL_NAME = "model.safetensors"

_AVERAGES = "average."
_CHUNK = 2**22  # elements of which a checksum is computed at a time; they take 32 bytes each meanwhile
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # an odd number whose multiples, modulo 2^64, are spread evenly
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Snapshot:
    """A training state and its model.

    Attributes:
        tensors: Everything that a run is resumed from. Before `copied` they are the trainer's own, which the next
            training step changes.
        meta: What the state says about itself.
        config: What the model's file says about its model.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    config: dict[str, Any]

    @property
    def step(self) -> int:
        """How many training steps have been taken."""
        return self.meta["step"]

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def averages(self) -> Snapshot:
        """The same with the power-function averages alone."""
        return replace(self, tensors={name: t for name, t in self.tensors.items() if name.startswith(_AVERAGES)})

    def copied(self) -> Snapshot:
        """The same in memory of its own, on the CPU, laid out as the file has it. The training may go on then.

        From a GPU all copies are under way at once, to pinned memory, and then waited for.
        """
        plain = {name: _copy(tensor) for name, tensor in self.tensors.items()}
        for device in {tensor.device for tensor in self.tensors.values() if tensor.device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()
        return replace(self, tensors=plain)

    def write(self, folder: Path) -> Path:
        """Write the training state and the model. Then remove all but the newest states.

        Returns:
            The path of the training state.

        Raises:
            InputError: If they cannot be written.
        """
        path = self.write_state(folder)
        self.write_model(folder)
        return path

    def write_state(self, folder: Path) -> Path:
        """Write the training state. Returns its path. Raises InputError if it cannot be written."""
        path = checkpoint.checkpoint_path(folder, self.step)
        checkpoint.save_training(path, self.tensors, self.meta)
        return path

    def write_model(self, folder: Path) -> None:
        """Write the averaged weights as model.safetensors, and remove all but the newest states.

        Raises:
            InputError: If they cannot be written.
        """
        averages = checkpoint.take_prefix("ema.", self.tensors)
        checkpoint.save_model(folder / MODEL_NAME, averages, self.config)
        checkpoint.prune_checkpoints(folder, KEEP_CHECKPOINTS)

    def write_averages(self, folder: Path) -> None:
        """Write each power-function average as a model, from which others are reconstructed (files/averages.py).

        Raises:
            InputError: If they cannot be written.
        """
        for width in self.config["training"]["average_widths"]:
            tensors = checkpoint.take_prefix(average_prefix(width), self.tensors)
            save_average(folder, Profile(self.step, width), tensors, self.config)

    def check_finite(self) -> None:
        """Raises NonFiniteLoss if a weight, or the average of one, is not finite."""
        named = {
            name: tensor for name, tensor in self.tensors.items() if name.startswith(("model.", "ema.", _AVERAGES))
        }
        finite = torch.stack([tensor.detach().isfinite().all() for tensor in named.values()])
        for name, is_finite in zip(named, finite.tolist(), strict=True):
            if not is_finite:
                raise NonFiniteLoss(f"step {self.step} gave weights that are not finite ({name}).", self.step)

    def checksum(self) -> int:
        """A number that depends on each bit of the tensors and on its place."""
        return checksum(self.tensors)


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """A number that depends on each bit of tensors and on its place. The same on every device, whatever its threads.

    Each element's bits, as an integer, are multiplied by a number of its place and added up, modulo 2^64.
    """
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors.values():
        elements = tensor.detach().flatten()
        total = total.to(elements.device) * 31
        bits = elements.view(_BITS[elements.itemsize])
        for start in range(0, len(bits), _CHUNK):
            chunk = bits[start : start + _CHUNK].long()
            places = torch.arange(start + 1, start + 1 + len(chunk), device=chunk.device)
            total = total + (chunk * (places * _GOLDEN)).sum()
    return int(total)


def _copy(tensor: Tensor) -> Tensor:
    is_away = tensor.device.type == "cuda"
    place = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=is_away)
    return place.copy_(tensor.detach(), non_blocking=True)
