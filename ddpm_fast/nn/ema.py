"""The moving average of a model's weights that diffusion models are sampled with (Ho et al. 2020, section 4).

The decay is warmed up: an average of decay 0.9999 that starts from the initial weights is still 37% of them
after 10,000 steps.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddpm_fast.errors import InputError


class EMA:
    """fp32 shadows of a model's parameters, named as in its state_dict, on the devices they are on now.

    decay: in [0, 1), the decay after the warm-up. Raises InputError for a decay outside.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise InputError(f"EMA decay is {decay}; expected a number in [0, 1), such as 0.9999")
        self.decay = decay
        self._live = dict(model.named_parameters())
        # clone keeps the memory format; float() alone would share fp32 storage with the model.
        self._shadow = {name: p.detach().float().clone() for name, p in self._live.items()}

    def decay_at(self, step: int) -> float:
        """The decay of update number `step` (from 0): min(decay, (1 + step) / (10 + step))."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int):
        """shadow <- d * shadow + (1 - d) * parameter, d = decay_at(step). A few launches for all parameters
        together, and nothing is read back from the device."""
        live = [p.detach().float() for p in self._live.values()]
        torch._foreach_lerp_(list(self._shadow.values()), live, 1 - self.decay_at(step))

    @torch.no_grad()
    def copy_to(self, model: nn.Module):
        """Set the model's parameters to the average, cast to their dtype. Raises InputError, the model
        untouched, if its parameters are not those of the averaged model.
        """
        parameters = dict(model.named_parameters())
        _check_same(self._shadow, parameters, "the model")
        torch._foreach_copy_(list(parameters.values()), [self._shadow[name] for name in parameters])

    def state_dict(self) -> dict[str, Tensor]:
        """The shadows by parameter name (not copies)."""
        return dict(self._shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]):
        """Set the shadows from `state_dict()`. Raises InputError, nothing changed, if it is another model's."""
        _check_same(self._shadow, state, "the loaded state")
        for name, shadow in self._shadow.items():
            shadow.copy_(state[name])


def _check_same(shadow: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str):
    """Raise InputError unless both hold the same names with the same shapes."""
    advice = "use the config that the average was made with"
    for problem, names in (
        ("lacks", [n for n in shadow if n not in other]),
        ("has unknown", [n for n in other if n not in shadow]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{what} {problem} parameter(s) {', '.join(names[:3])}{more}: {advice}")
    for name, tensor in shadow.items():
        if other[name].shape != tensor.shape:
            raise InputError(
                f"{what} has {name} of shape {list(other[name].shape)}, the average {list(tensor.shape)}: {advice}"
            )
