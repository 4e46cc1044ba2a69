"""Fixtures for whatever must hold on several backends and instruction sets. Each restores what it changed."""

import os

import pytest

from ddpm_fast.ops import native, use_backend

BACKENDS = ["reference", "cpu"]
if os.environ.get("TRITON_INTERPRET") == "1":  # its kernels take the tests' CPU tensors then
    BACKENDS.append(pytest.param("triton", marks=pytest.mark.interpreter))


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test on plain torch, on the C++ kernels, and under Triton's interpreter on its kernels too."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def some_of(backend):
    """Gives all of a test's cases, but under Triton's interpreter, where a thousand elements take up to 20 ms, only
    every step-th. The steps are such that each choice still occurs."""
    return lambda cases, step: list(cases)[:: step if backend == "triton" else 1]


@pytest.fixture(params=native.isas() or ["generic"])
def isa(request):
    """Runs the test on the C++ kernels, once for each instruction set that this machine has."""
    before = native.isa()
    with use_backend("cpu"):
        native.use_isa(request.param)
        yield request.param
    native.use_isa(before)
