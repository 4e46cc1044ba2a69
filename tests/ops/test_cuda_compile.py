"""The CUDA kernels as the compiler left them, read from the extension's machine code on a machine that needs no GPU: no
spills, no double precision, whole-word accesses, nothing contracted, and an instruction budget.

What is counted is a kernel's instructions, all of them, over the elements that a thread handles; where a thread loops
over its part of a sample (the losses), those of a turn. Measured with nvcc 13.0 for compute 9.0, fp32 contiguous: 56.4
for normal, 61.9 for q_sample, 78.8 for reverse_step (philox and the normal being 56 of them), 54.9 for diffusion_loss,
122.6 for hybrid_loss and 133.9 for vlb_terms with a learned variance.
"""

import functools
import re
import subprocess
from pathlib import Path

import pytest
from support import sass

from ddpm_fast.ops.backends import cpu, cuda

pytestmark = [
    pytest.mark.cross_compile,
    pytest.mark.skipif(bool(cuda.unavailable), reason=f"no CUDA kernels: {cuda.unavailable}"),
    pytest.mark.skipif(sass.cuobjdump() is None, reason="no cuobjdump: pip install triton, or put CUDA's on the PATH"),
]
ARCHS = [arch if arch == 90 else pytest.param(arch, marks=pytest.mark.exhaustive) for arch in (75, 80, 90, 100)]
F32, BF16, F16 = "(ddpm::DType)1", "(ddpm::DType)2", "(ddpm::DType)3"
U8 = "(ddpm::DType)0"
# Budgets of its own, because sm_75 rounds to bf16 by integer instructions, for which later ones have an instruction.
TURING = {
    f"normal_kernel<Flat, {BF16}>": 65,
    f"q_sample_kernel<Flat, {BF16}, {BF16}>": 71,
    f"diffusion_loss_kernel<Flat, {U8}, {BF16}>": 74,
    f"diffusion_loss_kernel<Pixels<3>, {U8}, {BF16}>": 97,
    f"bound_kernel<true, 2, Flat, {F32}, {F32}>": 140,
    f"bound_kernel<true, 2, Pixels<3>, {U8}, {BF16}>": 197,
    f"bound_kernel<false, 2, Flat, {F32}, {F32}>": 151,
    f"loss_backward_kernel<Pixels<3>, 2, {BF16}>": 51,
    f"reverse_step_kernel<Flat, 1, {F32}, {BF16}>": 88,
    f"reverse_step_kernel<Pixels<3>, 1, {F32}, {BF16}>": 113,
    f"reverse_step_kernel<Flat, 2, {F32}, {F32}>": 121,
    f"reverse_step_kernel<Pixels<3>, 2, {F32}, {BF16}>": 157,
    f"dropout_kernel<Flat, {BF16}>": 32,
}
VALUES = {"Flat": 8, "Pixels<3>": 12, "Any": 4}


@functools.cache
def built(arch: str) -> list[sass.Kernel]:
    return sass.kernels(Path(cpu._C.__file__), arch)


@pytest.fixture(params=ARCHS, ids="sm_{}".format)
def arch(request):
    if request.param not in cpu._C.cuda.archs:
        pytest.skip(f"the extension was built for {cpu._C.cuda.archs} (DDPM_FAST_CUDA_ARCHS)")
    return f"sm_{request.param}"


def plain(kernel: sass.Kernel) -> str:
    """reverse_step_kernel<Flat, 1, (ddpm::DType)1, (ddpm::DType)1>"""
    return re.sub(
        r"\(anonymous namespace\)::|ddpm::cuda::|^void |\((ddpm::\w+Args|ddpm::cuda::NormCall|float const\*).*$",
        "",
        kernel.name,
    )


def find(name: str, arch: str) -> sass.Kernel:
    found = [kernel for kernel in built(arch) if plain(kernel) == name]
    assert len(found) == 1, f"{name} for {arch}: {[plain(kernel) for kernel in built(arch)]}"
    return found[0]


def test_every_op_is_there(arch):
    ops = {plain(kernel).split("<")[0] for kernel in built(arch)}
    assert ops == {
        "normal_kernel",
        "q_sample_kernel",
        "diffusion_loss_kernel",
        "bound_kernel",
        "finish_kernel",
        "loss_backward_kernel",
        "reverse_step_kernel",
        "draw_timesteps_kernel",
        "record_losses_kernel",
        "dropout_kernel",
        "group_norm_kernel",
        "group_norm_parts_kernel",
        "group_norm_apply_kernel",
        "group_norm_backward_kernel",
        "gradient_parts_kernel",
        "gradient_finish_kernel",
        "gradient_apply_kernel",
        "group_norm_parameters_kernel",
        "add_bias_kernel",
        "channel_sums_kernel",
        "add_parts_kernel",
    }


def test_nothing_is_spilled(arch):
    for kernel in built(arch):
        if (
            arch == "sm_75" and BF16 in kernel.name
        ):  # Turing's rounding to bf16 takes registers, and a norm has 64 a thread
            assert kernel.stack + kernel.local <= 32, plain(kernel)
        else:
            assert not kernel.spills, plain(kernel)


def test_no_double_precision(arch):
    # A literal without its f, and a GPU for consumers takes 64 times as long. Importance sampling is defined
    # in float64, and takes one product and one quotient a sample.
    assert [plain(kernel) for kernel in built(arch) if kernel.doubles] == ["draw_timesteps_kernel"]
    assert find("draw_timesteps_kernel", arch).doubles <= 40


@pytest.mark.parametrize(
    ("name", "least"),
    [
        (f"normal_kernel<Flat, {F32}>", 2),
        (f"normal_kernel<Flat, {BF16}>", 1),
        (f"normal_kernel<Pixels<3>, {F32}>", 3),
        (f"q_sample_kernel<Flat, {F32}, {F32}>", 2 + 2),
        (f"q_sample_kernel<Flat, {U8}, {F32}>", 2),
        (f"q_sample_kernel<Flat, {BF16}, {BF16}>", 1 + 1),
        (f"q_sample_kernel<Pixels<3>, {F32}, {F32}>", 3 + 3),
        (f"diffusion_loss_kernel<Flat, {F32}, {F32}>", 4 + 2),
        (f"bound_kernel<true, 2, Flat, {F32}, {F32}>", 6 + 4),
        (f"bound_kernel<true, 2, Flat, {BF16}, {BF16}>", 3 + 2),
        (f"loss_backward_kernel<Flat, 1, {F32}>", 2 + 2),
        (f"loss_backward_kernel<Pixels<3>, 2, {BF16}>", 3 + 3),
        (f"reverse_step_kernel<Flat, 1, {F32}, {F32}>", 6 + 6),
        (f"reverse_step_kernel<Pixels<3>, 1, {F32}, {BF16}>", 6 + 6),
        (f"dropout_kernel<Flat, {F32}>", 2 + 2),
        (f"dropout_kernel<Flat, {BF16}>", 1 + 1),
    ],
)
def test_sixteen_byte_accesses(name, least, arch):
    assert find(name, arch).wide_accesses >= least


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        # Two correct the square root of each radius, of which there is one to two normals.
        (f"normal_kernel<Flat, {F32}>", 8),
        (f"normal_kernel<Pixels<3>, {BF16}>", 12),
        (f"q_sample_kernel<Flat, {F32}, {F32}>", 8),
        (f"q_sample_kernel<Flat, {U8}, {F32}>", 8 + 16),  # and two the quotient of each pixel
        (f"reverse_step_kernel<Flat, 1, {F32}, {F32}>", 8),
        (f"reverse_step_kernel<Flat, 2, {F32}, {BF16}>", 8),
        (f"loss_backward_kernel<Flat, 1, {F32}>", 0),
        (f"dropout_kernel<Flat, {BF16}>", 0),
    ],
)
def test_no_multiplication_and_addition_is_contracted(name, fused, arch):
    assert find(name, arch).count(r"FFMA") == fused


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        (f"normal_kernel<Flat, {F32}>", 59),
        (f"normal_kernel<Flat, {BF16}>", 59),
        (f"normal_kernel<Pixels<3>, {F32}>", 62),
        (f"q_sample_kernel<Flat, {F32}, {F32}>", 65),
        (f"q_sample_kernel<Flat, {U8}, {F32}>", 72),
        (f"q_sample_kernel<Flat, {BF16}, {BF16}>", 67),
        (f"q_sample_kernel<Pixels<3>, {U8}, {F32}>", 85),
        (f"diffusion_loss_kernel<Flat, {F32}, {F32}>", 58),
        (f"diffusion_loss_kernel<Flat, {U8}, {BF16}>", 68),
        (f"diffusion_loss_kernel<Pixels<3>, {U8}, {BF16}>", 83),
        (f"bound_kernel<true, 2, Flat, {F32}, {F32}>", 129),
        (f"bound_kernel<true, 2, Pixels<3>, {U8}, {BF16}>", 157),
        (f"bound_kernel<false, 2, Flat, {F32}, {F32}>", 140),
        (f"bound_kernel<false, 1, Flat, {F32}, {F32}>", 130),
        (f"loss_backward_kernel<Flat, 1, {F32}>", 9),
        (f"loss_backward_kernel<Pixels<3>, 2, {BF16}>", 23),
        (f"reverse_step_kernel<Flat, 1, {F32}, {F32}>", 83),
        (f"reverse_step_kernel<Flat, 1, {F32}, {BF16}>", 85),
        (f"reverse_step_kernel<Pixels<3>, 1, {F32}, {BF16}>", 99),
        (f"reverse_step_kernel<Flat, 2, {F32}, {F32}>", 117),
        (f"reverse_step_kernel<Pixels<3>, 2, {F32}, {BF16}>", 138),
        (f"dropout_kernel<Flat, {F32}>", 27),
        (f"dropout_kernel<Flat, {BF16}>", 29),
    ],
)
def test_instructions_an_element(name, budget, arch):
    kernel = find(name, arch)
    budget = TURING.get(name, budget) if arch == "sm_75" else budget
    values = next(count for access, count in VALUES.items() if access in name)
    sums = name.startswith(("diffusion_loss", "bound"))
    # A square root is of a normal's radius: the loop around it is the one over a sample's tiles.
    count = kernel.turn(r"MUFU\.RSQ") if sums else len(kernel.instructions)
    assert count / values <= budget


# The norms of a CIFAR-10 network in bf16: threads of a block at 32x32 and 16x16, and how many blocks must fit on a
# multiprocessor beside each other, so that one loads while another one computes.
@pytest.mark.parametrize(
    ("name", "threads", "blocks", "budget"),
    [
        (f"group_norm_kernel<{BF16}, 16, true>", 256, 3, 3100),
        (f"group_norm_kernel<{BF16}, 8, true>", 256, 4, 2100),
        (f"group_norm_kernel<{BF16}, 2, true>", 256, 4, 1400),
        (f"group_norm_kernel<{F32}, 8, true>", 256, 2, 2250),
        (f"group_norm_backward_kernel<{BF16}, 16, true>", 256, 2, 4700),
        (f"group_norm_backward_kernel<{BF16}, 8, true>", 256, 2, 2900),
        (f"group_norm_backward_kernel<{BF16}, 2, true>", 256, 2, 1450),
    ],
)
def test_blocks_of_a_norm_fit_beside_each_other(name, threads, blocks, budget, arch):
    if arch == "sm_75":
        pytest.skip("Turing has half the threads, and integer instructions for rounding to bf16")
    kernel = find(name, arch)
    registers = -(-kernel.registers // 8) * 8 * threads
    assert 65536 // registers >= blocks
    assert blocks * (kernel.shared + 1024) <= 100 * 1024  # of the smallest multiprocessor from sm_80 on
    assert len(kernel.instructions) <= budget


def test_the_root_is_the_compilers_own_within_its_range(tmp_path):
    """square_root (csrc/portable.h) leaves out what __fsqrt_rn does beyond the range of a radius. What it keeps must be
    what the compiler has there: a reciprocal root, its products with the argument and with 1/2, and two corrections."""
    nvcc = sass.nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on the PATH")
    source = tmp_path / "root.cu"
    source.write_text('extern "C" __global__ void root(float* x) { x[threadIdx.x] = __fsqrt_rn(x[threadIdx.x]); }')
    subprocess.run([nvcc, "-cubin", "-arch=sm_90", source, "-o", tmp_path / "root.cubin"], check=True)
    (kernel,) = sass.kernels(tmp_path / "root.cubin")
    opcodes = [(opcode, operands) for opcode, operands in kernel.instructions]
    start = next(i for i, (opcode, _) in enumerate(opcodes) if opcode == "MUFU.RSQ")
    argument = re.split(r", ", opcodes[start][1])[1]
    reciprocal = re.split(r", ", opcodes[start][1])[0]
    first = next(i for i in range(start, len(opcodes)) if opcodes[i][0].startswith("FMUL"))
    (m1, a), (m2, b), (m3, c), (m4, d) = opcodes[first : first + 4]
    assert (m1, m2, m3, m4) == ("FMUL.FTZ", "FMUL.FTZ", "FFMA", "FFMA")
    root = a.split(", ")[0]
    assert a == f"{root}, {argument}, {reciprocal}" and b == f"{reciprocal}, {reciprocal}, 0.5"
    rest = c.split(", ")[0]
    assert c == f"{rest}, -{root}, {root}, {argument}" and d.split(", ")[1:] == [rest, reciprocal, root]
