"""The U-Net, training and sampling beside their baselines: a group per layer, size, dtype and batch (see README.md)."""

from __future__ import annotations

import pytest
import torch
from ddpm_fast.comparison import Case

from ddpm_fast import loop, peers

# Of up to seconds on a CPU, where the comparison has run all once: claims are made of what benchmarks.loop measures.
ROUNDS = 3


def test_layer(benchmark, layer_case: Case, label: str, compiling: bool, device: torch.device):
    comparison = loop.build(layer_case, device, compiling)
    if label in comparison.failures:
        pytest.fail(comparison.failures[label])
    if label not in comparison.runs:
        pytest.skip(comparison.absent.get(label) or comparison.absent[peers.DIFFUSERS])

    def run() -> None:
        comparison.runs[label]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = str(layer_case)
    benchmark.pedantic(run, rounds=ROUNDS)
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        device=str(device),
        steps=layer_case.steps,
        flops=comparison.flops,
        bytes=comparison.bytes,
        error=comparison.errors.get(label),
        notes=comparison.notes,
    )
