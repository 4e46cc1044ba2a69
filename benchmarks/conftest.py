"""The options of `pytest benchmarks`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes, timing nothing: does all of it run and match?")
    parser.addoption("--compile", action="store_true", help="also time diffusers' networks under torch.compile")
    parser.addoption("--device", default="cpu", help="where the benchmarks run: cpu (the default), cuda or auto")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick"):
        config.option.benchmark_disable = True
