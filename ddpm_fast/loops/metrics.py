"""The loss and gradient norm of each training step, and its loss by quarter of t, on their way from the device to the
log.

Reading a number from a GPU waits for the work that computes it. So the numbers are sent at one look and read at the
next one, when they have long arrived, and the training loop does not wait for the step that it has just started.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

# So many halvings lead from the first loss scale, 2^16, to 2^-24, where fp16 itself overflows and not the scaling.
MOST_SKIPPED = 40


class NonFiniteLoss(RuntimeError):
    """The loss or gradient norm of a training step, or a weight, is not a finite number. The message names the step.

    Attributes:
        weights_of: The training step whose weights are known to be useless. Those of the steps before it may be good.
    """

    def __init__(self, message: str, weights_of: int):
        super().__init__(message)
        self.weights_of = weights_of


class Look(NamedTuple):
    """Means over some consecutive training steps.

    Attributes:
        step: The number of the last of them.
        steps: How many they are.
        loss: The mean loss.
        norm: The mean gradient norm; NaN if all of them were skipped.
        skipped: How many of them changed nothing, because their gradient overflowed fp16.
        quarters: The mean loss in each quarter of the timesteps, the least noisy one first; NaN where none was drawn.
            None if it was not added.
    """

    step: int
    steps: int
    loss: float
    norm: float
    skipped: int = 0
    quarters: tuple[float, ...] | None = None


class Metrics:
    """The metrics of the training steps that have not been read yet."""

    def __init__(self, step: int, scaled: bool = False):
        """Start with none.

        Args:
            step: The number of the training step that was reached before the first one that will be added.
            scaled: Whether the loss is scaled. Then a step whose gradient norm is not finite has changed nothing, and
                the next one is tried with a smaller scale. More than MOST_SKIPPED such steps in a row are an error.
        """
        self._step = step  # the last one that was read
        self._scaled = scaled
        self._skipped = 0  # consecutive ones, up to the last one that was read
        self._steps: list[tuple[Tensor, Tensor]] = []  # those since the last look, on the device
        self._quarters: list[Tensor] = []  # of the same steps
        # For each look, the losses of its steps, then their norms; and then, if it has any, the sums of its quarters.
        self._sent: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, loss: Tensor, norm: Tensor, quarters: Tensor | None = None) -> None:
        """Add one training step.

        Args:
            loss: Its loss, a scalar on the device.
            norm: Its gradient norm, a scalar on the device.
            quarters: What `by_quarter` gives for it, or None. All steps have it, or none has.
        """
        self._steps.append((loss, norm))
        if quarters is not None:
            self._quarters.append(quarters)

    def look(self, wait: bool) -> list[Look]:
        """Send what was added, and read what has arrived.

        Args:
            wait: Whether to wait until everything has arrived.

        Raises:
            NonFiniteLoss: For the first training step whose numbers are not finite.
        """
        if self._steps:
            losses, norms = zip(*self._steps, strict=True)
            numbers = torch.stack([*losses, *norms])
            if self._quarters:
                numbers = torch.cat([numbers, torch.stack(self._quarters).sum(0).flatten()])
            self._sent.append((len(losses), *send(numbers)))
            self._steps.clear()
            self._quarters.clear()
        found = []
        # At most one sending is left for the next look, or a loop that is faster than the device would run ever further
        # ahead of it.
        while self._sent and (wait or len(self._sent) > 1 or _arrived(self._sent[0][2])):
            steps, numbers, event = self._sent.popleft()
            if event is not None:
                event.synchronize()
            look = self._read(numbers[: 2 * steps].view(2, steps))
            found.append(look._replace(quarters=_means(numbers[2 * steps :])))
        return found

    def _read(self, numbers: Tensor) -> Look:
        losses, norms = numbers
        finite = numbers.isfinite()
        first, skipped = self._step, 0
        for i, (good_loss, good_norm) in enumerate(zip(*finite.tolist(), strict=True)):
            self._step = first + i + 1
            self._skipped = 0 if good_norm else self._skipped + 1
            skipped += not good_norm
            if not good_loss or self._skipped > (MOST_SKIPPED if self._scaled else 0):
                raise self._error(losses[i].item(), norms[i].item())
        steps = self._step - first
        return Look(self._step, steps, losses.mean().item(), norms[finite[1]].mean().item(), skipped)

    def _error(self, loss: float, norm: float) -> NonFiniteLoss:
        more = ""
        if self._scaled and math.isfinite(loss):
            more = f", like {self._skipped - 1} training steps before it, with ever smaller loss scales"
        return NonFiniteLoss(
            f"step {self._step} gave the loss {loss} and the gradient norm {norm}{more}.", weights_of=self._step - 1
        )


def quarters_of(num_timesteps: int, device: torch.device) -> Tensor:
    """fp32 [T, 4], a one for the quarter of the timesteps that each t is in, the least noisy one first."""
    t = torch.arange(num_timesteps, device=device)
    return ((4 * t // num_timesteps)[:, None] == torch.arange(4, device=device)).float()


def by_quarter(t: Tensor, losses: Tensor, weights: Tensor, quarters: Tensor) -> Tensor:
    """What the losses of a batch add up to in each quarter of the timesteps.

    The mean of a quarter is the first row divided by the second one, also of the sums of several batches: with weights
    that make up for how t is drawn, an estimate of the mean loss over the timesteps of the quarter.

    Args:
        t: int64 [N].
        losses: Those of the samples, fp32 [N].
        weights: Their weights, [N].
        quarters: What `quarters_of` gives, on the same device.

    Returns:
        fp32 [2, 4], on that device: the sums of weight * loss, and of the weights. Nothing waits for it.
    """
    return (torch.stack([weights * losses, weights])[:, :, None] * quarters.index_select(0, t)).sum(1)


def _means(sums: Tensor) -> tuple[float, ...] | None:
    """The mean of each quarter, from the elements of what `by_quarter` gives; None if there are none."""
    if not len(sums):
        return None
    weighted, weights = sums.view(2, 4).cpu().double()
    return tuple((weighted / weights).tolist())


def send(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on its way to the CPU, and the event after which it is there; None if it is there already."""
    if numbers.device.type != "cuda":
        return numbers.to("cpu", copy=True), None
    place = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    place.copy_(numbers, non_blocking=True)
    return place, torch.cuda.current_stream(numbers.device).record_event()


def _arrived(event: torch.cuda.Event | None) -> bool:
    return event is None or event.query()
