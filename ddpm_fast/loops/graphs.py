"""CUDA graphs: a step that a loop takes again and again, recorded once and then launched as one.

A small U-Net's step is hundreds of kernels of a few microseconds each, and launching one takes the CPU as long. A graph
replays them with the addresses and the numbers that they were recorded with: whatever differs from step to step must be
in tensors that stay where they are and are written in place. sampling.py and training.py are written so, with or
without a graph; here is when to record, what to keep, and why not.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import nn

from ddpm_fast.errors import InputError

WARM_UP = 2  # runs before a capture: the first compiles kernels and makes tables, the second shows what always waits
KEPT_PLANS = 4  # of a model: two batch sizes (the last batch is smaller), with and without an option
_log = logging.getLogger(__name__)
_capturing = threading.Lock()  # PyTorch allows one capture at a time


def cannot_capture(device: torch.device, model: nn.Module | None = None) -> str:
    """Why work on this device, or this model's on it, cannot be captured now; or the empty string."""
    if device.type != "cuda":
        return f"the network is on {device}, and CUDA graphs are for CUDA devices"
    if torch.is_autocast_enabled(device.type):
        return "autocast is active, whose copies of the weights end with it: give the network the dtype itself"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured already, of which this will be a part"
    if model is None:
        return ""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "the network has forward hooks, which a replay would not call"
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    if others := {type(tensor).__name__ for tensor in tensors} - {"Tensor", "Parameter"}:
        return f"the network has weights of the type {', '.join(sorted(others))}, whose place in memory is not known"
    places = {tensor.device for tensor in tensors}
    return "" if places <= {device} else f"the network is on several devices, {', '.join(sorted(map(str, places)))}"


def refuse(reason: str, asked: bool | None) -> None:
    """What follows from a reason against a graph: InputError if one was asked for, else a line in the log."""
    if asked:
        raise InputError(f"cuda_graph is True, but no graph can be captured: {reason}. Leave it out, or make it False")
    _log.info("no CUDA graph: %s", reason)


class Pool:
    """Memory for graphs of which only one runs at a time. After one that could not be captured none is tried again."""

    def __init__(self, device: torch.device):
        self.device, self.refused = device, ""
        self.handle = torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class CudaGraph:
    """One recording, in a pool's memory."""

    def __init__(self, pool: Pool):
        self._pool, self._graph = pool, torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], object]) -> None:
        """Records what run() launches, which is not executed. Raises RuntimeError for what cannot be recorded."""
        device, pool = self._pool.device, self._pool.handle
        # The outer stream, because torch.cuda.graph leaves its own behind if the capture fails.
        with _capturing, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            # thread_local: what other threads allocate meanwhile is not our capture's affair.
            options = {"stream": _capture_stream(device), "capture_error_mode": "thread_local"}
            try:
                with torch.cuda.graph(self._graph, pool=pool, **options):
                    run()
            except BaseException:
                # Up to PyTorch 2.11 the allocator still thinks that it captures, fails at every empty_cache(), and
                # keeps a pointer to the graph (pytorch/pytorch#180395). If it does not, this raises.
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                    _unfinished.append(self._graph)
                raise

    def replay(self) -> None:
        self._graph.replay()


_unfinished: list[torch.cuda.CUDAGraph] = []


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all: memory that a pool's first graph has freed serves the next one on the same stream alone.
    return torch.cuda.Stream(device)


class Repeated:
    """Calls one function again and again: as it is at first, and then by replaying its graph.

    The first calls are the warm-up that a capture needs, and do their work like all others: nothing runs for nothing,
    and since a capture executes nothing there is no state to put back. The function is given at each call, and not
    kept: it may hold on to a model.
    """

    def __init__(self, pool: Pool, careful: bool = False):
        """careful: look during the warm-up whether the function waits for the device, which is kinder to PyTorch than a
        capture that fails by it. Such a function must start with what may wait, since it is then called once more.
        While it is watched, other threads may not wait either."""
        self._pool, self._careful = pool, careful
        self._graph: CudaGraph | None = None
        self._calls = 0

    def __call__(self, run: Callable[[], object], asked: bool | None = None) -> None:
        """One more call. Raises InputError if a graph was asked for (see refuse) and this function cannot have one."""
        if self._graph is None and not self._pool.refused and self._calls >= WARM_UP:
            self._capture(run, asked)
        self._calls += 1
        if self._graph is not None:
            self._graph.replay()
        elif self._careful and not self._pool.refused and self._calls == WARM_UP:
            self._run_watched(run, asked)
        else:
            run()

    def _capture(self, run: Callable[[], object], asked: bool | None) -> None:
        graph = CudaGraph(self._pool)
        try:
            graph.capture(run)
        except RuntimeError as error:
            self._refuse(f"its capture failed ({str(error).splitlines()[0]})", asked)
        else:
            self._graph = graph

    def _run_watched(self, run: Callable[[], object], asked: bool | None) -> None:
        try:
            with _no_waiting():
                run()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            self._refuse("the network waits for the device, by .item(), nonzero() or a copy from the CPU", asked)
            run()

    def _refuse(self, reason: str, asked: bool | None) -> None:
        self._pool.refused = reason
        refuse(reason, asked)


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside, whatever waits for the GPU raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Plans:
    """The graphs of one model as it is now, each with its tensors: the most recent ones, by what they were made for.

    Their memory between replays is one pool, so that they need as much as the largest of them.
    """

    def __init__(self, device: torch.device, baked: Hashable):
        self.baked, self.pool = baked, Pool(device)
        self.lock = threading.RLock()
        self.done: torch.cuda.Event | None = None  # after the latest use of the pool, on whatever stream that was
        self._kept: OrderedDict[Hashable, object] = OrderedDict()

    def take(self, key: Hashable) -> object | None:
        """The plan made for key, or None. It is the caller's alone until put back: a callback may sample too."""
        return self._kept.pop((key, self._stream()), None)

    def put(self, key: Hashable, plan: object) -> None:
        """Keep a plan, and forget the oldest beyond KEPT_PLANS."""
        self._kept[key, self._stream()] = plan
        while len(self._kept) > KEPT_PLANS:
            self._kept.popitem(last=False)

    def _stream(self) -> int:
        # A plan's tensors are freed for their own stream to use again, which would not wait for another's replays.
        device = self.pool.device
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


_plans: weakref.WeakKeyDictionary[nn.Module, Plans] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def plans_of(model: nn.Module, device: torch.device) -> Iterator[Plans | None]:
    """A model's plans, new ones if it has changed; None while another thread has them. Nothing kept may hold on to the
    model, or neither would ever be freed."""
    baked = _baked(model)
    plans = _plans.get(model)
    if plans is None or plans.baked != baked:
        plans = _plans[model] = Plans(device, baked)
    if not plans.lock.acquire(blocking=False):
        yield None
        return
    try:
        if plans.done is not None:
            torch.cuda.current_stream(device).wait_event(plans.done)
        yield plans
    finally:
        if device.type == "cuda":
            plans.done = torch.cuda.current_stream(device).record_event()
        plans.lock.release()


def _baked(model: nn.Module) -> Hashable:
    """What of a model and of PyTorch's settings is in a graph for good: where the weights are (not what they are), the
    modules and their plain attributes."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    modules = (
        (id(module), *((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))))
        for module in model.modules()
    )
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda
    return (
        tuple((t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in tensors),
        tuple(modules),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision, matmul.matmul.fp32_precision),
        (torch.are_deterministic_algorithms_enabled(), matmul.flash_sdp_enabled(), matmul.mem_efficient_sdp_enabled()),
        (matmul.math_sdp_enabled(), matmul.cudnn_sdp_enabled()),
    )
