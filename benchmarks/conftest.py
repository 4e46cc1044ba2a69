"""The options of `pytest benchmarks`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes and few rounds: does all of it run and match?")
    parser.addoption("--compile", action="store_true", help="also time diffusers' networks under torch.compile")
    parser.addoption("--device", default="cpu", help="where the benchmarks run: cpu (the default), cuda or auto")
