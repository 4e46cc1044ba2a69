"""Which of several processes this one is, as the program that started them says in the environment.

torchrun and `accelerate launch` set RANK, WORLD_SIZE and LOCAL_RANK; srun sets names of its own. A command divides its
work by these numbers; a process group is only made where one process must be told what the others have found.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ddpm_fast.errors import InputError

# The names of the rank, the number of ranks, and the rank within its machine. SLURM_NTASKS would not do in place of
# SLURM_STEP_NUM_TASKS: it is set in a batch script too, which is one process.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together.

    Attributes:
        rank: Its number, from 0.
        world_size: How many there are.
        local_rank: Its number among those of its machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether it is the one that speaks for all."""
        return self.rank == 0

    def owns(self, batch: int) -> bool:
        """Whether the batch of this number, from 0, is for this process: each batch is for exactly one."""
        return batch % self.world_size == self.rank

    def device_name(self, name: str) -> str:
        """The name of the device that is meant by "auto" or "cuda": of several ranks of a machine, each gets a GPU.

        The one of local rank k gets cuda:k, and again cuda:0 where there are fewer GPUs than ranks, or where the
        launcher lets each of them see only its own. Any other name stays.
        """
        if self.world_size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name

    def refuse_several(self, what: str) -> None:
        """Raises InputError if there are several processes. what: what one process has to do, and how to do it."""
        if self.world_size > 1:
            raise InputError(f"{self.world_size} ranks were started, but {what}")


def ranks_of_environment() -> Ranks:
    """This process and its number, from the environment; the only one where no launcher has set its variables.

    Raises:
        InputError: For variables that hold no such numbers.
    """
    for rank_name, world_name, local_name in _LAUNCHERS:
        if rank_name in os.environ and world_name in os.environ:
            rank, world_size = _number(rank_name), _number(world_name)
            if not 0 <= rank < world_size:
                raise InputError(
                    f"{rank_name} is {rank} and {world_name} {world_size}; expected 0 to {world_size - 1}: "
                    f"start the command by torchrun, which sets both, or unset {world_name}"
                )
            return Ranks(rank, world_size, _number(local_name) if local_name in os.environ else rank)
    return Ranks()


def _number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal()):
        raise InputError(
            f"{name} is {text!r:.40}; expected a number: start the command by torchrun, which sets it, or unset {name}"
        )
    return int(text)
