"""The fused ops beside their baselines: one group per operation, dtype, size and memory format (see README.md)."""

from __future__ import annotations

import pytest
import torch

from . import cases
from .operations import Case


def test_operation(benchmark, case: Case, label: str, quick: bool):
    if reason := cases.absent(case, label, quick):
        pytest.skip(reason)
    operation = cases.build(case)
    run = operation.variants[label]
    benchmark.group = str(case)
    with torch.set_grad_enabled(operation.grad):
        error = cases.check(operation, label)
        # Few rounds would be one scheduler's whim; a fixed number keeps a run of all of them within minutes.
        benchmark.pedantic(run, args=(None,), rounds=30, warmup_rounds=3)
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        elements=case.elements,
        bytes=case.elements * operation.bytes_per_element,
        error=error,
    )
    if benchmark.stats is not None:  # None with --quick or --benchmark-disable
        benchmark.extra_info.update(cases.rates(operation, benchmark.stats.stats.median))
