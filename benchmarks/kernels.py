"""How many instructions a GPU executes for each op's case: `python -m benchmarks kernels`, under ncu; see gpu.sh.

Each variant of ours is called once, with a cold L2, after a mark, by which ncu's log is divided into variants.
The length of a kernel's machine code would not do: correctly rounded roots and 64-bit divisions bring paths with them
that hardly ever run (in Triton's `normal` on sm_90, 98 instructions of 608).
"""

import csv
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import ops
from benchmarks.operations import Case
from benchmarks.runs import Options
from ddpm_fast.errors import InputError

METRIC = "smsp__inst_executed.sum"  # of warps
MARK = "spin_kernel"  # of torch.cuda._sleep
WARMUP = 2


def variants(options: Options) -> list[tuple[Case, str]]:
    """What is profiled, in its order."""
    return [
        (case, label)
        for case in options.matching(ops.cases(options.quick, options.place))
        for label in ops.our_labels(case, options.place, options.backends)
        if not ops.KINDS[case.operation].ours and not ops.absent(case, label, options.quick, options.place)
    ]


def call_each(chosen: list[tuple[Case, str]], device: torch.device, start: Callable, stop: Callable) -> None:
    """Each variant, warmed up, once between start() and stop(), after a mark."""
    for case, label in chosen:
        operation = ops.build(case, device)
        with operation.running(label):
            for _ in range(WARMUP):
                operation.variant(label)(None)
            torch.cuda.synchronize(device)
            start()
            torch.cuda._sleep(100)
            operation.variant(label)(None)
            torch.cuda.synchronize(device)
            stop()


def read(path: Path, options: Options) -> dict[tuple[str, str], float]:
    """The warp instructions of one call of each variant, by case and label, all its kernels together, from ncu's log.
    Raises InputError if it cannot be read, or has not as many marks as there are variants."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; expected the log of ncu") from error
    counts: list[float] = []
    for line in csv.DictReader(lines):
        if line["Metric Name"] == METRIC and MARK in line["Kernel Name"]:
            counts.append(0.0)
        elif line["Metric Name"] == METRIC and counts:
            counts[-1] += float(line["Metric Value"].replace(",", ""))
    chosen = variants(options)
    if len(counts) != len(chosen):
        raise InputError(f"{path} has {len(counts)} marks ({MARK}); expected {len(chosen)}, one a variant")
    return {(str(case), label): count for (case, label), count in zip(chosen, counts, strict=True)}


def main(options: Options) -> None:
    """Calls each variant of ours once, for ncu to count."""
    if options.place.type != "cuda":
        raise InputError(f"the device is {options.place}: only a GPU's kernels can be counted; expected cuda")
    call_each(variants(options), options.place, torch.cuda.profiler.start, torch.cuda.profiler.stop)
