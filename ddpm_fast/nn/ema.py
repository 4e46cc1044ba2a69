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
    def update(self, step: int | Tensor):
        """shadow <- d * shadow + (1 - d) * parameter, d = decay_at(step). One launch or few for all parameters
        together, and nothing is read back from the device. step: an int, or an int64 scalar tensor, whose value at the
        time counts: a CUDA graph can hold this.
        """
        shadows: dict[torch.device, list[Tensor]] = {}
        live: dict[torch.device, list[Tensor]] = {}
        for name, shadow in self._shadow.items():
            shadows.setdefault(shadow.device, []).append(shadow)
            live.setdefault(shadow.device, []).append(self._live[name].detach().float())
        for device, averages in shadows.items():
            lerp = _fused_lerp_ if device.type == "cuda" else _foreach_lerp_
            lerp(averages, live[device], self._weight(step, device))

    def _weight(self, step: int | Tensor, device: torch.device) -> Tensor:
        """1 - decay_at(step), an fp32 scalar on the device, rounded once."""
        if not isinstance(step, Tensor):
            return torch.full((), 1 - self.decay_at(step), dtype=torch.float32, device=device)
        step = step.to(device).double()
        return (1 - ((1 + step) / (10 + step)).clamp(max=self.decay)).float()

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


def _foreach_lerp_(averages: list[Tensor], parameters: list[Tensor], weight: Tensor):
    """average <- average + weight * (parameter - average). On a GPU, a launch for each pair."""
    torch._foreach_lerp_(averages, parameters, [weight] * len(averages))


def _fused_lerp_(averages: list[Tensor], parameters: list[Tensor], weight: Tensor):
    """The same in one launch or few, with the weight read on the device.

    It is a fused step of SGD with the parameters as gradients: maximize makes them -parameter, weight_decay 1 adds the
    average, and average - weight * (average - parameter) is the step. torch._foreach_lerp_ has no such form, and
    formulas of other foreach operations read and write 7 tensors of the weights' size where this one does 3.
    """
    # Fused steps walk through both by the strides of one: a copy if the model's memory format was changed since.
    gradients = [
        p if p.stride() == average.stride() else torch.empty_like(average).copy_(p)
        for average, p in zip(averages, parameters, strict=True)
    ]
    torch._fused_sgd_(
        *(averages, gradients, []),
        **{"lr": weight, "weight_decay": 1.0, "maximize": True, "momentum": 0.0, "dampening": 0.0},
        **{"nesterov": False, "is_first_step": False},
    )


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
