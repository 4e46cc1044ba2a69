"""The fuzzers find faults that are put into the package, and find none in what is there.

They run in processes of their own: they fork, and a process in which OpenMP has run must not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_fast.ops.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not cpu.isas() or not hasattr(os, "fork"), reason=f"a fuzzer forks, and compares C++ kernels: {cpu.unavailable}"
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("fuzzer", ["ops", "files", "kills"])
def test_a_fault_is_found_and_its_reproduction_printed(fuzzer):
    ended = python("tests.fuzz.faults", fuzzer)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "arguments", [("ops", "--calls", "800"), ("files", "--files", "40"), ("kills", "--kills", "2")], ids=lambda a: a[0]
)
def test_a_short_run_finds_nothing(arguments):
    ended = python("tests.fuzz", *arguments, "--minutes", "2", "--seed", "12")
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_case_is_repeated_by_its_number():
    ended = python("tests.fuzz", "ops", "--seed", "5", "--case", "7")
    assert ended.returncode == 0 and "case 7:" in ended.stdout, ended.stdout + ended.stderr
    assert python("tests.fuzz", "ops", "--seed", "5", "--case", "7").stdout == ended.stdout
