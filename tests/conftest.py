"""Fixtures for tests that run on several backends and instruction sets; each restores what it changed. And the choice
of the cases that run by default: see support/pairwise.py."""

import os

import pytest
import torch
from support.emulated_cuda import COMPILER, emulated_cuda
from support.on_gpu import on_gpu
from support.pairwise import leave_pairs
from support.recording import recording  # noqa: F401  (a fixture)

from ddpm_fast.ops import use_backend
from ddpm_fast.ops.backends import cpu

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # the name of this process, if it is one of several
HOST_BACKENDS = ["reference", "cpu"]
BACKENDS = list(HOST_BACKENDS)
if COMPILER:
    BACKENDS.append("emulated_cuda")
if os.environ.get("TRITON_INTERPRET") == "1":  # its kernels take the tests' CPU tensors then
    BACKENDS.append(pytest.param("triton", marks=pytest.mark.interpreter))
if torch.cuda.is_available():
    BACKENDS += [pytest.param(f"gpu_{name}", marks=pytest.mark.gpu) for name in ("cuda", "triton")]


@pytest.fixture
def wide_terminal(monkeypatch):
    """Lines are not broken where a test looks for a text."""
    monkeypatch.setenv("COLUMNS", "400")


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="also run the cases that `pairwise` leaves out")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Where pytest-xdist is installed, a plain `pytest` shares the tests among the processor's cores.

    It does not where files were named, where -n says how many processes to start, and where the tests share a GPU.
    """
    plain = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not config.option.usepdb
    if plain and not WORKER and getattr(config.option, "numprocesses", 0) is None and not torch.cuda.is_available():
        config.option.numprocesses, config.option.dist = CORES, "worksteal"


def pytest_configure():
    if WORKER:
        torch.set_num_threads(max(1, CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Deselects the cases that carry the marker `exhaustive` or get it since `pairwise` can do without them.

    They run with --exhaustive, with `-m exhaustive`, and where nothing else was named on the command line.
    """
    leave_pairs(items)
    kept = [item for item in items if item.get_closest_marker("exhaustive") is None]
    if kept and not config.getoption("exhaustive") and "exhaustive" not in config.getoption("markexpr"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("exhaustive")])
        items[:] = kept


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test on plain torch, on the C++ kernels, on the CUDA kernels' source compiled for the CPU, under
    Triton's interpreter on its kernels, and where there is a GPU on the two backends there."""
    name = request.param
    chosen = emulated_cuda() if name == "emulated_cuda" else None
    if name.startswith("gpu_"):
        chosen = on_gpu(name.removeprefix("gpu_"))
    with chosen or use_backend(name):
        yield name


@pytest.fixture(params=HOST_BACKENDS)
def host_backend(request):
    """Runs the test on the backends that can look at values before they start."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def some_of(backend):
    """A function that gives a test all of its inner cases, or on the slow backends only some of them.

    Triton's interpreter takes up to 20 ms for a thousand elements and its compiler half a second for each combination
    of types and formats: it gets every step-th case. The emulated CUDA kernels, compiled without vectorisation, get
    every emulated-th. The steps are chosen such that each value still occurs.
    """
    return lambda cases, step, emulated=1: list(cases)[
        :: step if backend.endswith("triton") else emulated if backend == "emulated_cuda" else 1
    ]


@pytest.fixture(params=cpu.isas() or ["generic"])
def isa(request):
    """Runs the test on the C++ kernels, once for each instruction set that this machine has."""
    before = cpu.isa()
    with use_backend("cpu"):
        cpu.use_isa(request.param)
        yield request.param
    cpu.use_isa(before)
