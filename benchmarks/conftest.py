"""`pytest benchmarks` measures; `pytest benchmarks --quick` only runs everything once, at small sizes, and compares."""

from __future__ import annotations

import pytest

from . import cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="run every benchmark once at small sizes and compare the results, without timing",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick"):
        config.option.benchmark_disable = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "label"} <= set(metafunc.fixturenames):
        pairs = [
            pytest.param(case, label, id=f"{case}-{label}".replace(" ", "-"))
            for case in cases.cases(metafunc.config.getoption("quick"))
            for label in cases.labels(case)
        ]
        metafunc.parametrize(("case", "label"), pairs)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("quick")
