"""CUDA graphs: what a loop does again and again, captured once and then launched as one.

A training step or a sampler row of a small U-Net is hundreds of kernels of a few microseconds each, and launching one
takes the CPU as long. A graph replays them with the addresses and the numbers that they were captured with, so whatever
differs from one repetition to the next must be in tensors that stay where they are and are written in place.
sampling.py and training.py are written this way, with or without a graph. This file decides when to capture, what to
keep, and when no graph is possible.
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
from typing import Any

import torch
from torch import nn

from ddpm_fast import compat
from ddpm_fast.errors import InputError

WARM_UP = 2  # calls before a capture: the first compiles kernels and makes tables, the second shows what always waits
KEPT_REPLAYS = 4  # for each model: two batch sizes (the last batch is smaller), with and without an option
_log = logging.getLogger("ddpm_fast.graphs")  # the name that the documentation gives
_capturing = threading.Lock()  # PyTorch allows one capture at a time


def cannot_capture(device: torch.device, model: nn.Module | None = None) -> str:
    """Why work on this device, or the work of this model there, cannot be captured now; or the empty string."""
    if device.type != "cuda":
        return f"the network is on {device}, and CUDA graphs are for CUDA devices"
    if torch.is_autocast_enabled(device.type):
        return "autocast is active, and its copies of the weights do not outlive it: cast the network itself instead"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured already, and this work becomes a part of it"
    if model is None:
        return ""
    if any(compat.has_forward_hooks(module) for module in model.modules()):
        return "the network has forward hooks, which a replay would not call"
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    if others := {type(tensor).__name__ for tensor in tensors} - {"Tensor", "Parameter"}:
        return f"the network has weights of the type {', '.join(sorted(others))}, whose address in memory is unknown"
    places = {tensor.device for tensor in tensors}
    return "" if places <= {device} else f"the network is on several devices, {', '.join(sorted(map(str, places)))}"


def refuse(reason: str, asked: bool | None) -> None:
    """Act on a reason against a graph: raise InputError if a graph was asked for, or else write a line to the log."""
    if asked:
        raise InputError(
            f"cuda_graph is True, but no graph can be captured: {reason}. Leave cuda_graph out, or give False"
        )
    _log.info("no CUDA graph: %s", reason)


class Pool:
    """Memory for graphs of which only one runs at a time.

    Attributes:
        device: Where the graphs run.
        refused: Why a graph could not be captured, or the empty string. After one failure no other capture is tried.
        handle: PyTorch's handle of the memory; None without CUDA.
    """

    def __init__(self, device: torch.device):
        self.device, self.refused = device, ""
        self.handle = torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class CudaGraph:
    """One captured graph, in the memory of a pool."""

    def __init__(self, pool: Pool):
        self._pool, self._graph = pool, torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], object]) -> None:
        """Capture what run() launches, without executing it. Raises RuntimeError for what cannot be captured."""
        device, pool = self._pool.device, self._pool.handle
        # The outer stream, because torch.cuda.graph leaves its own behind if the capture fails.
        with _capturing, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            capturing = torch.cuda.graph(
                self._graph,
                pool=pool,
                stream=_capture_stream(device),
                capture_error_mode="thread_local",  # what other threads allocate meanwhile must not stop this capture
            )
            try:
                with capturing:
                    run()
            except BaseException:
                if compat.end_failed_capture(torch.cuda.current_device(), pool):
                    _unfinished.append(self._graph)  # the allocator keeps a pointer to it
                raise

    def replay(self) -> None:
        self._graph.replay()


def _clear_generator(device: torch.device) -> None:
    """Let PyTorch's generator know that the capture which has just failed is over.

    Up to torch 2.11 only the end of a capture that succeeds tells it so. Without one the next torch.randn or dropout,
    and the replay of any other graph, raises "Offset increment outside graph capture encountered unexpectedly". So
    one kernel is captured and thrown away, in memory of its own, which is freed with the graph.
    """
    place = torch.empty(1, device=device)
    # The first failure is what the caller has to hear of.
    with contextlib.suppress(RuntimeError):
        CudaGraph(Pool(device)).capture(place.zero_)


_unfinished: list[torch.cuda.CUDAGraph] = []


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    # One stream for all captures: memory that a pool's first graph has freed serves the next one only on that stream.
    return torch.cuda.Stream(device)


class Repeated:
    """Calls one function again and again: directly at first, and then by replaying its graph.

    The first calls are the warm-up that a capture needs. They do real work like all others, so nothing is computed in
    vain, and since a capture executes nothing there is no state to restore. The function is given at each call and not
    kept, because it may hold on to a model.
    """

    def __init__(self, pool: Pool, careful: bool = False):
        """Make one that has not been called yet.

        Args:
            pool: The memory for its graph.
            careful: Whether to look during the warm-up if the function waits for the device, which leaves PyTorch in a
                better state than a capture that fails for that reason. The function must then begin with the part that
                may wait, since it is called once more after it was found to. While it is watched, other threads may not
                wait for the device either.
        """
        self._pool, self._careful = pool, careful
        self._graph: CudaGraph | None = None
        self._calls = 0

    def __call__(self, run: Callable[[], object], asked: bool | None = None) -> None:
        """Call the function once more. Raises InputError if a graph was asked for and cannot be captured (see
        refuse)."""
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
        except BaseException as error:
            _clear_generator(self._pool.device)
            if not isinstance(error, RuntimeError):
                raise
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
            self._refuse("the network waits for the device, in .item(), nonzero() or a copy from the CPU", asked)
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


class Replay:
    """A state whose advances are replayed, with one graph for each kind of advance.

    Attributes:
        state: The tensors that the graphs read and write.
    """

    def __init__(self, state: Any, pool: Pool, careful: bool):
        """See Repeated for pool and careful."""
        self.state = state
        self._new = functools.partial(Repeated, pool, careful)
        self._kinds: dict[Hashable, Repeated] = {}

    def of(self, kind: Hashable) -> Repeated:
        """What replays the advances of one kind."""
        if kind not in self._kinds:
            self._kinds[kind] = self._new()
        return self._kinds[kind]


class Replays:
    """The replays of one model as it is now: the most recent ones, by the layout that they were made for.

    Their memory between two uses is one pool, so that together they need as much as the largest of them.
    """

    def __init__(self, device: torch.device, baked: Hashable):
        self.baked, self.pool = baked, Pool(device)
        self.lock = threading.RLock()
        self.done: torch.cuda.Event | None = None  # after the latest use of the pool, on whatever stream that was
        self._kept: OrderedDict[Hashable, Replay] = OrderedDict()

    def take(self, layout: Hashable) -> Replay | None:
        """The replay made for a layout, or None. It is the caller's alone until put back: on_step may sample too."""
        return self._kept.pop((layout, self._stream()), None)

    def put(self, layout: Hashable, replay: Replay) -> None:
        """Keep a replay, and forget the oldest beyond KEPT_REPLAYS."""
        self._kept[layout, self._stream()] = replay
        while len(self._kept) > KEPT_REPLAYS:
            self._kept.popitem(last=False)

    def _stream(self) -> int:
        # A replay's tensors are freed for reuse on their own stream, which would not wait for the work of another one.
        device = self.pool.device
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


_Replays = weakref.WeakKeyDictionary[nn.Module, Replays]
_replays: _Replays = weakref.WeakKeyDictionary()
_guided: weakref.WeakKeyDictionary[nn.Module, _Replays] = weakref.WeakKeyDictionary()  # by model, then by classifier


@contextlib.contextmanager
def replays_of(
    model: nn.Module, device: torch.device, asked: bool | None = None, classifier: nn.Module | None = None
) -> Iterator[Replays | None]:
    """A model's replays, or those of a model and a classifier that guides it; new ones if either has changed.

    Inside, None if a capture of this model has failed before (see refuse for asked), or while another thread uses them.
    Nothing that is kept may hold on to the model, or neither would ever be freed.
    """
    baked = _baked(model), None if classifier is None else _baked(classifier)
    kept = _replays if classifier is None else _guided.setdefault(model, weakref.WeakKeyDictionary())
    key = model if classifier is None else classifier
    replays = kept.get(key)
    if replays is None or replays.baked != baked:
        replays = kept[key] = Replays(device, baked)
    if not replays.lock.acquire(blocking=False):
        yield None
        return
    try:
        if replays.pool.refused:
            refuse(replays.pool.refused, asked)
        if replays.done is not None:
            torch.cuda.current_stream(device).wait_event(replays.done)
        yield None if replays.pool.refused else replays
    finally:
        if device.type == "cuda":
            replays.done = torch.cuda.current_stream(device).record_event()
        replays.lock.release()


def _baked(model: nn.Module) -> Hashable:
    """What a graph fixes of a model and of PyTorch's settings: where the weights are (not their values), the modules
    and their plain attributes."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    modules = (
        (id(module), *((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))))
        for module in model.modules()
    )
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda
    conv = cudnn.conv  # type: ignore[attr-defined]  # torch's annotations lack it
    return (
        tuple((t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in tensors),
        tuple(modules),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, conv.fp32_precision, matmul.matmul.fp32_precision),
        (torch.are_deterministic_algorithms_enabled(), matmul.flash_sdp_enabled(), matmul.mem_efficient_sdp_enabled()),
        (matmul.math_sdp_enabled(), matmul.cudnn_sdp_enabled()),
    )
