"""`pytest benchmarks` measures; `pytest benchmarks --quick` only runs everything once, at small sizes, and compares."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import cases, loop
from ddpm_fast.commands.common import choose_device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="run every benchmark once at small sizes and compare the results, without timing",
    )
    parser.addoption(
        "--compile", action="store_true", help="beside diffusers' networks under torch.compile too: minutes"
    )
    parser.addoption("--device", default="cpu", help="where the benchmarks run: cpu (the default), cuda or auto")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick"):
        config.option.benchmark_disable = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, quick = choose_device(metafunc.config.getoption("device")), metafunc.config.getoption("quick")
    if {"layer_case", "label"} <= set(metafunc.fixturenames):
        pairs = [
            pytest.param(case, label, id=f"{case}-{label}".replace(" ", "-"))
            for case in loop.cases(quick, device)
            for label in loop.labels(case, device)
        ]
        metafunc.parametrize(("layer_case", "label"), pairs)
    if {"case", "label"} <= set(metafunc.fixturenames):
        pairs = [
            pytest.param(case, label, id=f"{case}-{label}".replace(" ", "-"))
            for case in cases.cases(quick, device)
            for kind in cases.labels(case, cases.OURS[device.type])
            for label in kind
        ]
        metafunc.parametrize(("case", "label"), pairs)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("quick")


@pytest.fixture
def compiling(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--compile")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return choose_device(request.config.getoption("device"))
