"""Fixtures for whatever must hold on several backends and instruction sets. Each restores what it changed."""

import pytest
from recording import recording  # noqa: F401  (a fixture)

from ddpm_fast.ops import native, use_backend


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Runs the test on plain torch and on the C++ kernels."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=native.isas() or ["generic"])
def isa(request):
    """Runs the test on the C++ kernels, once for each instruction set that this machine has."""
    before = native.isa()
    with use_backend("cpu"):
        native.use_isa(request.param)
        yield request.param
    native.use_isa(before)
