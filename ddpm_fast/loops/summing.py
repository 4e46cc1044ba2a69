"""What the micro-batches of a training step add up to: their gradients, losses and timesteps, in all processes.

Each process computes its share of the batch in micro-batches, one after the other. The loss of each is divided by the
number of all micro-batches, so that gradients are only added up, whoever computed them. Two processes with a
micro-batch each, and one process with two, do the same arithmetic, and a sum of two terms has no order.

Two classes add up gradients. Overlapped is torch's DistributedDataParallel, which sends gradients while the backward
still computes others. Flat gathers them in one block of memory that stays where it is, which CUDA graphs can hold, and
sends that block at once, between two graphs.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_fast import compat
from ddpm_fast.loops.distributed import rank, sum_over_processes, world_size
from ddpm_fast.loops.train_config import TrainConfig, divided
from ddpm_fast.nn.block import Block, flat, strided_like

_QUARTERS = 8  # numbers that say what losses add up to in the quarters of the timesteps; see metrics.py


@dataclass(frozen=True)
class Share:
    """This process's share of each batch. Micro-batch number k of a batch has its examples k * size onward.

    Attributes:
        count: How many micro-batches it computes, one after the other.
        size: How many images each of them has.
        first: The number of the first of them in the batch.
        total: How many micro-batches all processes compute.
    """

    count: int
    size: int
    first: int
    total: int

    @classmethod
    def of(cls, config: TrainConfig) -> Share:
        """Raises InputError if the batch does not divide among the processes that train together."""
        count, size = divided(config, world_size())
        return cls(count, size, rank() * count, world_size() * count)


class Numbers:
    """The losses of a batch's micro-batches, and what a timestep sampler learns from, in the order of the batch.

    Each process writes those of its own micro-batches among zeros, so that a sum over the processes gathers them.
    fp32 holds a timestep exactly up to 2^24.

    Attributes:
        found: fp32 [...], where the arithmetic of a micro-batch leaves its numbers.
    """

    def __init__(self, share: Share, learns: bool, memory: Callable[[int], Tensor]):
        """Make room for them.

        Args:
            share: This process's.
            learns: Whether the timestep sampler learns from timesteps and losses.
            memory: Gives so many fp32 elements.
        """
        self._share, self._learns = share, learns
        width = 1 + 2 * share.size if learns else 1
        self._memory = memory(1 + share.total * (width + _QUARTERS))
        self._micro_batches = self._memory[1 : 1 + share.total * width].view(share.total, width)
        self._quarters = self._memory[1 + share.total * width :].view(share.total, _QUARTERS)
        self.found = torch.empty(width + _QUARTERS, device=self._memory.device)

    def begin(self, wants_stop: bool) -> None:
        """Forget those of the last training step. wants_stop: of this process."""
        self._memory.zero_()
        if wants_stop:
            self._memory[0].fill_(1.0)

    def find(self, t: Tensor, losses: Tensor, loss: Tensor, quarters: Tensor) -> None:
        """Leave the numbers of a micro-batch in `found`.

        Args:
            t: Its timesteps [size].
            losses: Their losses [size].
            loss: Its loss.
            quarters: What the losses add up to in each quarter of the timesteps [2, 4].
        """
        learned = [t, losses] if self._learns else []
        torch.cat([part.float() for part in (loss.reshape(1), *learned, quarters.flatten())], out=self.found)

    def note(self, number: int) -> None:
        """Write what was found to its place. number: of the process's micro-batches."""
        place = self._share.first + number
        self._micro_batches[place].copy_(self.found[:-_QUARTERS])
        self._quarters[place].copy_(self.found[-_QUARTERS:])

    def sum(self) -> None:
        """Gather those of all processes."""
        sum_over_processes(self._memory)

    @property
    def stop(self) -> Tensor:
        """How many processes want to stop: an fp32 scalar, once they are gathered."""
        return self._memory[0]

    @property
    def loss(self) -> Tensor:
        """The mean loss of the batch, a scalar."""
        return self._micro_batches[:, 0].sum() / self._share.total

    @property
    def learned_from(self) -> tuple[Tensor, Tensor]:
        """The timesteps int64 [N] and the losses fp32 [N] of the batch; none if nothing learns from them."""
        t, losses = self._micro_batches[:, 1:].chunk(2, dim=1) if self._learns else (self._memory[:0],) * 2
        return t.reshape(-1).long(), losses.reshape(-1)

    @property
    def quarters(self) -> Tensor:
        """What the losses of the batch add up to in each quarter of the timesteps, fp32 [2, 4]."""
        return self._quarters.sum(0).view(2, 4)


class Flat:
    """Gradients in one block of memory, with the numbers of the batch at its end."""

    def __init__(self, parameters: Sequence[nn.Parameter], share: Share, learns: bool):
        self._parameters = list(parameters)
        self.numbers = Numbers(share, learns, self._lay_out)

    def _lay_out(self, size: int) -> Tensor:
        """Make the block, with so many elements at its end."""
        tail = torch.empty(size, device=self._parameters[0].device)
        block = Block([*self._parameters, tail], torch.float32)
        self._memory, self._gradients = block.memory, block.tensors[:-1]
        return block.tensors[-1]

    def computing(self, last: bool) -> AbstractContextManager[object]:
        """A block in which one micro-batch is computed. last: of this process's share."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def collect(self, first: bool) -> None:
        """After a backward: add the parameters' gradients to those before them in the batch. They are dropped."""
        to, taken = [], []
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not None:
                to.append(flat(gradient))
                taken.append(flat(strided_like(parameter.grad, gradient)))
                parameter.grad = None
        (compat.copy_all if first else compat.add_all)(to, taken)

    def sum(self) -> None:
        """Add up those of all processes, and gather the numbers. On a GPU nothing waits for it."""
        sum_over_processes(self._memory)

    def hand_over(self) -> None:
        """Let the parameters have the sums as their gradients."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient


class Overlapped:
    """Gradients that are added up over the processes while the backward of the last micro-batch runs.

    Attributes:
        network: What is called in place of the network.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Tensor], share: Share, learns: bool):
        """model: Its parameters are what is trained. call: What is called in place of the model."""
        device = next(model.parameters()).device
        self.numbers = Numbers(share, learns, lambda size: torch.empty(size, device=device))
        # Strides along sizes of 1, of which it warns, make no difference to a copy.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        self.network = DistributedDataParallel(_Called(model, call), gradient_as_bucket_view=True)
        self.network.register_comm_hook(None, _sum)

    def computing(self, last: bool) -> AbstractContextManager[object]:
        """As Flat's."""
        return contextlib.nullcontext() if last else self.network.no_sync()

    def collect(self, first: bool) -> None:
        """As Flat's: autograd has added them up."""

    def sum(self) -> None:
        """As Flat's."""
        self.numbers.sum()

    def hand_over(self) -> None:
        """As Flat's: they have them."""


class _Called(nn.Module):
    """A model's parameters, and what is called in its place. Its buffers are constants, which nobody has to send."""

    def __init__(self, model: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.trained, self._call = nn.ParameterList(model.parameters()), (call,)  # a tuple, or it would be a part

    def forward(self, *arguments: Any) -> Tensor:
        return self._call[0](*arguments)


# Without annotations, because torch compares them with its own types, and here they would be text.
def _sum(_, bucket):  # type: ignore[no-untyped-def]
    """In the place of DistributedDataParallel's mean: its division would come in another place than one process's."""
    added = dist.all_reduce(bucket.buffer(), async_op=True)
    return added.get_future().then(lambda future: future.value()[0])
