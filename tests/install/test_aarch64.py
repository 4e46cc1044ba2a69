"""The CPU kernels compiled for AArch64, where the compiler's vectors are NEON's, and run there: the same bits."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.noise import NoiseKey, normals

ROOT = Path(__file__).parents[2]
CROSS, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
HERE = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CROSS, reason="no compiler for AArch64: Debian's package is g++-aarch64-linux-gnu"),
    pytest.mark.skipif(not QEMU, reason="no emulator of AArch64: Debian's package is qemu-user"),
]
KERNELS = ("normal", "q_sample", "diffusion_loss")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
SHAPE = (3, 3, 173)


def built(compiler, output, *flags):
    """The program of portable_run.cpp."""
    sources = [
        *(ROOT / "csrc" / "cpu" / f"{kernel}.cpp" for kernel in KERNELS),
        ROOT / "tests/install/portable_run.cpp",
    ]
    command = [*shlex.split(compiler), *FLAGS, "-DDDPM_ISA=generic", *flags, *map(str, sources), "-o", str(output)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return output


def printed(*command):
    """The bits of each result, by its name."""
    lines = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[0]: np.array([int(word, 16) for word in line.split()[1:]], np.uint32) for line in lines}


@pytest.fixture(scope="module")
def on_arm(tmp_path_factory):
    program = built(CROSS, tmp_path_factory.mktemp("aarch64") / "run", "-static")
    return printed(QEMU, program)


@pytest.mark.parametrize("name", ["normal", "normal_channels_last", "normal_bf16"])
def test_the_noise_has_the_bits_that_plain_torch_gives(on_arm, name):
    key = NoiseKey(seed=torch.tensor(-7), sample_id=torch.tensor([0, 1, 2**40 + 5]), step=torch.tensor(1), stream=5)
    expected = normals(key, 3 * 173).view(SHAPE)
    if name == "normal_channels_last":
        expected = expected.transpose(1, 2).contiguous()
    if name == "normal_bf16":
        expected = expected.bfloat16()
    ours = on_arm[name].view(np.uint16 if name == "normal_bf16" else np.uint32)
    theirs = expected.view(torch.int16 if name == "normal_bf16" else torch.int32).flatten().numpy()
    assert np.array_equal(ours[: theirs.size], theirs.view(ours.dtype)[: ours.size])
    assert ours.size >= theirs.size - 1 > 1500  # of bf16, whole pairs are printed


def test_what_the_kernels_compute_has_the_bits_of_this_machine(on_arm, tmp_path):
    here = printed(built(HERE, tmp_path / "run"))
    assert here.keys() == on_arm.keys() and "diffusion_loss" in here
    for name, bits in here.items():
        assert np.array_equal(bits, on_arm[name]), name


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-objdump"), reason="no aarch64-linux-gnu-objdump")
def test_the_compiler_makes_vectors_of_neon(tmp_path):
    """Philox's products of 32 bits, four at a time."""
    output = tmp_path / "normal.o"
    source = ROOT / "csrc" / "cpu" / "normal.cpp"
    subprocess.run([CROSS, *FLAGS, "-DDDPM_ISA=generic", "-c", source, "-o", output], check=True)
    code = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", output], capture_output=True, text=True, check=True
    ).stdout
    assert "umull2" in code and "fmul\tv" in code and "fsqrt\tv" in code
