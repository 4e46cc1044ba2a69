"""What the processes of one command do as one: what goes wrong in one of them, or stops it, stops all of them, with
the same exit status, and is told once. (That only the first one prints is plain_errors' doing, see common.py.)

In one process alone, everything here does nothing more than to call what it is given.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from ddpm_fast.commands.common import errors, in_words
from ddpm_fast.commands.ranks import Ranks
from ddpm_fast.commands.stopping import Stopped, Stopping
from ddpm_fast.errors import InputError
from ddpm_fast.loops.distributed import join, of_each_process, of_first_process, rank, world_size

T = TypeVar("T")

# How long a rank that is done waits for the slowest one. One that died is noticed at once.
_LONGEST = timedelta(days=7)
# Gloo's errors are general ones, which only their texts tell apart.
_LOST = re.compile(r"closed by peer|reset by peer|broken pipe|timed out", re.IGNORECASE)


@contextlib.contextmanager
def joined(ranks: Ranks, command: str) -> Iterator[None]:
    """Inside, the ranks of a command can tell each other what they have found.

    Args:
        ranks: This process among them.
        command: What the command is called behind `-m ddpm_fast.`, for the message.

    Raises:
        InputError: If they do not find each other.
    """
    with join(torch.device("cpu"), timeout=_LONGEST):
        if ranks.world_size != world_size():  # srun does not say where the first rank is
            raise InputError(
                f"{ranks.world_size} ranks were started, but not by torchrun, by which they find each other: start "
                f"`torchrun ... -m ddpm_fast.{command}`, or one process"
            )
        yield


class _Outcome(NamedTuple):
    """How something ended in one process. Without a text and without a stop it succeeded."""

    error: str = ""
    stopped: bool = False


def in_all(act: Callable[[], T], expected: type[Exception] = Exception) -> T:
    """Do something in each process, and go on only if it succeeded in all of them.

    Args:
        act: It must not wait for another process, unless what is expected goes wrong in all of them.
        expected: Which errors are told to all. Another one, and one that is no fault of the input, of a file or of
            memory, ends its process at once; whatever started the processes ends the others.

    Returns:
        What it gave in this process.

    Raises:
        InputError: In all processes, if it failed in one. The first process shows the message, which names the process
            unless it failed in all of them.
        Stopped: In all processes, if a signal stopped it in one.
    """
    if world_size() == 1:
        return act()
    outcome = _Outcome()
    try:
        result = act()
    except Stopped:
        outcome = _Outcome(stopped=True)
    except expected as error:
        outcome = _Outcome(in_words(error))
        if not outcome.error:
            raise
    outcomes = of_each_process(outcome)
    if any(each.stopped for each in outcomes):
        raise Stopped
    if text := _failure([each.error for each in outcomes]):
        errors.quiet = rank() > 0
        raise InputError(text)
    return result


def in_first(act: Callable[[], T]) -> T:
    """Do something in the first process alone, and give its result, which must be something that can be pickled, to
    all. Raises what in_all raises."""
    return of_first_process(in_all(lambda: act() if rank() == 0 else None))


def share_signal(stopping: Stopping, say: Callable[[str], object]) -> None:
    """Let a signal that has reached one process count in all of them, so that they end with the same status.

    All processes call this at the same place, when they have stopped.

    Args:
        stopping: This process's.
        say: Prints a line.
    """
    signals: Sequence[signal.Signals | None] = of_each_process(stopping.signal)
    for number, arrived in enumerate(signals):
        if arrived is not None:
            if signals[0] is None:
                say(f"Rank {number} was asked to stop ({arrived.name})")
            stopping.signal = arrived
            return


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Inside, what torch raises because another process has ended, or does not answer, becomes an InputError."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        raise InputError(
            f"another rank has ended, or cannot be reached ({str(error).splitlines()[0]:.300}): look at what it said, "
            "and start all of them again with --auto-resume, which goes on from the last saved state (torchrun "
            "--max-restarts does so by itself)"
        ) from error


def _failure(texts: Sequence[str]) -> str:
    """What to say if something failed, each process having said so much of it, the empty string if it went well."""
    if all(text == texts[0] for text in texts):
        return texts[0]
    number, text = next((number, text) for number, text in enumerate(texts) if text)
    return f"rank {number}: {text}"
