"""The network that a training run draws from, for its grids and its evaluations: one copy of the averaged weights."""

from __future__ import annotations

from ddpm_fast.commands.precision import choose_dtype
from ddpm_fast.loops.distributed import rank, world_size
from ddpm_fast.loops.training import Trainer
from ddpm_fast.nn import UNet


class Averaged:
    """The averaged weights of a training in a network that stays the same, so that its CUDA graphs are replayed.

    Between two uses it holds one copy of the weights in the dtype that is trained in, and on a GPU the memory in which
    its graphs run, which is what drawing takes in any case.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._network: UNet | None = None

    def network(self) -> UNet:
        """The network with the averages as they are now."""
        trainer = self._trainer
        if self._network is None:
            self._network = trainer.averaged_model().to(choose_dtype(trainer.config.precision, trainer.device))
        else:
            trainer.ema.copy_to(self._network)
        return self._network

    def drop(self) -> None:
        """Free it, with the memory of its graphs."""
        self._network = None


def own_share(n: int) -> slice:
    """This process's part of n things that all processes share."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())
