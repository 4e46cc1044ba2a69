"""What averages of a model's weights have in common: where they lie, and how they are updated, saved and handed on."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddpm_fast.errors import InputError
from ddpm_fast.nn.block import memory_of


class WeightAverage(ABC):
    """An average of each parameter, in fp32, named as in the model's state_dict, on the parameter's device.

    A subclass says how much each update weighs.
    """

    def __init__(self, model: nn.Module):
        """Begin with the model's weights; the model keeps its own."""
        self._live = dict(model.named_parameters())
        parameters = list(self._live.values())
        live = memory_of(parameters)
        if live is None or live.dtype != torch.float32:
            self._blocks: tuple[Tensor, Tensor] | None = None
            # clone keeps the memory format; float() alone would share fp32 storage with the model.
            self._averages = {name: p.detach().float().clone() for name, p in self._live.items()}
            return
        # The averages lie in one block of memory as the parameters do (block.py), and are updated in one operation.
        block = live.clone()
        self._blocks = block, live
        self._addresses = [p.data_ptr() for p in parameters]
        self._averages = {
            name: block.as_strided(p.shape, p.stride(), p.storage_offset()) for name, p in self._live.items()
        }

    @torch.no_grad()
    def update(self, step: int | Tensor, keep: Tensor | None = None) -> None:
        """average <- (1 - w) * average + w * parameter, where w is what this update weighs.

        Nothing is read back from the device, so a CUDA graph can hold this.

        Args:
            step: the number of the update, counted from 0: an int, or an int64 scalar tensor, whose value is read when
                the update runs.
            keep: a bool scalar tensor, which is read when the update runs too. Where it is true, the averages stay as
                they are, bit for bit.
        """
        if self._blocks is not None and self._addresses == [p.data_ptr() for p in self._live.values()]:
            block, live = self._blocks
            block.lerp_(live, self._weight(step, keep, block.device))
            return
        weights: dict[torch.device, Tensor] = {}
        for name, average in self._averages.items():
            if average.device not in weights:
                weights[average.device] = self._weight(step, keep, average.device)
            average.lerp_(self._live[name].detach().float(), weights[average.device])

    def _weight(self, step: int | Tensor, keep: Tensor | None, device: torch.device) -> Tensor:
        """What update number `step` weighs, or 0 to keep the averages: an fp32 scalar on the device."""
        weight = self._share(step, device)
        return weight if keep is None else weight.masked_fill(keep.to(device), 0.0)

    @abstractmethod
    def _share(self, step: int | Tensor, device: torch.device) -> Tensor:
        """What update number `step`, counted from 0, weighs: an fp32 scalar on the device, rounded once."""

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Sets the model's parameters to the average, cast to their dtype.

        Raises:
            InputError: the model's parameters are not those of the averaged model; the model is untouched.
        """
        parameters = dict(model.named_parameters())
        _check_same(self._averages, parameters, "the model")
        for name, parameter in parameters.items():
            parameter.copy_(self._averages[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name: the tensors themselves, not copies."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Sets the averages to those of a `state_dict()`.

        Raises:
            InputError: the state is another model's; nothing is changed.
        """
        _check_same(self._averages, state, "the loaded state")
        for name, average in self._averages.items():
            average.copy_(state[name])


def _check_same(averages: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    """Raises InputError unless both hold the same names with the same shapes."""
    advice = "use the configuration with which the average was made"
    for problem, names in (
        ("lacks", [n for n in averages if n not in other]),
        ("has unknown", [n for n in other if n not in averages]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{what} {problem} parameter(s) {', '.join(names[:3])}{more}: {advice}")
    for name, tensor in averages.items():
        if other[name].shape != tensor.shape:
            raise InputError(
                f"{what} has {name} of shape {list(other[name].shape)}, the average {list(tensor.shape)}: {advice}"
            )
