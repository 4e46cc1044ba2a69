"""Builds ddpm_fast._C, the C++ kernels: torch-free, each CPU kernel file once per instruction set, and the CUDA ones
for the common GPU generations where nvcc is found. No GPU is looked for: what is built does not depend on one.

Without nvcc it says so and builds the CPU kernels. Without a C++ compiler it says so and installs pure Python, where
the `reference` and `triton` backends still work.

    CXX                   the C++ compiler (otherwise g++, clang++ or c++)
    CUDA_HOME             where CUDA is (otherwise nvcc on the PATH, or /usr/local/cuda)
    DDPM_FAST_CUDA_ARCHS  compute capabilities, such as "90" or "80;90"; "none" builds no CUDA kernels
    DDPM_FAST_SANITIZE    sanitizers for the CPU kernels, such as "address,undefined": see CONTRIBUTING.md
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
ONCE = "dispatch"  # of csrc/cpu; its other files are compiled for each instruction set
CPU_KERNELS = sorted(path.stem for path in ROOT.glob("csrc/cpu/*.cpp") if path.stem != ONCE)
CUDA_KERNELS = sorted(path.stem for path in ROOT.glob("csrc/cuda/*.cu"))
# Its sums of products are not promised to be the same bits everywhere; contracted they take half the instructions.
CONTRACTED = {"winograd": ["-ffp-contract=fast"]}
# Ampere, Hopper and both Blackwells; machine code for one runs on later minor versions, so 80 serves 86 and 89 too.
# What nvcc does not know yet is left out; the PTX that goes with them serves what comes after the newest.
CUDA_ARCHS = [80, 90, 100, 120]

# -ffp-contract=off: a fused multiply-add would change results between machines (see csrc/portable.h).
# The other two let sqrt and selects vectorise; neither changes a value.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-Wall",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# -fmad=false is the GPU's -ffp-contract=off.
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
X86_ISAS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    # g++ 12's own header for AVX-512 trips -Wuninitialized.
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
        # Interleaves the noise's dependency chains: 0.64 ns a normal instead of 0.70. With half as many registers it
        # makes the compiler spill them.
        "-fschedule-insns",
        "-Wno-uninitialized",
    ],
}


def sanitizer_flags() -> list[str]:
    """What compiles and links the C++ with the sanitizers that were asked for."""
    wanted = os.environ.get("DDPM_FAST_SANITIZE")
    return [f"-fsanitize={wanted}", "-g", "-O1", "-fno-omit-frame-pointer"] if wanted else []


def is_x86() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64"}


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        if found := shutil.which(str(Path(home) / "bin" / "nvcc")):
            return found
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_archs(nvcc: str) -> list[int]:
    """The compute capabilities to compile for, ascending. Raises ValueError for some that nvcc does not know."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = {int(name.removeprefix("compute_")) for name in listed if name.removeprefix("compute_").isdigit()}
    chosen = os.environ.get("DDPM_FAST_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split()
    if not chosen:
        return [arch for arch in CUDA_ARCHS if arch in known]
    unknown = [arch for arch in chosen if not arch.isdigit() or int(arch) not in known]
    if unknown:
        raise ValueError(
            f"DDPM_FAST_CUDA_ARCHS={os.environ['DDPM_FAST_CUDA_ARCHS']}: {nvcc} cannot compile for "
            f"{', '.join(unknown)}; it knows {', '.join(map(str, sorted(known)))} (or give none)"
        )
    return sorted({int(arch) for arch in chosen})


def ninja_file(compiler: str, nvcc: str | None, archs: list[int], build: Path, output: Path) -> str:
    """The build as ninja rules: one object per kernel and instruction set, the rest once, one shared module."""
    common = [*FLAGS, *(["-DDDPM_X86"] if is_x86() else []), *sanitizer_flags()]
    # Of the bindings alone: in an isolated build pybind11 is somewhere else each time, and a kernel whose command has
    # not changed is not compiled again.
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    link = [compiler, *shared, "-fopenmp", *sanitizer_flags()]
    target = ""
    if nvcc:
        # One PTX, assembled for each: nothing here is peculiar to a generation, and the front end takes most of the
        # time (for compute_100 five times as long as for compute_80).
        machines = [*(f"sm_{arch}" for arch in archs), f"compute_{archs[0]}"]
        target = f"'-gencode=arch=compute_{archs[0]},code=[{','.join(machines)}]'"
        # The runtime is linked in, so the module imports on a machine without CUDA.
        link = [nvcc, "-ccbin", compiler, "-shared", "-cudart=static", "-Xcompiler", "-fopenmp", target]
        includes += [f"'-DDDPM_CUDA_ARCHS={', '.join(map(str, archs))}'", f"-DDDPM_CUDA_PTX={archs[0]}"]
    lines = [
        f"flags = {' '.join(common)}",
        "rule compile",
        f"  command = {compiler} $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {' '.join(link)} $in -o $out",
    ]
    objects = []

    def compile_(source: Path, name: str, extra: list[str]) -> None:
        objects.append(escape(build / f"{name}.o"))
        lines.append(f"build {objects[-1]}: compile {escape(source)}")
        lines.append(f"  extra = {' '.join(extra)}")

    for isa, extra in (X86_ISAS if is_x86() else {"generic": []}).items():
        for kernel in CPU_KERNELS:
            flags = [f"-DDDPM_ISA={isa}", *extra, *CONTRACTED.get(kernel, [])]
            compile_(ROOT / "csrc/cpu" / f"{kernel}.cpp", f"{kernel}.{isa}", flags)
    compile_(ROOT / f"csrc/cpu/{ONCE}.cpp", ONCE, [])
    compile_(ROOT / "csrc/bindings.cpp", "bindings", includes)
    if nvcc:
        lines += [
            "rule cuda",
            f"  command = {nvcc} -ccbin {compiler} {' '.join([*CUDA_FLAGS, target])} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for kernel in CUDA_KERNELS:
            objects.append(escape(build / f"{kernel}.cuda.o"))
            lines.append(f"build {objects[-1]}: cuda {escape(ROOT / 'csrc/cuda' / f'{kernel}.cu')}")
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
        wanted = os.environ.get("DDPM_FAST_CUDA_ARCHS") != "none"
        nvcc = find_nvcc() if wanted else None
        if nvcc:
            self.announce(f"CUDA kernels: built with {nvcc}", level=2)
        elif wanted:
            self.warn("no nvcc found (looked in $CUDA_HOME, $CUDA_PATH, the PATH, /usr/local/cuda): no CUDA kernels")
        # Kept from one install to the next, unlike self.build_temp of an isolated build.
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        rules = ninja_file(compiler, nvcc, cuda_archs(nvcc) if nvcc else [], build, output)
        (build / "build.ninja").write_text(rules)
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)], check=True)


setup(
    # optional: without a compiler there is nothing to copy into place. A compiler that fails still fails the build.
    ext_modules=[Extension("ddpm_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
