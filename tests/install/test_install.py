"""Installing: compilers that refuse flags or fail, folders with a space, and what a source distribution holds.

The compilers are scripts that refuse what others do and otherwise call the one of this machine. Kernels are not built
here: the build is run up to the point where a script fails, or its commands are read.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_fast.ops.backends import extension

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
pytestmark = [
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler"),
    pytest.mark.skipif(os.name == "nt", reason="the compilers are shell scripts"),
]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "ddpm_fast")


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("setup_of_ddpm_fast", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compiler(tmp_path):
    """Makes a compiler, in a folder with a space, that fails where an argument is like one of the shell's patterns."""

    def make(*patterns):
        path = tmp_path / "a folder" / "c++"
        path.parent.mkdir(exist_ok=True)
        cases = "".join(f'{pattern}) echo refused: "$a" >&2; exit 1;; ' for pattern in patterns)
        path.write_text(f'#!/bin/sh\nfor a in "$@"; do case "$a" in {cases} esac; done\nexec {COMPILER} "$@"\n')
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def clone(tmp_path):
    """A copy of what is needed for installing, in a folder with a space, with a module that an older version left."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("_C*", "__pycache__", "*.npz", "*.safetensors")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    stale = folder / "ddpm_fast" / f"_C{extension.EXTENSION_SUFFIXES[0]}"
    stale.write_text("stale")
    return folder


def run(clone, compiler, *arguments):
    environment = {**os.environ, "CXX": str(compiler), "DDPM_FAST_CUDA_ARCHS": "none"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)


def modules(folder):
    return [path for path in folder.rglob("_C*") if not path.name.endswith(".py")]


# Compilers


def test_a_usual_compiler_takes_every_flag(setup_py):
    found = setup_py.find_compiler()
    found.probe()
    assert found.refused == [] and found.openmp == ["-fopenmp"]
    assert found.flags == [*setup_py.NEEDED, *(choices[0] for choices in setup_py.WANTED)]
    assert list(found.isas) == (["generic", "avx2", "avx512"] if setup_py.is_x86() else ["generic"])


@pytest.mark.parametrize(
    ("pattern", "lacks", "has"),
    [
        ("-fopenmp", ["-fopenmp"], ["-fopenmp-simd"]),
        ("-f[on][po]*", ["-fopenmp", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"], ["-Wall"]),
    ],
)
def test_a_flag_that_a_compiler_refuses_is_left_out(setup_py, compiler, monkeypatch, pattern, lacks, has):
    monkeypatch.setenv("CXX", str(compiler(pattern)))
    found = setup_py.find_compiler()
    found.probe()
    assert found.refused == lacks and set(has) <= set(found.flags) and not set(lacks) & set(found.flags)
    assert found.openmp == [flag for flag in ["-fopenmp"] if flag not in lacks]


@pytest.mark.skipif("not __import__('platform').machine().lower() in {'x86_64', 'amd64'}", reason="not x86")
def test_an_instruction_set_that_a_compiler_does_not_know_is_left_out(setup_py, compiler, monkeypatch):
    monkeypatch.setenv("CXX", str(compiler("-mavx512vl")))
    found = setup_py.find_compiler()
    found.probe()
    assert list(found.isas) == ["generic", "avx2"] and "-mavx512vl" in found.refused
    monkeypatch.setenv("CXX", str(compiler("-fschedule-insns")))
    found = setup_py.find_compiler()
    found.probe()
    assert "avx512" in found.isas and found.refused == ["-fschedule-insns"]


def test_a_compiler_that_compiles_nothing_is_refused_with_its_own_words(setup_py, compiler, monkeypatch):
    for given, message in (
        (compiler("-std=*"), "does not compile C[+][+]17: refused: -std"),
        ("no-such", "No such file"),
    ):
        monkeypatch.setenv("CXX", str(given))
        with pytest.raises(RuntimeError, match=message):
            setup_py.find_compiler().probe()


def test_the_compiler_may_be_a_command_of_several_words(setup_py, monkeypatch):
    monkeypatch.setenv("CXX", f"env {COMPILER} -O1")
    found = setup_py.find_compiler()
    found.probe()
    assert found.command == ["env", COMPILER, "-O1"] and found.host == COMPILER and found.openmp


@pytest.mark.parametrize("kernel", ["group_norm", "winograd", "q_sample"])
def test_the_kernels_compile_without_openmp(kernel):
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wno-unknown-pragmas", "-DDDPM_ISA=generic"]
    subprocess.run([*shlex.split(COMPILER), *flags, ROOT / "csrc" / "cpu" / f"{kernel}.cpp"], check=True)


# Folders with a space


def test_every_path_of_the_build_is_quoted(setup_py, compiler, monkeypatch, tmp_path):
    """ninja prints the commands as the shell gets them."""
    build, include = tmp_path / "a build", tmp_path / "site packages" / "$include"
    for folder in (build, include):
        folder.mkdir(parents=True)
    monkeypatch.setenv("CXX", str(compiler("-nothing")))
    monkeypatch.setattr(setup_py, "ROOT", tmp_path / "a clone")
    monkeypatch.setattr(setup_py.pybind11, "get_include", lambda: str(include))
    found = setup_py.find_compiler()
    found.probe()
    nvcc = str(tmp_path / "a cuda" / "nvcc")
    for path in (None, nvcc):
        (build / "build.ninja").write_text(setup_py.ninja_file(found, path, [80, 90], build, tmp_path / "an output.so"))
        command = [Path(setup_py.ninja.BIN_DIR) / "ninja", "-t", "commands"]
        listed = subprocess.run(command, cwd=build, check=True, capture_output=True, text=True).stdout
        commands = [shlex.split(line) for line in listed.splitlines()]
        assert {words[0] for words in commands} == {str(tmp_path / "a folder" / "c++"), *([nvcc] if path else [])}
        bindings = next(words for words in commands if str(tmp_path / "a clone" / "csrc" / "bindings.cpp") in words)
        assert f"-I{include}" in bindings and str(build / "bindings.o.d") in bindings
        assert commands[-1][-1] == str(tmp_path / "an output.so") and str(build / "bindings.o") in commands[-1]
        assert ("-DDDPM_CUDA_ARCHS=80, 90" in bindings) == bool(path)
        for words in commands:
            pieces = [word for word in words if re.match(r"(packages|clone|build|folder|cuda)/", word)]
            assert not pieces, words


@pytest.mark.parametrize(
    ("archs", "targets", "ptx"),
    [
        ([80, 90], ["arch=compute_80,code=[sm_80,sm_90,compute_80]"], 80),
        # Turing's PTX knows no bf16, so what is assembled for the others is not made of it.
        ([75, 80, 90], ["arch=compute_75,code=[sm_75]", "arch=compute_80,code=[sm_80,sm_90,compute_80]"], 80),
        ([75], ["arch=compute_75,code=[sm_75,compute_75]"], 75),
    ],
)
def test_turing_gets_machine_code_of_its_own(setup_py, archs, targets, ptx):
    assert setup_py.cuda_targets(archs) == ([f"-gencode={target}" for target in targets], ptx)


# Compilers that fail


@pytest.mark.parametrize("pattern", ["-std=*", "*bindings.cpp"], ids=["at once", "at the kernels"])
def test_where_the_compiler_fails_what_is_installed_is_pure_python(clone, compiler, pattern, tmp_path):
    failing = compiler(pattern, "*/csrc/*")  # the kernels take minutes
    made = run(clone, failing, "setup.py", "build", "--build-lib", tmp_path / "lib")
    assert made.returncode == 0, made.stderr
    assert "INSTALLING WITHOUT THE C++ KERNELS" in made.stderr + made.stdout
    assert (tmp_path / "lib" / "ddpm_fast" / "py.typed").exists() and modules(tmp_path / "lib") == []


def test_an_older_module_does_not_stay_where_the_compiler_fails(clone, compiler, tmp_path):
    """It would be called with arguments that it does not know."""
    assert len(modules(clone)) == 1
    editable = f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})"
    made = run(clone, compiler("-std=*"), "-c", editable)
    assert made.returncode == 0, made.stderr
    assert list(tmp_path.glob("ddpm_fast-*.whl")) and modules(clone) == []


def test_building_the_kernels_by_name_fails_where_the_compiler_does(clone, compiler):
    made = run(clone, compiler("-std=*"), "setup.py", "build_ext", "--inplace")
    assert made.returncode != 0 and "does not compile C++17: refused: -std=c++17" in made.stderr


# What is distributed


def test_a_source_distribution_holds_all_that_builds_the_package(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    listed = set((tmp_path / "ddpm_fast.egg-info" / "SOURCES.txt").read_text().splitlines())
    needed = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    for folder in ("models", "datasets", "commands"):
        here = (ROOT / "ddpm_fast" / folder).iterdir()
        needed |= {str(path.relative_to(ROOT)) for path in here if path.is_file()}
    needed |= {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "ddpm_fast/py.typed"}
    assert needed - listed == set()
    assert not [name for name in listed if name.endswith((".so", ".o", ".pyc"))]


def test_the_version_is_the_same_wherever_it_is_said():
    said = {
        "pyproject.toml": r'(?m)^version = "(.*)"$',
        "ddpm_fast/__init__.py": r'(?m)^__version__ = "(.*)"$',
        "CITATION.cff": r"(?m)^version: (.*)$",
        "CHANGELOG.md": r"(?m)^## \[(\d.*)\]",  # the first is the newest
    }
    found = {name: re.search(pattern, (ROOT / name).read_text(encoding="utf-8")) for name, pattern in said.items()}
    assert all(found.values()) and len({match[1] for match in found.values()}) == 1, found


# What is said where the kernels are missing


def folder_with(folder, *names):
    (folder / "ddpm_fast").mkdir(parents=True)
    for name in names:
        (folder / "ddpm_fast" / name).touch()
    return folder / "ddpm_fast"


def test_missing_kernels_are_explained(tmp_path, monkeypatch):
    suffix = extension.EXTENSION_SUFFIXES[0]
    error = ImportError("undefined symbol: x")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "clone"), str(tmp_path / "site"), str(tmp_path / "none"), ""])
    monkeypatch.chdir(tmp_path)

    clone = folder_with(tmp_path / "clone")
    reason = extension.why_unavailable(error, clone)
    assert "there was no C++ compiler, or it failed" in reason and "circular" not in reason and "symbol" not in reason
    assert "when it was installed" in reason and reason.endswith("pip install -v shows what happens")
    (tmp_path / "clone" / "setup.py").touch()
    reason = extension.why_unavailable(error, clone)
    assert f"the source folder {clone}: nothing was installed from it, or" in reason and reason.endswith("-v -e .")

    other = folder_with(tmp_path / "other", "_C.cpython-27-x86_64-linux-gnu.so")
    assert "for another Python (_C.cpython-27-x86_64-linux-gnu.so)" in extension.why_unavailable(error, other)

    broken = folder_with(tmp_path / "broken", f"_C{suffix}")
    assert "cannot be loaded (undefined symbol: x)" in extension.why_unavailable(error, broken)

    site = folder_with(tmp_path / "site", f"_C{suffix}")
    reason = extension.why_unavailable(error, clone)
    assert f"source folder {clone}, which hides the package that is installed in {site}: run from another" in reason


def test_a_package_without_kernels_says_so_and_works(clone, tmp_path):
    """In a process of its own, from the folder of a clone in which nothing was built."""
    (clone / "ddpm_fast" / f"_C{extension.EXTENSION_SUFFIXES[0]}").unlink()
    code = (
        # The finder of an editable installation would lend the extension of the folder that it was made from.
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)]; "
        "from ddpm_fast.ops.backends import cpu; print(cpu.unavailable); import ddpm_fast as df; print(df.__file__)"
    )
    made = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    reason, where = made.stdout.splitlines()
    assert where.startswith(str(clone)) and str(clone / "ddpm_fast") in reason and "circular" not in reason
