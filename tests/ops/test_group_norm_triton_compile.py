"""The Triton kernels of the network's ops compiled for GPUs on a machine that has none: no spills, no double precision,
16-byte accesses, and registers and instructions within a budget.
"""

import os
import re
from typing import NamedTuple

import pytest
import torch
from support import norms, sass
from support.norms import Norms

pytest.importorskip("triton", reason="the package triton is not installed: pip install triton")

from support.triton_compile import assembled, compiled, launches_of
from triton.backends.compiler import GPUTarget

pytestmark = [
    pytest.mark.cross_compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.skipif(sass.cuobjdump() is None, reason="no cuobjdump here to disassemble with"),
]
ARCHITECTURES = (80, 90, 100, 75)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EVERYTHING = {"scale", "added", "residual", "silu", "grad_total"}


def image(channels, like):
    shape = like.shape[0], channels, *like.shape[2:]
    return torch.empty(shape, dtype=like.dtype).contiguous(memory_format=torch.channels_last)


def forward(case):
    norm, *_ = norms.operands(case)
    total = None if norm.residual is None else norm.x
    return "group_norm", norm, image(len(norm.weight), norm.x), total, torch.empty(len(norm.x), norm.groups, 3)


def backward(case):
    norm, grad, grad_total = norms.operands(case)
    norm = norm if norm.residual is None else norms.of_total(norm, norm.x)
    sums = torch.empty(3, len(norm.x), len(norm.weight))
    statistics = torch.empty(len(norm.x), norm.groups, 3)
    return "group_norm_backward", norm, grad, grad_total, statistics, norm.x, norm.joined, sums


class Case(NamedTuple):
    """A call's first launch; how many accesses of 16 bytes each thread makes at least; programs that have to fit a
    multiprocessor at once; and what was measured with Triton 3.9: instructions for one element on sm_80, sm_90,
    sm_100 and sm_75, which rounds to bf16 by integer instructions."""

    call: tuple
    wide: int
    programs: int
    measured: tuple[float, float, float, float]


SMALL = Norms((2, 256, 4, 4), 32, options={"silu", "grad_total"}, dtype=BF16)
CIFAR = Norms((2, 128, 32, 32), 32, options={"silu", "added"}, dtype=BF16)
ALL = Norms((2, 128, 32, 32), 32, options=EVERYTHING, dtype=BF16)
WIDE = Norms((2, 128, 32, 32), 32, options={"silu", "grad_total"})
JOINED = Norms((2, 256, 32, 32), 32, 128, {"silu", "grad_total"}, BF16)
LARGE = Norms((2, 128, 64, 64), 32, options={"silu", "scale", "grad_total"}, dtype=F16)
CASES = {
    "forward bf16 4x4": Case(forward(SMALL), 8, 14, (22.4, 22.5, 22.0, 27.7)),
    "forward bf16 32x32": Case(forward(CIFAR), 12, 3, (28.2, 28.1, 26.2, 33.7)),
    "forward bf16 32x32 all options": Case(forward(ALL), 20, 3, (36.0, 35.8, 34.4, 45.8)),
    "forward fp32 32x32": Case(forward(WIDE), 18, 4, (20.8, 20.8, 20.4, 20.9)),
    "forward bf16 32x32 joined, 12 channels a group": Case(forward(JOINED), 2, 1, (31.5, 32.0, 31.5, 36.7)),
    "forward fp16 64x64": Case(forward(LARGE), 4, 4, (12.4, 12.6, 10.7, 12.5)),
    "backward bf16 4x4": Case(backward(SMALL), 16, 8, (35.3, 35.8, 34.6, 40.8)),
    "backward bf16 32x32": Case(backward(CIFAR), 16, 2, (42.9, 43.3, 41.5, 48.3)),
    "backward bf16 32x32 all options": Case(backward(ALL), 20, 2, (45.0, 45.5, 44.0, 50.7)),
    "backward fp32 32x32": Case(backward(WIDE), 34, 2, (31.2, 31.5, 30.8, 31.2)),
    "backward bf16 32x32 joined, 12 channels a group": Case(backward(JOINED), 2, 1, (47.7, 47.4, 46.9, 53.2)),
    "backward fp16 64x64": Case(backward(LARGE), 12, 2, (31.2, 31.6, 31.2, 31.2)),
}
OTHERS = [pytest.param(arch, marks=pytest.mark.exhaustive) for arch in (80, 100, 75)]
EVERYWHERE = ("forward bf16 32x32 all options", "backward bf16 32x32 all options", "backward fp16 64x64")


def check(ptx: str, code: sass.Kernel) -> None:
    assert not code.spills, f"{code.registers} registers, {code.stack} bytes of stack, {code.local} of local memory"
    assert ".f64" not in ptx and code.doubles == 0, "double precision, of a Python float perhaps"
    assert not code.count(r"ATOM|RED\b|REDG"), "a sum in an order of its own"
    assert code.shared <= 2048, f"{code.shared} bytes of shared memory, which is for the sums alone"


@pytest.mark.parametrize("word", CASES)
def test_norms(word, tmp_path):
    check_case(word, 90, tmp_path)


@pytest.mark.parametrize("capability", OTHERS, ids="sm_{}".format)
@pytest.mark.parametrize("word", EVERYWHERE)
def test_norms_for_other_generations(word, capability, tmp_path):
    check_case(word, capability, tmp_path)


def check_case(word, capability, tmp_path):
    case = CASES[word]
    launch, *others = launches_of(*case.call)
    ptx, code = compiled(launch, capability, tmp_path)
    check(ptx, code)
    assert code.wide_accesses >= case.wide
    options = launch.options
    threads = 32 * options["num_warps"]
    assert 65536 // (threads * code.registers) >= case.programs, f"{code.registers} registers"
    cost = len(code.instructions) * threads / (options["PIXELS"] * options["LANES"] * options["TOGETHER"])
    budget = 1.1 * case.measured[ARCHITECTURES.index(capability)]
    assert cost <= budget, f"{cost:.1f} instructions for one element, allowed {budget:.1f}"
    for other in others:
        check(*compiled(other, capability, tmp_path))


@pytest.mark.parametrize("capability", [90, *OTHERS], ids="sm_{}".format)
def test_the_small_ops(capability, tmp_path):
    norm, *_ = norms.operands(Norms((2, 128, 32, 32), 32, options={"scale", "added", "residual"}, dtype=BF16))
    sums, parameters, rows = torch.empty(3, 2, 128), torch.empty(2, 128), torch.empty(2, 2, 128)
    for call, wide in (
        (("add_bias", norm.x, norm.residual, norm.added, norm.x), 6),
        (("channel_sums", norm.x, torch.empty(128)), 0),
        (("group_norm_parameters", sums, norm.weight, norm.bias, norm.scale, *parameters, *rows), 0),
    ):
        for i, launch in enumerate(launches_of(*call)):
            ptx, code = compiled(launch, capability, tmp_path)
            check(ptx, code)
            assert i or code.wide_accesses >= wide


@pytest.mark.exhaustive
@pytest.mark.parametrize("word", CASES)
def test_norms_for_turing_and_amd(word, tmp_path):
    """A Tesla T4, which has no instructions for bf16, and an Instinct MI300: without spills and double precision."""
    for launch in launches_of(*CASES[word].call):
        check(*compiled(launch, 75, tmp_path))
        code = assembled(launch, GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]
        assert re.findall(r"vgpr_spill_count: +(\d+)", code) == ["0"] and "_f64" not in code
