"""Triton kernels compiled for GPUs on a machine that has none: what the compiler's output must and must not hold.

Each op is called as it would be on a GPU; its launches are caught and compiled with the types, constants, alignment and
number of warps that they have.
"""

import os
import re
from typing import NamedTuple

import pytest
import torch
from support import sass

from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import ReverseStep, VlbTerms
from ddpm_fast.ops.tensors import Draw, Drawn

pytest.importorskip("triton", reason="the package triton is not installed: pip install triton")

from support.triton_compile import assembled, compiled, launches_of
from triton.backends.compiler import GPUTarget

pytestmark = [
    pytest.mark.cross_compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.skipif(sass.cuobjdump() is None, reason="no cuobjdump here to disassemble with"),
]
ARCHITECTURES = (80, 90, 100, 75)
F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
N, C = 2, 3
T, STEP, KEY = torch.zeros(N, dtype=torch.int64), torch.tensor(0), NoiseKey.of(0, N)
LOSS, FACTORS = torch.empty(N), torch.empty(N, 2)


def image(dtype, last=False, groups=1, size=64):
    """12,288 elements a sample: two programs or more, so that losses need their second kernel."""
    x = torch.zeros(N, groups * C, size, size, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def q(x0, out, last=False, noise=KEY):
    noise = noise if noise is KEY else image(noise, last)
    return "q_sample", image(x0, last), T, torch.zeros(1, 2), noise, image(out, last)


def loss(output, x0, last=False, residual=True):
    kept = image(output, last) if residual else None
    return "diffusion_loss", image(output, last), image(x0, last), T, torch.zeros(1, 3), KEY, kept, LOSS


def hybrid(output, last=False):
    kept = image(output, last, 2)
    return "hybrid_loss", image(output, last, 2), image(U8, last), T, torch.zeros(1, 11), KEY, kept, LOSS, FACTORS


def vlb(output, last=False, groups=2):
    out, kept = image(output, last, groups), image(output, last, groups)
    return "vlb_terms", out, image(U8, last), T, torch.zeros(1, 9), KEY, kept, VlbTerms(LOSS, LOSS), FACTORS[:, :groups]


def backward(dtype, last=False, groups=1):
    return "loss_backward", image(dtype, last, 2), FACTORS[:, :groups].contiguous(), image(dtype, last, 2)


def step(x, output, last=False, groups=1, size=64, extras=False):
    before = image(F32, last, size=size) if extras else None
    x0, model = (image(F32, last, size=size), image(BF16, last, size=size)) if extras else (None, None)
    x_t, x_out, out = image(x, last, size=size), image(x, last, size=size), image(output, last, groups, size)
    return "reverse_step", x_t, out, before, torch.zeros(1, 8), STEP, KEY, ReverseStep(x_out, x0, model)


class Case(NamedTuple):
    """A call; how many accesses of 16 bytes each thread makes; and what was measured with Triton 3.9 (3.6 differs by up
    to 8%): instructions for one element on sm_80, sm_90, sm_100 and sm_75, with those of branches not taken. Of them
    drawing a normal takes about 58; sm_75 rounds to bf16 by integer instructions. The kernels of the bound hold three
    formulas, of which a sample's term takes one.
    """

    call: tuple
    wide: int
    measured: tuple[float, float, float, float]


CASES = {
    "normal fp32": Case(("normal", KEY, image(F32)), 2, (58.4, 58.2, 53.9, 58.5)),
    "normal bf16": Case(("normal", KEY, image(BF16)), 0, (59.0, 58.8, 54.2, 64.0)),  # 8 bytes: a counter's four normals
    "normal fp16 channels_last": Case(("normal", KEY, image(F16, True)), 0, (75.8, 76.6, 68.6, 76.1)),
    "q_sample fp32": Case(q(F32, F32), 4, (66.6, 66.5, 61.9, 65.8)),
    "q_sample uint8 to bf16": Case(q(U8, BF16), 0, (72.1, 71.6, 63.1, 76.2)),
    "q_sample uint8 to fp32 channels_last": Case(q(U8, F32, True), 0, (91.2, 91.5, 82.4, 89.5)),
    "q_sample fp32 given noise": Case(q(F32, F32, noise=F32), 6, (13.8, 13.9, 13.8, 13.4)),
    "q_sample bf16 given noise": Case(q(BF16, BF16, noise=BF16), 3, (16.1, 16.2, 14.6, 20.9)),
    "diffusion_loss fp32": Case(loss(F32, F32), 6, (81.5, 82.6, 74.2, 80.8)),
    "diffusion_loss bf16 uint8": Case(loss(BF16, U8), 0, (89.5, 90.2, 78.9, 94.2)),
    "diffusion_loss bf16 uint8 channels_last": Case(loss(BF16, U8, True), 0, (112.9, 113.4, 100.0, 115.8)),
    "diffusion_loss fp16 no gradient": Case(loss(F16, F16, residual=False), 0, (83.0, 83.9, 76.8, 82.4)),
    "hybrid_loss fp32": Case(hybrid(F32), 4, (422.2, 423.2, 380.2, 439.8)),
    "hybrid_loss bf16 channels_last": Case(hybrid(BF16, True), 0, (490.5, 481.0, 435.5, 515.8)),
    "vlb_terms fp32": Case(vlb(F32), 4, (446.2, 446.8, 401.2, 465.0)),
    "vlb_terms fp16 one group": Case(vlb(F16, groups=1), 0, (413.2, 411.5, 381.5, 423.8)),
    "loss_backward fp32": Case(backward(F32), 4, (8.4, 8.4, 8.4, 8.0)),
    "loss_backward bf16 two groups": Case(backward(BF16, groups=2), 2, (9.6, 9.6, 9.1, 14.6)),
    "loss_backward bf16 two groups channels_last": Case(backward(BF16, True, 2), 2, (25.6, 26.0, 25.0, 30.5)),
    "reverse_step fp32": Case(step(F32, F32), 6, (77.2, 77.5, 71.0, 79.1)),
    "reverse_step fp32 bf16 learned": Case(step(F32, BF16, groups=2), 4, (111.5, 113.2, 91.0, 126.1)),
    "reverse_step bf16": Case(step(BF16, BF16), 0, (80.2, 80.9, 74.0, 87.5)),
    "reverse_step fp32 bf16 all operands": Case(step(F32, BF16, extras=True), 8, (84.8, 85.0, 79.9, 93.9)),
    "reverse_step fp32 bf16 all operands channels_last": Case(
        step(F32, BF16, True, extras=True), 0, (114.4, 116.5, 103.6, 121.5)
    ),
    "reverse_step fp32 channels_last 63x63": Case(step(F32, F32, True, size=63), 0, (111.5, 112.8, 101.2, 115.9)),
}


def check(ptx: str, code: sass.Kernel, doubles: int = 0) -> None:
    assert not code.spills, f"{code.registers} registers, {code.stack} bytes of stack, {code.local} of local memory"
    assert (".f64" in ptx) == (doubles > 0) and code.doubles <= doubles, "double precision, of a Python float perhaps"
    assert not re.search(r"\bfma\.|\bmad\.(rn\.)?f", ptx), "a fused multiply-add changes the results' bits"
    assert ".approx" not in ptx and "div.full" not in ptx, "a function that is not correctly rounded"
    assert not code.count(r"ATOM|RED\b|REDG"), "a sum in an order of its own"


@pytest.mark.parametrize(
    "capability",
    [arch if arch == 90 else pytest.param(arch, marks=pytest.mark.exhaustive) for arch in ARCHITECTURES],
    ids="sm_{}".format,
)
@pytest.mark.parametrize("word", CASES)
def test_compiled(word, capability, tmp_path):
    case = CASES[word]
    launch, *others = launches_of(*case.call)
    ptx, code = compiled(launch, capability, tmp_path)
    check(ptx, code)
    drawn = any(value is KEY for value in case.call)
    assert ("sqrt.rn.f32" in ptx) == drawn
    assert code.wide_accesses == case.wide
    a_thread = 4 * launch.options["BLOCK"] / (32 * launch.options["num_warps"])
    budget = 1.1 * case.measured[ARCHITECTURES.index(capability)]
    cost = len(code.instructions) / a_thread
    assert cost <= budget, f"{cost:.1f} instructions for one element, allowed {budget:.1f}"
    for second in others:
        check(*compiled(second, capability, tmp_path))


NUMBERS = torch.zeros(N, dtype=torch.float64)
DRAWN = Drawn(T, LOSS, T, T)
# A call, its instructions of double precision at most (one product and one quotient a sample), and all of them.
DRAWS = {
    "draw_timesteps": (("draw_timesteps", Draw(KEY, 1000, 0, None, None, T, T, 3, 9), DRAWN), 0, 900),
    "draw_timesteps by importance": (
        ("draw_timesteps", Draw(KEY, 1000, 0, NUMBERS, NUMBERS, T, T, 3, 9), DRAWN),
        48,
        1100,
    ),
    "record_losses": (("record_losses", torch.zeros(1000, 10), torch.zeros(1000, dtype=torch.int64), T, LOSS), 0, 440),
}


@pytest.mark.parametrize("word", DRAWS)
def test_draws_compiled(word, tmp_path):
    call, doubles, budget = DRAWS[word]
    (launch,) = launches_of(*call)
    ptx, code = compiled(launch, 90, tmp_path)
    check(ptx, code, doubles)
    assert len(code.instructions) <= budget


# Images, wide accesses of a thread, and instructions for one element: Philox takes some 10 of them.
DROPPED = {
    "fp32 channels_last": (image(F32, True), 8, 19),
    "bf16 channels_last": (image(BF16, True), 4, 20),
    "fp16": (image(F16), 0, 50),
}


@pytest.mark.parametrize("word", DROPPED)
def test_dropout_compiled(word, tmp_path):
    x, wide, budget = DROPPED[word]
    (launch,) = launches_of("dropout", x, KEY, 3, 6554, x)
    ptx, code = compiled(launch, 90, tmp_path)
    check(ptx, code)
    assert code.wide_accesses == wide
    cost = len(code.instructions) / (8 * launch.options["BLOCK"] / (32 * launch.options["num_warps"]))
    assert cost <= budget, f"{cost:.1f} instructions for one element, allowed {budget}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("word", CASES)
def test_compiled_for_amd(word):
    """An Instinct MI300: without spills and double precision, and with nothing contracted where no function is."""
    for launch in launches_of(*CASES[word].call):
        code = assembled(launch, GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]
        assert re.findall(r"vgpr_spill_count: +(\d+)", code) == ["0"]  # scalar registers spill to vector ones
        assert "_f64" not in code
        if word.startswith("loss_backward") or "given noise" in word:
            assert "v_fma" not in code and "v_mad_f32" not in code and "v_fmac" not in code


def test_a_sample_of_4096_elements_needs_no_second_kernel():
    for name, *arguments in (loss(F32, U8), hybrid(F32), vlb(F32)):
        small = [
            x[:, :, :32, :32].contiguous() if isinstance(x, torch.Tensor) and x.ndim == 4 else x for x in arguments
        ]
        assert len(launches_of(name, *arguments)) == 2 and len(launches_of(name, *small)) == 1
