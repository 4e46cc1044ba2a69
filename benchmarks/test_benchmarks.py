"""`pytest benchmarks` times every variant of every case with pytest-benchmark, a group for each case, and
fails where a variant does not match the others. Claims are made of `python -m benchmarks`, which times in turns."""

import contextlib
import functools
from pathlib import Path
from tempfile import gettempdir

import pytest
import torch

from benchmarks import layers, ops
from benchmarks.comparison import Comparison
from benchmarks.runs import Options, Run
from ddpm_fast.commands.common import choose_device

CALLS, OP_ROUNDS, LAYER_ROUNDS = {"cpu": 1, "cuda": 20}, 30, 3  # on a GPU several calls share a synchronisation


@functools.lru_cache(maxsize=1)  # variants of a case follow each other
def compared(case: layers.Case, options: Options) -> Comparison:
    return layers.compared(case, Run(options, {}))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, quick = choose_device(metafunc.config.getoption("device")), metafunc.config.getoption("quick")
    pairs = [(case, each) for case in layers.cases(quick, device) for each in layers.labels(case, device)]
    for case in ops.cases(quick, device):
        pairs += [(case, each) for each in (*ops.our_labels(case, device), *ops.KINDS[case.operation].peers)]
    names = [f"{case}-{label}".replace(" ", "-") for case, label in pairs]
    metafunc.parametrize(("case", "label"), pairs, ids=names)


def test_variant(benchmark, case: ops.Case | layers.Case, label: str, request: pytest.FixtureRequest):
    option = request.config.getoption
    device, quick, calls = choose_device(option("device")), option("quick"), 1
    if isinstance(case, ops.Case):
        if reason := ops.absent(case, label, quick, device):  # a peer may be absent, ours may not
            (pytest.fail if label in ops.our_labels(case, device) else pytest.skip)(reason)
        operation, rounds, calls = ops.build(case, device), OP_ROUNDS, CALLS[device.type]
        error, run, within = ops.check(operation, label), operation.variant(label), operation.running(label)
        call = functools.partial(run, None)
    else:
        options = Options(Path(gettempdir()), option("device"), quick=quick, compiling=option("compile"))
        made, rounds = compared(case, options), LAYER_ROUNDS
        assert not made.run.found["failures"]
        if label not in made.runs:
            names = (f"{label}: ", f"{label.split(' ')[0]}: ")  # a variant of diffusers, or all of it, is absent
            reasons = [reason for reason in made.run.found["absent"] if reason.startswith(names)]
            assert reasons and label not in made.ours, f"{case} has no {label}, and does not say why"
            pytest.skip("; ".join(reasons))
        error, call, within = made.errors.get(label), made.runs[label], contextlib.nullcontext()

    def several() -> None:
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = f"{case}, {calls} calls" if calls > 1 else str(case)
    benchmark.extra_info.update(device=str(device), threads=torch.get_num_threads(), calls=calls, error=error)
    with within:
        benchmark.pedantic(several, rounds=rounds, warmup_rounds=1)
