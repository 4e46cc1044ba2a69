"""`--profile FILE` of train and sample: where the time of some steps goes, as a trace for a viewer and as a table."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.markup import escape
from torch.profiler import ProfilerActivity, profile, schedule

from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path, check_writable

SKIPPED = 5  # steps: they compile kernels, warm up, and capture the CUDA graph; the last one warms the profiler up
RECORDED = 10  # steps: enough for a mean, and some tens of megabytes of trace
TOP = 15  # rows of the table

PROFILE_HELP = (
    f"profile the steps {SKIPPED + 1} to {SKIPPED + RECORDED}: print what takes the time, and write a trace for "
    "ui.perfetto.dev or chrome://tracing, a .json or .json.gz"
)


def check_profile(path: str | Path | None) -> None:
    """Raises InputError for a path that no trace could be written to. None: there is to be none."""
    if path is None:
        return
    if not str(path).endswith((".json", ".json.gz")):
        raise InputError(f"--profile is {path}; expected a name ending in .json or .json.gz")
    check_writable(path)


@contextlib.contextmanager
def profiling(
    path: str | Path | None, device: torch.device, say: Callable[[str], object]
) -> Iterator[Callable[[], object]]:
    """Inside, some steps are profiled. Nothing about the profile ends the work that it is of.

    Args:
        path: Where the trace goes; None for no profile.
        device: Where the steps are computed.
        say: Prints a line, in rich's markup.

    Yields:
        What is to be called after each step.
    """
    if path is None:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    reported: list[str] = []

    def report(profiler: profile) -> None:
        if profiler.step_num > SKIPPED:  # or the work ended as the first of the steps was to begin
            reported.append(str(path))
            _report(profiler, Path(path), device, say)

    with profile(
        activities=activities,
        schedule=schedule(skip_first=SKIPPED - 1, wait=0, warmup=1, active=RECORDED, repeat=1),
        on_trace_ready=report,
    ) as profiler:
        yield profiler.step
    if not reported:
        say(f"[yellow]Warning:[/] nothing was profiled, because there were no more than {SKIPPED} steps")


def _report(profiler: profile, path: Path, device: torch.device, say: Callable[[str], object]) -> None:
    """Print the table, and write the trace."""
    by = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=TOP, max_name_column_width=60)
    last = min(profiler.step_num, SKIPPED + RECORDED)
    say(escape(f"The steps {SKIPPED + 1} to {last}, by the time in each operation itself:\n{table}"))
    try:
        _write(profiler, path)
    except (InputError, OSError) as error:
        say(f"[yellow]Warning:[/] the profile could not be written: {escape(str(error))}")
    else:
        say(escape(f"Wrote {path.resolve()}"))


def _write(profiler: profile, path: Path) -> None:
    """Write the trace, compressed if the name says so."""
    with tempfile.TemporaryDirectory() as folder, atomic_path(path, durable=False) as temporary:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        with trace.open("rb") as source, open(temporary, "wb") as file:
            if path.suffix == ".gz":
                with gzip.open(file, "wb") as packed:
                    shutil.copyfileobj(source, packed)
            else:
                shutil.copyfileobj(source, file)
