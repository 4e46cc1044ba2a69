"""`pytest benchmarks` runs every case of the ops, the networks and the loops: a test for each, which fails if a variant
does not match the others. With --quick all of them run at small sizes, which times nothing."""

import pytest

from benchmarks import layers, ops
from benchmarks.rows import Row
from benchmarks.runs import Options, Run
from ddpm_fast.commands.common import choose_device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, quick = choose_device(metafunc.config.getoption("device")), metafunc.config.getoption("quick")
    cases = layers.cases(quick, device) + ops.cases(quick, device)
    metafunc.parametrize("case", [pytest.param(case, id=str(case).replace(" ", "-")) for case in cases])


def test_case(case, request: pytest.FixtureRequest, tmp_path):
    option = request.config.getoption
    options = Options(tmp_path / "r.json", option("device"), quick=option("quick"), compiling=option("compile"))
    is_op = isinstance(case, ops.Case)
    rounds = (ops.ROUNDS, ops.QUICK_ROUNDS) if is_op else (layers.ROUNDS, layers.QUICK_ROUNDS)
    run = Run(options.checked(*rounds), {})
    if is_op:
        ops.measure(case, run, {})
    else:
        layers.measure(case, run)
    assert not run.found["failures"]
    assert {Row.of(line).subject for line in run.found["rows"]} == {case.subject}
