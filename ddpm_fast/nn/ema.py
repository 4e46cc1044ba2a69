"""The moving average of a model's weights, from which diffusion models are sampled (Ho et al. 2020, sec. 4).

The decay is warmed up. Without that, an average with the decay 0.9999 would still consist of the initial weights to 37%
after 10,000 training steps.
"""

import torch
from torch import Tensor, nn

from ddpm_fast.errors import InputError
from ddpm_fast.nn.average import WeightAverage
from ddpm_fast.wide import wide


class EMA(WeightAverage):
    """The moving average of each parameter, in fp32, named as in the model's state_dict, on the parameter's device.

    Args:
        model: the network whose parameters are averaged; it keeps its own weights.
        decay: the decay after the warm-up, in [0, 1).

    Raises:
        InputError: decay is outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise InputError(f"EMA decay is {decay}; expected a number in [0, 1), such as 0.9999")
        self.decay = decay
        super().__init__(model)

    def decay_at(self, step: int) -> float:
        """The decay of update number `step`, counted from 0: min(decay, (1 + step) / (10 + step))."""
        return min(self.decay, (1 + step) / (10 + step))

    def _share(self, step: int | Tensor, device: torch.device) -> Tensor:
        """1 - decay_at(step)."""
        if isinstance(step, Tensor):
            step = step.to(device).to(wide(device))
            return (1 - ((1 + step) / (10 + step)).clamp(max=self.decay)).float()
        return torch.full((), 1 - self.decay_at(step), dtype=torch.float32, device=device)
