"""Builds ddpm_fast._C, the C++ kernels: torch-free, each CPU kernel file once per instruction set, and the CUDA ones
for the common GPU generations where nvcc is found. No GPU is looked for: what is built does not depend on one.

Flags that the compiler refuses are left out, such as Apple's -fopenmp, without which the kernels run on one thread.
Without nvcc, or if it fails, the CPU kernels are built alone. Without a C++ compiler, or if it fails, what is installed
is pure Python, where the `reference` and `triton` backends still work. All of this is said, though pip shows it only
with -v; `python -m ddpm_fast.info` says what is missing. Only `python setup.py build_ext` fails where a compiler does.

    CXX                   the C++ compiler (otherwise g++, clang++ or c++)
    CUDA_HOME             where CUDA is (otherwise nvcc on the PATH, or /usr/local/cuda)
    DDPM_FAST_CUDA_ARCHS  compute capabilities, such as "90" or "80;90"; "none" builds no CUDA kernels
    DDPM_FAST_SANITIZE    sanitizers for the CPU kernels, such as "address,undefined": see CONTRIBUTING.md
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
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
CONTRACTED = {name: ["-ffp-contract=fast"] for name in ("winograd", "winograd_filters", "winograd_weight_gradient")}
# Turing, Ampere, Hopper and both Blackwells; machine code for one runs on later minor versions, so 80 serves 86 and 89
# too. What an nvcc does not know (not yet, or no longer) is left out; the PTX that goes with them serves what comes
# after the newest.
CUDA_ARCHS = [75, 80, 90, 100, 120]
AMPERE = 80  # the first with instructions for bf16 (csrc/storage.h asks for them by __CUDA_ARCH__)

NEEDED = ["-std=c++17", "-O3"]
# Of each line, the first that the compiler takes.
WANTED = [
    ["-fPIC"],  # which clang++ refuses on Windows, where all code is so
    ["-fopenmp", "-fopenmp-simd"],  # without the first there is one thread; the second still vectorises
    ["-fvisibility=hidden"],
    ["-Wall"],
    ["-ffp-contract=off"],  # a fused multiply-add would change results between machines (see csrc/portable.h)
    # These two let sqrt and selects vectorise; neither changes a value.
    ["-fno-math-errno"],
    ["-fno-trapping-math"],
]
# -fmad=false is the GPU's -ffp-contract=off.
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Without these a kernel file is not of the instruction set.
X86_ISAS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
X86_WANTED = {
    "avx512": [
        ["-mprefer-vector-width=512"],
        # Interleaves the noise's dependency chains: 0.64 ns a normal instead of 0.70. With half as many registers it
        # makes the compiler spill them.
        ["-fschedule-insns"],
        ["-Wno-uninitialized"],  # g++ 12's own header for AVX-512 trips -Wuninitialized
    ],
}
# Compiled and linked with the flags under test. It includes nothing else, because a header takes most of the time.
PROBE = """
#ifdef _OPENMP
#include <omp.h>
extern "C" int threads() { return omp_get_max_threads(); }
#endif
extern "C" int zero() { return 0; }
"""


@dataclass
class Compiler:
    """A C++ compiler and the flags that it takes.

    Attributes:
        command: What starts it, such as ["ccache", "g++"].
        flags: Of every file.
        isas: The flags of each instruction set, by its name.
        refused: The wanted flags that it does not take.
    """

    command: list[str]
    flags: list[str] = field(default_factory=list)
    isas: dict[str, list[str]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def probe(self) -> None:
        """Find out what the compiler takes. Raises RuntimeError if it compiles nothing at all."""
        if reason := self.refusal(NEEDED):
            raise RuntimeError(f"{shlex.join(self.command)} does not compile C++17: {reason}")
        self.flags = [*NEEDED, *self._taken(NEEDED, WANTED)]
        for isa, needed in (X86_ISAS if is_x86() else {"generic": []}).items():
            if self.refusal([*self.flags, *needed]):
                self.refused += needed
            else:
                extra = self._taken([*self.flags, *needed], X86_WANTED.get(isa, []))
                self.isas[isa] = [*needed, *extra]

    def _taken(self, given: list[str], wanted: list[list[str]]) -> list[str]:
        """The flags of `wanted` that the compiler takes beside those that are given."""
        first = [choices[0] for choices in wanted]
        if not self.refusal([*given, *first]):  # almost always, and then one run says so
            return first
        taken = []
        for choices in wanted:
            found = [flag for flag in choices if not self.refusal([*given, flag])][:1]
            taken += found
            self.refused += choices[: choices.index(found[0])] if found else choices
        return taken

    def refusal(self, flags: list[str]) -> str:
        """Why the compiler does not make a module with these flags, or the empty string."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(PROBE)
            command = [*self.command, *flags, *shared_flags(), str(source), "-o", str(source.with_suffix(".so"))]
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            except OSError as error:
                return str(error)
        return "" if done.returncode == 0 else (done.stderr.strip() or f"exit status {done.returncode}")

    @property
    def openmp(self) -> list[str]:
        """The flag that links threads, if there are any."""
        return [flag for flag in self.flags if flag == "-fopenmp"]

    @property
    def host(self) -> str:
        """The compiler itself, as nvcc wants it: without ccache and the like before it."""
        return next((part for part in reversed(self.command) if not part.startswith("-")), self.command[0])


def find_compiler() -> Compiler | None:
    """The compiler of $CXX, or one of the PATH. It is not probed yet."""
    given = os.environ.get("CXX")
    if given:  # a path that has a space, or a command with arguments
        return Compiler([given] if shutil.which(given) else shlex.split(given))
    found = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    return Compiler([found]) if found else None


def shared_flags() -> list[str]:
    """What makes a module that Python loads."""
    if sys.platform == "win32":  # its linker wants the library that Python.h names
        return ["-shared", f"-L{Path(sys.base_prefix) / 'libs'}"]
    return ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]


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


def cuda_targets(archs: list[int]) -> tuple[list[str], int]:
    """What nvcc is told to compile for, and the compute capability of the PTX that goes with the machine code.

    One PTX is assembled for every GPU with bf16 instructions: nothing else here is peculiar to a generation, and the
    front end takes most of the time (for compute_100 five times as long as for compute_80). Older GPUs have a PTX of
    their own, or the newer ones would round to bf16 by integer instructions.

    Args:
        archs: The compute capabilities, ascending.
    """
    older, newer = [arch for arch in archs if arch < AMPERE], [arch for arch in archs if arch >= AMPERE]
    kept = (newer or older)[0]
    targets = []
    for group in filter(None, (older, newer)):
        machines = [f"sm_{arch}" for arch in group] + [f"compute_{kept}"] * (kept in group)
        targets.append(f"-gencode=arch=compute_{group[0]},code=[{','.join(machines)}]")
    return targets, kept


def ninja_file(compiler: Compiler, nvcc: str | None, archs: list[int], build: Path, output: Path) -> str:
    """The build as ninja rules: one object per kernel and instruction set, the rest once, one shared module."""
    built = [f"-DDDPM_{isa.upper()}" for isa in compiler.isas if isa != "generic"]
    # Of the bindings alone: in an isolated build pybind11 is somewhere else each time, and a kernel whose command has
    # not changed is not compiled again.
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    link = [*compiler.command, *shared_flags(), *compiler.openmp, *sanitizer_flags()]
    targets: list[str] = []
    if nvcc:
        targets, ptx = cuda_targets(archs)
        # The runtime is linked in, so the module imports on a machine without CUDA.
        threads = ["-Xcompiler", *compiler.openmp] if compiler.openmp else []
        link = [nvcc, "-ccbin", compiler.host, "-shared", "-cudart=static", *threads, *targets]
        includes += [f"-DDDPM_CUDA_ARCHS={', '.join(map(str, archs))}", f"-DDDPM_CUDA_PTX={ptx}"]
    lines = [
        f"flags = {shell([*compiler.flags, *sanitizer_flags()])}",
        "rule compile",
        f"  command = {shell(compiler.command)} $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shell(link)} $in -o $out",
    ]
    objects = []

    def compile_(source: Path, name: str, extra: list[str]) -> None:
        objects.append(escape(build / f"{name}.o"))
        lines.append(f"build {objects[-1]}: compile {escape(source)}")
        lines.append(f"  extra = {shell(extra)}")

    for isa, extra in compiler.isas.items():
        for kernel in CPU_KERNELS:
            flags = [f"-DDDPM_ISA={isa}", *extra]
            if "-ffp-contract=off" in compiler.flags:
                flags += CONTRACTED.get(kernel, [])
            compile_(ROOT / "csrc/cpu" / f"{kernel}.cpp", f"{kernel}.{isa}", flags)
    compile_(ROOT / f"csrc/cpu/{ONCE}.cpp", ONCE, built)
    compile_(ROOT / "csrc/bindings.cpp", "bindings", includes)
    if nvcc:
        lines += [
            "rule cuda",
            f"  command = {shell([nvcc, '-ccbin', compiler.host, *CUDA_FLAGS, *targets])} "
            "-MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for kernel in CUDA_KERNELS:
            objects.append(escape(build / f"{kernel}.cuda.o"))
            lines.append(f"build {objects[-1]}: cuda {escape(ROOT / 'csrc/cuda' / f'{kernel}.cu')}")
    lines.append(f"build {escape(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def shell(words: list[str]) -> str:
    """The words of a command, as ninja passes them to the shell. $in and $out are quoted by ninja itself."""
    return shlex.join(words).replace("$", "$$")


def escape(path: Path) -> str:
    """A path, as one of ninja's names of files."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        if problem := self._build(output):
            output.unlink(missing_ok=True)  # what an older version of the sources was built to
            if self.distribution.commands == ["build_ext"]:
                raise RuntimeError(problem)  # somebody works on the kernels
            self.warn(
                f"{problem}. INSTALLING WITHOUT THE C++ KERNELS: everything works and is slower. Put this right and "
                "install again for the fast ones"
            )

    def copy_extensions_to_source(self) -> None:
        """For an installation in place. Where there is nothing to copy, an older one must not stay."""
        for ext in self.extensions:
            name = self.get_ext_filename(ext.name)
            if not (Path(self.build_lib) / name).exists():
                (ROOT / name).unlink(missing_ok=True)
                return
        super().copy_extensions_to_source()

    def _build(self, output: Path) -> str:
        """Build the module. Returns what went wrong, or the empty string."""
        compiler = find_compiler()
        if not compiler:
            return "no C++ compiler was found (looked for $CXX, g++, clang++, c++)"
        try:
            compiler.probe()
        except RuntimeError as error:
            return str(error)
        if compiler.refused:
            what = "; the kernels run on one thread" if "-fopenmp" in compiler.refused else ""
            self.warn(f"{shlex.join(compiler.command)} does not take {' '.join(compiler.refused)}{what}")
        nvcc, archs = self._find_cuda()
        # Kept from one install to the next, unlike self.build_temp of an isolated build.
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        for tried in [nvcc, None] if nvcc else [None]:
            rules = ninja_file(compiler, tried, archs, build, output)
            (build / "build.ninja").write_text(rules)
            status = subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)]).returncode
            if not status:
                return ""
            if tried:
                if self.distribution.commands == ["build_ext"]:
                    break
                self.warn(f"{nvcc} failed (see above): trying without CUDA kernels")
        return f"{shlex.join(compiler.command)} failed (see above)"

    def _find_cuda(self) -> tuple[str | None, list[int]]:
        """nvcc and what to compile for; (None, []) if no CUDA kernels are to be built, or none can be."""
        if os.environ.get("DDPM_FAST_CUDA_ARCHS") == "none":
            return None, []
        nvcc, archs = find_nvcc(), []
        if not nvcc:
            self.warn("no nvcc found (looked in $CUDA_HOME, $CUDA_PATH, the PATH, /usr/local/cuda): no CUDA kernels")
            return None, []
        try:
            archs = cuda_archs(nvcc)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"{nvcc} does not say what it compiles for ({error})")
        if not archs:
            self.warn(f"{nvcc} compiles for none of {CUDA_ARCHS}: no CUDA kernels")
            return None, []
        self.announce(f"CUDA kernels: built with {nvcc}", level=2)
        return nvcc, archs


if __name__ == "__main__":
    # optional: without a compiler there is nothing to copy into place.
    setup(
        ext_modules=[Extension("ddpm_fast._C", sources=[], optional=True)],
        cmdclass={"build_ext": BuildKernels},
    )
