"""What a GPU executes for each op's case, kernel by kernel: `python -m benchmarks kernels --out FILE.json`.

Under Nsight Compute (ncu), where it is there: instructions executed, bytes that reach the memory, and how busy both
kept the GPU, in one call of each variant with a cold L2. Otherwise names, launch sizes and times by torch.profiler. The
length of a kernel's machine code would not do as a count of instructions: correctly rounded roots and 64-bit divisions
bring paths with them that hardly ever run (in Triton's `normal` on sm_90, 98 instructions of 608).
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.markup import escape

from benchmarks import ops
from benchmarks.runs import Options, Run, checked, matching
from ddpm_fast.commands.common import console
from ddpm_fast.errors import InputError

METRICS = {
    "instructions": "smsp__inst_executed.sum",  # of warps
    "nanoseconds": "gpu__time_duration.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
MARK = "spin_kernel"  # of torch.cuda._sleep: one is launched before the kernels of each variant
WARMUP = 2
TIMEOUT_S = 240  # of ncu


def from_ncu(text: str) -> list[dict]:
    """The kernels of an ncu log in the order of their launch: ncu --csv --print-units base, a line for each metric."""
    names = {metric: name for name, metric in METRICS.items()}
    kernels: dict[int, dict] = {}
    for line in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        kernel = kernels.setdefault(int(line["ID"]), {"name": line["Kernel Name"]})
        kernel["grid"], kernel["block"] = (
            [int(size) for size in line[f"{what} Size"].strip("()").split(",")] for what in ("Grid", "Block")
        )
        value = line["Metric Value"].replace(",", "")
        if (name := names.get(line["Metric Name"])) and value != "n/a":
            kernel[name] = float(value)
    return [kernels[i] for i in sorted(kernels)]


def from_trace(trace: dict) -> list[dict]:
    """The kernels of torch.profiler's trace (Kineto's, Chrome's format), in the order of their start."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and event.get("cat") == "kernel"]
    return [
        {
            "name": event["name"],
            "grid": event["args"]["grid"],
            "block": event["args"]["block"],
            "nanoseconds": 1e3 * event["dur"],
            "registers": event["args"].get("registers per thread"),
        }
        for event in sorted(events, key=lambda event: event["ts"])
    ]


def by_variant(kernels: list[dict], order: Iterable[tuple[str, str]]) -> dict:
    """{case: {label: [kernel]}} of kernels in the order of their launch, a mark before each variant's.

    Raises InputError if the marks are not as many as the variants: then nothing can be said of any.
    """
    order, groups = list(order), []
    for kernel in kernels:
        if MARK in kernel["name"]:
            groups.append([])
        elif groups:
            groups[-1].append(kernel)
    if len(groups) != len(order):
        raise InputError(f"the profile has {len(groups)} marks ({MARK}); expected {len(order)}, one a variant")
    found: dict = {}
    for (case, label), group in zip(order, groups, strict=True):
        found.setdefault(case, {})[label] = group
    return found


def call_each(chosen: list[tuple], device: torch.device, call: Callable[[Callable], None]) -> None:
    """Each variant, warmed up, once through call(run)."""
    for case, label in chosen:
        operation = ops.build(case, device)
        variant = operation.variant(label)
        with operation.running(label):
            for _ in range(WARMUP):
                variant(None)
            torch.cuda.synchronize(device)
            call(lambda variant=variant: variant(None))
            torch.cuda.synchronize(device)


def marked(run: Callable) -> None:
    torch.cuda._sleep(100)
    run()


def marked_for_ncu(run: Callable) -> None:
    torch.cuda.profiler.start()
    marked(run)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profiled_by_torch(chosen: list[tuple], device: torch.device) -> list[dict]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"

        def call(run: Callable) -> None:
            with torch.profiler.profile(activities=activities) as profiler:
                marked(run)
                torch.cuda.synchronize(device)
            profiler.export_chrome_trace(str(path))
            kernels.extend(from_trace(json.loads(path.read_text())))

        call_each(chosen, device, call)
    return kernels


def profiled_by_ncu(arguments: list[str]) -> list[dict]:
    """The kernels of this command, run again under ncu with the same arguments. Raises InputError with what ncu said if
    it gives none: it may lack the right to read the counters."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--print-units", "base"]
        command += ["--metrics", ",".join(METRICS.values()), "--log-file", str(log)]
        command += [sys.executable, "-m", "benchmarks", "kernels", *arguments, "--inside-ncu"]
        environment = {**os.environ, "LC_ALL": "C"}
        try:
            made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"ncu did not run: {error}") from None
        text = log.read_text() if log.exists() else ""
        if made.returncode or not (kernels := from_ncu(text)):
            said = "\n".join((text + made.stdout + made.stderr).splitlines()[-10:])
            raise InputError(f"ncu counted nothing (status {made.returncode}):\n{said}")
        return kernels


def main(options: Options, inside_ncu: bool = False) -> None:
    """Counts what the GPU executes in one call of ours on each backend, for every case."""
    device = options.place
    if device.type != "cuda":
        raise InputError(f"the device is {device}: only a GPU's kernels can be counted; expected cuda")
    chosen = [
        (case, label)
        for case in matching(ops.cases(options.quick, device), options.only)
        for label in ops.our_labels(case, device, options.backends)
        if not ops.KINDS[case.operation].ours and not ops.absent(case, label, options.quick, device)
    ]
    if inside_ncu:
        call_each(chosen, device, marked_for_ncu)
        return
    run = Run(checked(options, 1, 1), {})
    again = ["--out", str(options.out), "--only", options.only, "--device", options.device]
    again += ["--quick"] * options.quick + [part for name in options.backends for part in ("--backend", name)]
    how = "ncu"
    try:
        if not shutil.which("ncu"):
            raise InputError("ncu is not on the PATH")
        kernels = profiled_by_ncu(again)
    except InputError as error:
        console.print(f"[yellow]No instructions counted:[/] {escape(str(error))}", soft_wrap=True)
        how, kernels = "torch.profiler", profiled_by_torch(chosen, device)
    found = by_variant(kernels, [(str(case), label) for case, label in chosen])
    run.found |= {"how": how, "kernels": found}
    for case, variants in found.items():
        for label, group in variants.items():
            for kernel in group:
                facts = [f"{name} {value:g}" for name, value in kernel.items() if isinstance(value, int | float)]
                name = kernel["name"].split("(")[0].removeprefix("void ")[:60]
                console.print(escape(f"{case} [{label}] {name}: {', '.join(facts)}"), soft_wrap=True)
    run.finish()
