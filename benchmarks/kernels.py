"""What a GPU executes for each case, kernel by kernel: `python -m benchmarks.kernels --out FILE.json`.

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
from typing import Annotated

import torch
import typer
from rich.markup import escape

from ddpm_fast import cases, machine, report
from ddpm_fast.commands.common import choose_device, console, plain_errors
from ddpm_fast.errors import InputError

METRICS = {
    "instructions": "smsp__inst_executed.sum",  # of warps
    "nanoseconds": "gpu__time_duration.sum",
    "dram_bytes": "dram__bytes.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
MARK = "spin_kernel"  # of torch.cuda._sleep: one is launched before the kernels of each variant
WARMUP = 2
TIMEOUT_S = 240  # of ncu

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def read(path: Path | None) -> dict:
    """What main() wrote: {case: {label: [kernel]}}; empty without a file. Raises InputError for any other file."""
    if path is None:
        return {}
    try:
        return json.loads(path.read_text())["cases"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not what `python -m benchmarks.kernels --out` writes: {error!r}") from None


def instructions(counted: dict, case: cases.Case, label: str) -> float | None:
    """Warp instructions of one call of a variant, all its kernels together; None where they were not counted."""
    return _sum(counted, case, label, "instructions")


def seconds(counted: dict, case: cases.Case, label: str) -> float | None:
    """The time of all kernels of one call of a variant, by ncu with a cold L2; None where it was not taken."""
    nanoseconds = _sum(counted, case, label, "nanoseconds")
    return None if nanoseconds is None else 1e-9 * nanoseconds


def _sum(counted: dict, case: cases.Case, label: str, name: str) -> float | None:
    values = [kernel.get(name) for kernel in counted.get(str(case), {}).get(label, [])]
    return sum(values) if values and None not in values else None


def from_ncu(text: str) -> list[dict]:
    """The kernels of an ncu log in the order of their launch: ncu --csv --print-units base, a line for each metric."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    names = {metric: name for name, metric in METRICS.items()}
    kernels: dict[int, dict] = {}
    for line in csv.DictReader(lines):
        kernel = kernels.setdefault(
            int(line["ID"]),
            {"name": line["Kernel Name"], "grid": _sizes(line["Grid Size"]), "block": _sizes(line["Block Size"])},
        )
        if name := names.get(line["Metric Name"]):
            kernel[name] = _number(line["Metric Value"])
    return [kernels[i] for i in sorted(kernels)]


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.strip("()").split(",")]


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:  # "n/a"
        return None


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


def call_each(chosen: list[tuple[cases.Case, str]], device: torch.device, call: Callable[[Callable], None]) -> None:
    """Each variant, warmed up, once through call(run)."""
    for case, label in chosen:
        operation = cases.build(case, device)
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


def profiled_by_torch(chosen: list[tuple[cases.Case, str]], device: torch.device) -> list[dict]:
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
    """The kernels of this module, run again under ncu with the same arguments. Raises InputError with what ncu said if
    it gives none: it may lack the right to read the counters."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [
            *("ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--print-units", "base"),
            *("--metrics", ",".join(METRICS.values()), "--log-file", str(log)),
            *(sys.executable, "-m", "benchmarks.kernels", *arguments, "--inside-ncu"),
        ]
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


COLUMNS = ("case", "variant", "kernel", "grid", "block", "time", "of DRAM", "of issue", "instructions", "registers")


def cells(found: dict) -> list[list[str]]:
    """The kernels as text, under COLUMNS; what was not counted is "-"."""

    def shown(kernel: dict, name: str, form: str) -> str:
        value = kernel.get(name)
        return "-" if value is None else form.format(value)

    return [
        [
            *(case, label, kernel["name"].split("(")[0].removeprefix("void ")[:60]),
            *("x".join(map(str, kernel["grid"])), "x".join(map(str, kernel["block"]))),
            report.duration(1e-9 * kernel["nanoseconds"]) if kernel.get("nanoseconds") else "-",
            *(shown(kernel, "dram_percent", "{:.0f}%"), shown(kernel, "issue_percent", "{:.0f}%")),
            *(shown(kernel, "instructions", "{:.0f}"), shown(kernel, "registers", "{:.0f}")),
        ]
        for case, variants in found.items()
        for label, kernels in variants.items()
        for kernel in kernels
    ]


@app.command()
def main(
    out: report.Out,
    only: report.Only = "",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes.")] = False,
    device: report.Device = "cuda",
    backend: report.Backends = [],  # noqa: B006
    page: report.Page = None,
    inside_ncu: Annotated[bool, typer.Option("--inside-ncu", hidden=True)] = False,
) -> None:
    """Count what the GPU executes in one call of ours on each backend, for every case."""
    with plain_errors():
        place = choose_device(device)
        if place.type != "cuda":
            raise InputError(f"the device is {place}: only a GPU's kernels can be counted; expected cuda")
        ours = cases.our_backends(backend, place)
        chosen = [
            (case, label)
            for case in cases.matching(only, quick, place)
            for label in cases.labels(case, ours)[0]
            if label in ours and not cases.absent(case, label, quick, place)
        ]
        if inside_ncu:
            call_each(chosen, place, marked_for_ncu)
            return
        report.check(out, page)
        how, why = "torch.profiler", "ncu is not on the PATH"
        if shutil.which("ncu"):
            options = ["--out", str(out), "--only", only, "--device", device, *(["--quick"] if quick else [])]
            for name in backend:
                options += ["--backend", name]
            try:
                kernels, how, why = profiled_by_ncu(options), "ncu", ""
            except InputError as error:
                why = str(error)
        if why:
            console.print(f"[yellow]No instructions counted:[/] {escape(why)}", soft_wrap=True)
            kernels = profiled_by_torch(chosen, place)
        found = by_variant(kernels, [(str(case), label) for case, label in chosen])
        made = {**machine.environment(place), "how": how, "why_not_ncu": why, "cases": found}
        table = report.markdown_table(COLUMNS, cells(found))
        text = f"# Kernels\n\n{report.title(made)}; by {how}. {made['date']}.\n\n{table}"
        report.write(made, text, out, page)


if __name__ == "__main__":
    app()
