"""The processes that train together (torch.distributed), and what they tell each other. Without them there is one.

Nothing here starts a process: torchrun, accelerate launch, srun or Ray do.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_fast.errors import InputError

# What torchrun tells each process, and those that follow its convention.
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long a process waits for the others, before it takes one of them for dead. Longer than the longest work that one
# does alone: writing a checkpoint to a slow disk.
TIMEOUT = timedelta(minutes=30)


_CALL = "ddpm_fast-call"  # the key of torchrun's store under which the first process calls the others


class RanksDiffer(RuntimeError):
    """Processes that train together, and should have the same weights, have not. The message names them."""


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _is_on() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _is_on() else 1


def local_device(name: str = "auto") -> torch.device:
    """The device of this process.

    Args:
        name: "auto": the GPU, or the CPU where there is none. "cuda": the GPU. Where several processes of a machine
            train together, each gets a GPU of its own. Another name is that device, such as "mps" or "xpu", for which
            there are no kernels here: plain torch does all of it.

    Raises:
        InputError: If there is no such device.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda" and device.index is None and (places := torch.cuda.device_count()):
            device = torch.device("cuda", _local_rank() % places)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(
            f"device {name!r} cannot be used here ({first_line}); expected auto, cpu, cuda, mps or xpu"
        ) from None
    return device


@contextmanager
def join(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Inside, the processes that were started together train together.

    A process group that is initialised already is used as it is, and stays. Otherwise torchrun's environment variables
    (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) say who the others are. Without these, or where there
    are no others, the process is alone.

    Args:
        device: Where this process trains; see local_device.
        timeout: How long to wait for another process before giving up.

    Raises:
        InputError: If the environment variables are incomplete or wrong, or the processes do not find each other.
    """
    if _is_on() or not _are_several():
        yield
        return
    if device.type == "cuda":
        device = local_device("cuda") if device.index is None else device
        torch.cuda.set_device(device)
    alone = device.type == "cuda" and _number("LOCAL_WORLD_SIZE", 1) <= torch.cuda.device_count()
    try:
        dist.init_process_group(
            # What is told on the side, and is on no GPU, goes by gloo. So does all where GPUs are shared.
            backend="cpu:gloo,cuda:nccl" if alone else "gloo",
            timeout=timeout,
            device_id=device if alone else None,
            **_meeting(timeout),
        )
    except (RuntimeError, ValueError) as error:
        told = ", ".join(f"{name}={os.environ.get(name)}" for name in _ENVIRONMENT)
        raise InputError(
            f"the processes that should train together do not find each other ({told}): "
            f"{str(error).splitlines()[0]:.200}. Start them with torchrun, or check these environment variables"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def of_each_process(value: Any) -> list[Any]:
    """What each process gives, in their order: things that can be pickled. It waits for all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def to_first_process(value: Any) -> list[Any] | None:
    """What each process gives, in their order, in the first process alone; None in the others. For what is large."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def of_first_process(value: Any) -> Any:
    """What the first process gives, in every process: something that can be pickled."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def in_first_process(act: Callable[[], object]) -> None:
    """Let the first process do something, such as to write. The InputError that it meets is raised in all of them."""
    problem = None
    if rank() == 0:
        try:
            act()
        except InputError as error:
            problem = error
    if problem := of_first_process(problem):
        raise problem


def sum_over_processes(x: Tensor) -> None:
    """Replace x by its sum over all processes, where it is. On a GPU nothing waits for it."""
    if world_size() > 1:
        dist.all_reduce(x)


def check_same(what: str, values: Sequence[Any]) -> None:
    """Raises RanksDiffer naming the processes whose value is not that of most.

    Args:
        what: What the values are of, for the message.
        values: One of each process, in their order.
    """
    counts = Counter(values)
    if len(counts) == 1:
        return
    usual, many = counts.most_common(1)[0]
    others = [str(number) for number, value in enumerate(values) if value != usual]
    if 2 * many > len(values):
        found = f"{what} of rank {', '.join(others)} {'is' if len(others) == 1 else 'are'} not that of the other ranks"
    else:
        found = f"{what} differs between the ranks, and no more than {many} of {len(values)} agree"
    raise RanksDiffer(f"{found}. Nothing was saved. Resume from the last saved state; look at that machine's memory")


def _is_on() -> bool:
    return dist.is_available() and dist.is_initialized()


def _are_several() -> bool:
    """Whether the environment says that this is one of several processes."""
    if "RANK" not in os.environ or _number("WORLD_SIZE", 1) == 1:
        return False
    if missing := [name for name in _ENVIRONMENT if name not in os.environ]:
        raise InputError(
            f"RANK is set, but {', '.join(missing)} is not: start the processes with torchrun, or set what it sets"
        )
    if not dist.is_available():
        raise InputError("this build of torch has no torch.distributed: train with one process")
    number, count = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if number >= count:
        raise InputError(f"RANK is {number} and WORLD_SIZE {count}; expected a rank in 0..{count - 1}")
    return True


def _meeting(timeout: timedelta) -> dict[str, Any]:
    """Where the processes meet, as arguments of init_process_group; none where torch's own way will do.

    torchrun starts all processes again after one has died (--max-restarts), and hands them the same store, in which
    the addresses of the dead ones still stand: torch 2.13 connects to those, and fails. So the first process makes a
    name for this meeting, and they use the part of the store that has it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    number, count = _number("RANK", 0), _number("WORLD_SIZE", 1)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0), is_master=False, wait_for_workers=False, timeout=timeout
    )
    name = _call_the_others(store, count) if number == 0 else _answer_the_first(store, number, timeout)
    return {"store": dist.PrefixStore(name, store), "rank": number, "world_size": count}


def _call_the_others(store: dist.Store, count: int) -> str:
    """Make a name, and wait until all others have answered it. Nobody can answer it later."""
    name = f"ddpm_fast-{secrets.token_hex(8)}"
    store.set(_CALL, name)
    store.wait([f"{name}/{number}" for number in range(1, count)])
    store.set(_CALL, "")
    store.set(f"{name}/met", "")
    return name


def _answer_the_first(store: dist.Store, number: int, timeout: timedelta) -> str:
    """Answer the first process until it has heard all. A call may be one of a process that died before it had."""
    end, name = time.monotonic() + timeout.total_seconds(), ""
    while not (name and store.check([f"{name}/met"])):
        if time.monotonic() > end:
            raise RuntimeError(f"rank 0 did not answer within {timeout}")
        called = store.get(_CALL).decode() if store.check([_CALL]) else ""
        if called and called != name:
            name = called
            store.set(f"{name}/{number}", "")
        time.sleep(0.02)
    return name


def _local_rank() -> int:
    """The number of this process among those on its machine."""
    return _number("LOCAL_RANK", rank()) if _is_on() or _are_several() else 0


def _number(name: str, default: int) -> int:
    """The count in an environment variable. Raises InputError if it is none."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"the environment variable {name} is {text!r:.99}; expected a number")
    return int(text)
