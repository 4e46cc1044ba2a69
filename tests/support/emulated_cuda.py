"""The CUDA kernels' own source, compiled for the CPU (see cuda_on_cpu/cuda_runtime.h), as the backend "cuda" for CPU
tensors: what a kernel computes, and where it reads and writes, is tested on machines without a GPU.
"""

import contextlib
import fcntl
import functools
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest import mock

import ninja
import pybind11

from ddpm_fast.ops import use_backend
from ddpm_fast.ops.backends import cuda

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / f"cuda_on_cpu-{sys.implementation.cache_tag}"
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = "-std=c++17 -O1 -g1 -fPIC -fopenmp -ffp-contract=off -fno-math-errno -Wall -Wno-unknown-pragmas"


@functools.cache
def kernels():
    """The submodule `cuda` of an extension that is built here, once; a change of the sources builds it anew."""
    output = BUILD / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    defines = "-DDDPM_MODULE=_emulated -DDDPM_CUDA_ARCHS=0 -DDDPM_CUDA_PTX=0 -DDDPM_ISA=generic"
    python = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    lines = [
        "rule compile",
        f"  command = {COMPILER} {FLAGS} {defines} -I{Path(__file__).parent}/cuda_on_cpu $extra -MMD -MF $out.d "
        "-x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {COMPILER} -shared -fopenmp $in -o $out",
    ]
    folder = ROOT / "csrc"
    found = [*folder.glob("cuda/*.cu"), *folder.glob("cpu/*.cpp"), folder / "bindings.cpp"]
    sources = sorted(str(path.relative_to(folder)) for path in found)
    for source in sources:
        lines += [f"build {source}.o: compile {ROOT}/csrc/{source}", f"  extra = {python}"]
    lines.append(f"build {output}: link {' '.join(f'{source}.o' for source in sources)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may run the tests: one builds, and the others wait
        (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", BUILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    spec = importlib.util.spec_from_file_location("_emulated", output)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda


@contextlib.contextmanager
def emulated_cuda():
    """Inside, the backend "cuda" takes CPU tensors and is the one in use."""

    def where(device, workspace):
        return 0, 0, 0 if workspace is None else workspace.data_ptr()

    pretended = {"_kernels": kernels(), "_where": where, "unavailable": "", "refusal": lambda device: ""}
    with mock.patch.multiple(cuda, **pretended), use_backend("cuda"):
        yield
