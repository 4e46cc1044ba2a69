"""Where the time of a forward and of a training step goes on a GPU: `python -m benchmarks trace`.

The work is what `ledger` counts, of ours and of diffusers', called from Python: torch.profiler's table of each, under
the number of kernels that were launched.
"""

from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import peers
from benchmarks.ledger.cases import FORWARD, OURS, TRAINING, Case, cases, prepared
from benchmarks.runs import Options, say
from ddpm_fast.files.atomic import atomic_path, check_writable

WARMUP = 2
ROWS = 60  # of a table, the largest first
QUICK_BATCH = 2


def trace(case: Case, device: torch.device) -> str:
    """The profiler's table of the case's work, done once, under a line of what was launched."""
    run = prepared(case, device)
    for _ in range(WARMUP):
        run()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    launched = sum(not getattr(event, "is_user_annotation", False) for event in events)
    head = f"{case}: {launched} kernels, copies and fills on the GPU"
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = profiled.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=100)
    return f"{head}\n{table}\n"


def main(options: Options) -> None:
    """Writes the tables, one after the other, to a text file."""
    check_writable(options.out)
    chosen = [case for case in cases("quick" if options.quick else "cifar10") if case.work in (FORWARD, TRAINING)]
    made: list[str] = []
    for case in options.matching(chosen):
        if reason := peers.absent(case.side) if case.side != OURS else "":
            say(f"Absent: {reason}")
            continue
        text = trace(case._replace(batch=QUICK_BATCH) if options.quick else case, options.place)
        say(text.splitlines()[0])
        made.append(text)
        _write(options.out, made)


def _write(path: Path, texts: list[str]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(texts))
