"""How long calls take: variants that take turns, so that noise is common to them, and what follows from their times.

On the CPU a call is timed by itself. On a GPU, where calls only enter a queue and take microseconds, a run of many is
timed between two events: calls from Python, or replays of a CUDA graph of them.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ddpm_fast.loops.graphs import CudaGraph, Pool

WARMUP = 3
RESAMPLES = 10_000
L2_TIMES = 4  # a rotation goes through so many times the L2 before it comes back to the same tensors
BATCH_SECONDS = 4e-3  # what is timed at once: a hundred times what the first launch takes to reach an idle GPU
MAX_REPEATS = 1000
GRAPH_CALLS = 50  # in a graph, at least: the launch of the graph itself, some microseconds, is divided by it

Call = Callable[[], object]


class Batch(NamedTuple):
    """What is timed at once: run() makes `calls` calls, inside the context that within() gives."""

    run: Call
    calls: int
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def seconds_of(run: Call, device: torch.device) -> float:
    """The time from an idle device to the end of what run() starts on it."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    run()
    last.record()
    last.synchronize()
    return 1e-3 * first.elapsed_time(last)


def batch(calls: Sequence[Call], device: torch.device) -> Batch:
    """The calls in their order: on the CPU once, on a GPU as often as fills BATCH_SECONDS, warmed up."""

    def once() -> None:
        for call in calls:
            call()

    return _repeated(once, len(calls), device)


def graph_batch(calls: Sequence[Call], device: torch.device) -> Batch:
    """Replays of a CUDA graph of the calls in their order, several rounds of them where they are few.

    Where several calls take turns each keeps its results, and so has memory of its own for them: that of the call
    before it would be in the L2. Raises RuntimeError for calls that cannot be captured.
    """
    several = [*calls] * math.ceil(GRAPH_CALLS / len(calls))
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in several[:WARMUP]:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    kept: list = []

    def once() -> None:
        for call in several:
            kept.append(call())
            if len(calls) == 1:
                kept.clear()

    graph = CudaGraph(Pool(device))
    graph.capture(once)

    def replay(_kept: list = kept) -> None:  # the results live as long as the graph that writes them
        graph.replay()

    return _repeated(replay, len(several), device)


def _repeated(run: Call, calls: int, device: torch.device) -> Batch:
    if device.type != "cuda":
        return Batch(run, calls)
    seconds = min(seconds_of(run, device) for _ in range(WARMUP))
    repeats = max(1, min(MAX_REPEATS, math.ceil(BATCH_SECONDS / max(seconds, 1e-9))))

    def repeated() -> None:
        for _ in range(repeats):
            run()

    return Batch(repeated, calls * repeats)


def interleaved(batches: Sequence[Batch], rounds: int, device: torch.device, warmup: int = WARMUP) -> np.ndarray:
    """Seconds a call of each batch in each round, [rounds, batches], after those of the warmup; in a round they take
    turns."""
    seconds = np.empty((rounds + warmup, len(batches)))
    for row in seconds:
        for i, each in enumerate(batches):
            with each.within():
                row[i] = seconds_of(each.run, device) / each.calls
    return seconds[warmup:]


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the median (Efron 1979)."""
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), (2.5, 97.5))
    return float(low), float(high)


def rotation(bytes_per_call: int, l2_bytes: int) -> int:
    """How many sets of tensors, used in turn, leave none of a set in the L2 when its turn comes again."""
    return math.ceil(L2_TIMES * l2_bytes / max(1, bytes_per_call))
