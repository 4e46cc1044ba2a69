"""What a training saves: its state, to resume from, and the averaged weights, to sample from.

A snapshot is taken between two training steps, which costs a copy to the CPU; writing it may go on in another thread
while the training does. Processes that train together all have the same state: each computes a checksum of it, and only
the first one keeps a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.files import checkpoint
from ddpm_fast.loops.metrics import NonFiniteLoss

KEEP_CHECKPOINTS = 2
MODEL_NAME = "model.safetensors"

_CHUNK = 2**22  # elements of which a checksum is computed at a time; they take 32 bytes each meanwhile
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # an odd number whose multiples, modulo 2^64, are spread evenly
_MODEL_KEYS = ("unet", "diffusion", "label_names", "training")  # the entries of the meta that a model file has
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Snapshot:
    """A training as it was after a training step.

    Attributes:
        tensors: Those of the training state, by name.
        meta: What the state says about itself.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """How many training steps had been taken."""
        return self.meta["step"]

    def copy(self) -> Snapshot:
        """One that does not change as the training goes on, with its tensors on the CPU.

        From a GPU they are copied to pinned memory, all at once, and the copies are waited for.
        """
        copies = {name: _place_for(tensor) for name, tensor in self.tensors.items()}
        for name, tensor in self.tensors.items():
            copies[name].copy_(tensor.detach(), non_blocking=True)
        for device in {tensor.device for tensor in self.tensors.values() if tensor.device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()
        return Snapshot(copies, self.meta)

    def write(self, folder: Path) -> Path:
        """Write the training state, and the averaged weights as model.safetensors. Then remove all but the newest
        states.

        Returns:
            The path of the training state.

        Raises:
            InputError: If they cannot be written.
        """
        path = checkpoint.checkpoint_path(folder, self.step)
        checkpoint.save_training(path, self.tensors, self.meta)
        self.write_model(folder)
        checkpoint.prune_checkpoints(folder, KEEP_CHECKPOINTS)
        return path

    def write_model(self, folder: Path) -> None:
        """Write the averaged weights as model.safetensors. Raises InputError if they cannot be written."""
        config = {key: self.meta[key] for key in _MODEL_KEYS}
        checkpoint.save_model(folder / MODEL_NAME, self.averages(), config)

    def averages(self) -> dict[str, Tensor]:
        """The averaged weights, by name."""
        return checkpoint.take_prefix("ema.", self.tensors)

    def check_finite(self) -> None:
        """Raises NonFiniteLoss if a weight, or the average of one, is not finite."""
        named = {name: tensor for name, tensor in self.tensors.items() if name.startswith(("model.", "ema."))}
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


def _place_for(tensor: Tensor) -> Tensor:
    """Memory on the CPU for a copy of a tensor."""
    is_away = tensor.device.type == "cuda"
    return torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=is_away)
