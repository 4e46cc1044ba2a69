"""Builds ddpm_fast._C, the C++ kernels: torch-free, each kernel file once per instruction set, with ninja.

Without a C++ compiler it says so and installs pure Python, where the `reference` and `triton` backends still work.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
KERNELS = ["normal", "q_sample", "diffusion_loss", "bound", "loss_backward", "reverse_step"]

# -ffp-contract=off: a fused multiply-add would change results between machines (see csrc/portable.h).
# The other two let sqrt and selects vectorise; neither changes a value.
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]
X86_ISAS = {
    "generic": [],
    "avx2": ["-mavx2"],
    # g++ 12's own header for AVX-512 trips -Wuninitialized.
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
        "-Wno-uninitialized",
    ],
}


def is_x86() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64"}


def ninja_file(compiler: str, build: Path, output: Path) -> str:
    """The build as ninja rules: one object per kernel and instruction set, the rest once, one shared module."""
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    common = [*FLAGS, *(["-DDDPM_X86"] if is_x86() else []), *includes]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    lines = [
        f"flags = {' '.join(common)}",
        "rule compile",
        f"  command = {compiler} $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} {' '.join(shared)} -fopenmp $in -o $out",
    ]
    objects = []

    def compile_(source: Path, name: str, extra: list[str]) -> None:
        objects.append(escape(build / f"{name}.o"))
        lines.append(f"build {objects[-1]}: compile {escape(source)}")
        lines.append(f"  extra = {' '.join(extra)}")

    for isa, extra in (X86_ISAS if is_x86() else {"generic": []}).items():
        for kernel in KERNELS:
            compile_(ROOT / "csrc/cpu" / f"{kernel}.cpp", f"{kernel}.{isa}", [f"-DDDPM_ISA={isa}", *extra])
    compile_(ROOT / "csrc/cpu/dispatch.cpp", "dispatch", [])
    compile_(ROOT / "csrc/bindings.cpp", "bindings", [])
    lines.append(f"build {escape(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if not compiler:
            self.warn(
                "no C++ compiler found (looked for $CXX, g++, clang++, c++): installing without the C++ kernels. "
                "The 'reference' backend still works; install a compiler and reinstall for the fast one."
            )
            return
        build = Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(compiler, build, output))
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)], check=True)


setup(
    # optional: without a compiler there is nothing to copy into place. A compiler that fails still fails the build.
    ext_modules=[Extension("ddpm_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
