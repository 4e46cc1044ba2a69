"""How much faster than each baseline, from interleaved rounds: `python -m benchmarks.ratios --out FILE.json`.

Machines are noisy, and noise is common to what runs within the same milliseconds. So the measured variant and a
baseline take turns (A B A B ...), each round gives one ratio, and their median is the claim, with the 95% interval of
its bootstrap (Efron 1979).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ddpm_fast as df
from ddpm_fast.commands import console, plain_errors
from ddpm_fast.errors import InputError
from ddpm_fast.files import atomic_path, check_writable
from ddpm_fast.ops import native

from . import cases
from .operations import Operation, Variant

WARMUP = 3
RESAMPLES = 10_000

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def interleaved(a: Variant, b: Variant, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each round of a and of b, which take turns."""
    seconds = np.empty((rounds + WARMUP, 2))
    for row in seconds:
        for i, run in enumerate((a, b)):
            start = time.perf_counter()
            run(None)
            row[i] = time.perf_counter() - start
    return seconds[WARMUP:, 0], seconds[WARMUP:, 1]


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the median."""
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), (2.5, 97.5))
    return float(low), float(high)


def compare(operation: Operation, ours: str, baseline: str, rounds: int) -> dict:
    """One line of the results: both variants' errors and median times, and the baseline's time over ours."""
    case = operation.case
    with torch.set_grad_enabled(operation.grad):
        errors = {label: cases.check(operation, label) for label in (ours, baseline)}
        a, b = interleaved(operation.variants[ours], operation.variants[baseline], rounds)
    timed = {
        label: {
            "error": errors[label],
            "median_s": float(np.median(seconds)),
            "min_s": float(seconds.min()),
            **cases.rates(operation, float(np.median(seconds))),
        }
        for label, seconds in ((ours, a), (baseline, b))
    }
    return {
        "operation": case.operation,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": case.shape,
        "memory_format": "channels_last" if case.channels_last else "contiguous",
        "measured": ours,
        "baseline": baseline,
        "speedup": float(np.median(b / a)),
        "speedup_95": median_interval(b / a),
        "bytes": case.elements * operation.bytes_per_element,
        **timed,
    }


def _output(*command: str) -> str:
    try:
        made = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return made.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict:
    """Where and with what this was measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(),
            "architecture": platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": native.isa() if not native.unavailable else None,
            "backend": df.ops.active_backend("q_sample", "cpu", torch.float32),
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": _version("diffusers"),
            "ddpm_fast": df.__version__,
        },
        "git": {
            "commit": _output("git", "rev-parse", "HEAD") or None,
            "changed_files": _output("git", "diff", "--name-only", "HEAD").splitlines(),
        },
    }


def _table(report: dict) -> Table:
    machine, versions = report["machine"], report["versions"]
    title = (
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads; torch {versions['torch']}, "
        f"diffusers {versions['diffusers'] or 'not installed'}; {report['rounds']} rounds, medians"
    )
    table = Table("case", title=title)
    for name in ("ms", "ns/element", "GB/s", "error", "baseline", "ms", "error", "speed-up", "95% interval"):
        table.add_column(name, justify="right")
    previous = None
    for line in report["results"]:
        ours, other = line[line["measured"]], line[line["baseline"]]
        layout = " channels_last" if line["memory_format"] == "channels_last" else ""
        name = f"{line['operation']} {line['dtype']} {'x'.join(map(str, line['shape']))}{layout}"
        low, high = line["speedup_95"]
        if name != previous:
            table.add_section()
        table.add_row(
            name if name != previous else "",
            *(f"{1e3 * ours['median_s']:.3f}", f"{ours['ns_per_element']:.2f}", f"{ours['gb_per_s']:.1f}"),
            *(f"{ours['error']:.0e}", line["baseline"], f"{1e3 * other['median_s']:.3f}", f"{other['error']:.0e}"),
            *(f"{line['speedup']:.2f}", f"{low:.2f}..{high:.2f}"),
        )
        previous = name
    return table


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Where the results go, as JSON.")],
    rounds: Annotated[int, typer.Option(help="Rounds per comparison.")] = 60,
    only: Annotated[str, typer.Option(help="Only the cases whose name holds this, such as 'q_sample uint8'.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, 3 rounds: does it run and match?")] = False,
) -> None:
    """Time the fused ops against every baseline in turns; print the ratios and write them to a file."""
    with plain_errors():
        check_writable(out)
        if rounds < 1:
            raise InputError(f"rounds is {rounds}; expected at least 1")
        chosen = [case for case in cases.cases(quick) if only in str(case)]
        if not chosen:
            names = "\n  ".join(map(str, cases.cases(quick)))
            raise InputError(f"no case's name holds {only!r}; there are\n  {names}")
        results, missing, mismatches = [], {}, []
        where = environment()
        for case in chosen:
            ours, *baselines = cases.labels(case)
            for baseline in baselines:
                if reason := cases.absent(case, baseline, quick):
                    missing.setdefault(f"{baseline}: {reason}", []).append(str(case))
                    continue
                console.print(f"{case}: {ours}, {baseline}")
                try:
                    results.append(compare(cases.build(case), ours, baseline, 3 if quick else rounds))
                except cases.Mismatch as error:
                    mismatches.append(str(error))
        report = {
            **where,
            "rounds": 3 if quick else rounds,
            "absent": missing,
            "mismatches": list(dict.fromkeys(mismatches)),
            "results": results,
        }
        with atomic_path(out) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")

        # A table wrapped to the 80 columns of a log file cannot be read.
        Console(highlight=False, width=max(console.width, 150)).print(_table(report))
        for reason, names in missing.items():
            console.print(
                f"[yellow]Absent[/] from {len(names)} of {len(chosen)} cases: {escape(reason)}", soft_wrap=True
            )
        for message in report["mismatches"]:
            console.print("[red]Not timed:[/]", escape(message), soft_wrap=True)
        console.print(f"Wrote {out}", soft_wrap=True)
        if mismatches:
            raise typer.Exit(1)


if __name__ == "__main__":
    app()
