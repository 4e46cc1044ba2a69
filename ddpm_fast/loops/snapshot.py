"""What a training has reached, as it is written to the disk: beside the training that goes on, or while it waits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.files import checkpoint

KEEP_CHECKPOINTS = 2
MODEL_NAME = "model.safetensors"


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

    def copied(self) -> Snapshot:
        """The same in memory of its own, on the CPU, laid out as the file has it. The training may go on then."""
        plain = {name: _copy(tensor) for name, tensor in self.tensors.items()}
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


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
