"""The loss scale of training in fp16, on the device (Micikevicius et al. 2018, "Mixed precision training", sec. 3.2).

fp16 ends at 65504 and loses precision below 6e-5, where most gradients of a U-Net are. So the loss is multiplied by a
scale before the gradient is computed, and the gradient divided by it afterwards. Where the scaled gradient overflows,
the training step changes nothing and the scale is halved; after many good steps it is doubled. The numbers are those of
torch.amp.GradScaler. That one reads on the host whether a gradient has overflowed. Here nothing is read, so a CUDA
graph can hold the whole training step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_fast import compat
from ddpm_fast.errors import InputError

FIRST = 2.0**16
GROWTH, BACKOFF = 2.0, 0.5
GROWTH_INTERVAL = 2000  # good training steps before the scale grows
MOST = 2.0**126  # finite after one more growth


class Gradient(NamedTuple):
    """What an update needs to know of a gradient: scalars on the device.

    Attributes:
        norm: Its norm before it is clipped, and without the scale; not finite where it has overflowed.
        overflowed: Whether some of it is not finite, bool. None: the update does not depend on that.
        divisor: What the optimiser has to divide it by, fp32. None: by nothing.
    """

    norm: Tensor
    overflowed: Tensor | None = None
    divisor: Tensor | None = None


class Unscaled:
    """No scale, for precisions that have the range of fp32. The other class extends this one.

    It remembers nothing, so its state is empty.
    """

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss to those of the parameters."""
        loss.backward()

    def clip(self, parameters: Iterable[nn.Parameter], grad_clip: float) -> Gradient:
        """Prepare the gradient that backward() left for the update: one longer than grad_clip is scaled down to it."""
        return Gradient(nn.utils.clip_grad_norm_(parameters, grad_clip))

    def step(self, optimizer: torch.optim.Optimizer, gradient: Gradient) -> None:
        """Let the optimiser take its step. gradient: from clip()."""
        optimizer.step()

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs: this object's own tensors, not copies."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a `state_dict` from any device, bit for bit. That of another precision has nothing to take over.

        Raises:
            InputError: If it holds what no run has saved. Nothing is changed.
        """


class LossScale(Unscaled):
    """The loss scale of fp16, and how many good training steps it has lasted.

    Attributes:
        scale: The scale, an fp32 scalar.
        good_steps: How many training steps without an overflow there were since it last changed, an int64 scalar.
    """

    def __init__(self, device: torch.device):
        self.scale = torch.full((), FIRST, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale).backward()

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter], grad_clip: float) -> Gradient:
        """As above. The gradient itself stays as it is: the fused optimiser divides while it reads it, so unscaling and
        clipping cost no pass."""
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]) / self.scale
        clipped = (grad_clip / (norm + 1e-6)).clamp(max=1.0)  # the factor of clip_grad_norm_
        return Gradient(norm, norm.isfinite().logical_not(), self.scale / clipped)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, gradient: Gradient) -> None:
        """As above, and update the scale. Where the gradient has overflowed, the weights and the optimiser's state stay
        as they are."""
        overflowed, divisor = gradient.overflowed, gradient.divisor
        assert overflowed is not None and divisor is not None, "not from clip()"
        compat.step_unless(optimizer, overflowed, divisor)
        steps = self.good_steps + 1
        grows = steps >= GROWTH_INTERVAL
        factor = (grows.float() * (GROWTH - 1) + 1).masked_fill(overflowed, BACKOFF)
        self.scale.mul_(factor).clamp_(max=MOST)
        self.good_steps.copy_(steps.masked_fill(overflowed | grows, 0))

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if not state:  # of a run in another precision so far
            return
        own = self.state_dict()
        fits = state.keys() == own.keys() and all(
            state[name].dtype == tensor.dtype and state[name].shape == tensor.shape for name, tensor in own.items()
        )
        if not fits or not 0 < float(state["scale"]) <= MOST or int(state["good_steps"]) < 0:
            raise InputError(
                f"the saved loss scale is {', '.join(f'{n} {t}' for n, t in state.items())!s:.200}; expected "
                "a positive fp32 scale and an int64 number of good_steps: use another state"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])
