"""The fused ops beside their baselines: one group per operation, dtype, size and memory format (see README.md)."""

from __future__ import annotations

import pytest
import torch
from ddpm_fast.operations import Case

from ddpm_fast import cases

CALLS = {"cpu": 1, "cuda": 20}  # in a round: on a GPU the way there and back is shared by several


def test_operation(benchmark, case: Case, label: str, quick: bool, device: torch.device):
    if reason := cases.absent(case, label, quick, device):
        pytest.skip(reason)
    operation = cases.build(case, device)
    variant, calls = operation.variant(label), CALLS[device.type]

    def run() -> None:
        for _ in range(calls):
            variant(None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = f"{case}, {calls} calls" if calls > 1 else str(case)
    error = cases.check(operation, label)
    with operation.running(label):
        # Few rounds would be one scheduler's whim; a fixed number keeps a run of all of them within minutes.
        benchmark.pedantic(run, rounds=30, warmup_rounds=3)
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        device=str(device),
        calls=calls,
        elements=case.elements,
        bytes=case.elements * operation.bytes_per_element,
        error=error,
    )
    if benchmark.stats is not None:  # None with --quick or --benchmark-disable
        benchmark.extra_info.update(cases.rates(operation, benchmark.stats.stats.median / calls))
