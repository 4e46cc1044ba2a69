"""What a GPU executes for each op's case, kernel by kernel: `python -m benchmarks kernels --out FILE.json`.

Under Nsight Compute (ncu), where it is there: instructions executed, and how busy they kept the GPU and its memory, in
one call of each variant with a cold L2. Otherwise names and times by torch.profiler. The length of a kernel's machine
code would not do as a count of instructions: correctly rounded roots and 64-bit divisions bring paths with them that
hardly ever run (in Triton's `normal` on sm_90, 98 instructions of 608).
"""

import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks import ops
from benchmarks.runs import Options, Run, say
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
        sizes = {"grid": line["Grid Size"], "block": line["Block Size"]}
        kernel = kernels.setdefault(int(line["ID"]), {"name": line["Kernel Name"], **sizes})
        value = line["Metric Value"].replace(",", "")
        if (name := names.get(line["Metric Name"])) and value != "n/a":
            kernel[name] = float(value)
    return [kernels[i] for i in sorted(kernels)]


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
    """Each variant, warmed up, once through call(run), which launches the mark first."""
    for case, label in chosen:
        operation = ops.build(case, device)
        variant = operation.variant(label)

        def marked(variant: Callable = variant) -> None:
            torch.cuda._sleep(100)
            variant(None)
            torch.cuda.synchronize(device)

        with operation.running(label):
            for _ in range(WARMUP):
                variant(None)
            torch.cuda.synchronize(device)
            call(marked)


def inside_ncu(run: Callable) -> None:
    torch.cuda.profiler.start()
    run()
    torch.cuda.profiler.stop()


def profiled_by_torch(chosen: list[tuple], device: torch.device) -> list[dict]:
    kernels = []

    def call(run: Callable) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            run()
        events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        for event in sorted(events, key=lambda event: event.time_range.start):
            kernels.append({"name": event.name, "nanoseconds": 1e3 * event.time_range.elapsed_us()})

    call_each(chosen, device, call)
    return kernels


def profiled_by_ncu(arguments: list[str]) -> list[dict]:
    """The kernels of this command, run again under ncu with the same arguments. Raises InputError with what ncu said if
    it gives none: it may lack the right to read the counters."""
    if not shutil.which("ncu"):
        raise InputError("ncu is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--print-units", "base"]
        command += ["--metrics", ",".join(METRICS.values()), "--log-file", str(log)]
        command += [sys.executable, "-m", "benchmarks", "kernels", *arguments, "--inside-ncu"]
        environment = {**os.environ, "LC_ALL": "C"}
        try:
            made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise InputError(f"ncu did not end within {TIMEOUT_S} s") from None
        text = log.read_text() if log.exists() else ""
        if made.returncode or not (kernels := from_ncu(text)):
            said = "\n".join((text + made.stdout + made.stderr).splitlines()[-10:])
            raise InputError(f"ncu counted nothing (status {made.returncode}):\n{said}")
        return kernels


def main(options: Options, is_inside_ncu: bool = False) -> None:
    """Counts what the GPU executes in one call of ours on each backend, for every case."""
    device = options.place
    if device.type != "cuda":
        raise InputError(f"the device is {device}: only a GPU's kernels can be counted; expected cuda")
    chosen = [
        (case, label)
        for case in options.matching(ops.cases(options.quick, device))
        for label in ops.our_labels(case, device, options.backends)
        if not ops.KINDS[case.operation].ours and not ops.absent(case, label, options.quick, device)
    ]
    if is_inside_ncu:
        call_each(chosen, device, inside_ncu)
        return
    run = Run(options.checked(1, 1), {}, how="ncu")
    again = ["--out", str(options.out), "--only", options.only, "--device", options.device]
    again += ["--quick"] * options.quick + [part for name in options.backends for part in ("--backend", name)]
    try:
        kernels = profiled_by_ncu(again)
    except InputError as error:
        say(f"No instructions counted: {error}")
        kernels, run.found["how"] = profiled_by_torch(chosen, device), "torch.profiler"
    run.found["kernels"] = by_variant(kernels, [(str(case), label) for case, label in chosen])
    for case, variants in run.found["kernels"].items():
        for label, group in variants.items():
            counts = ops.instructions(run.found["kernels"], case, label).get("instructions", "not counted")
            seconds = 1e-9 * sum(kernel.get("nanoseconds", 0) for kernel in group)
            say(f"{case} [{label}]: {len(group)} kernels, {1e6 * seconds:.3g} us, warp instructions: {counts}")
    run.finish()
