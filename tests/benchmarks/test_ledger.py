"""The ledger: small networks that are counted by hand, what a profile of an H200 counted, and what autocast casts on a
CPU."""

import json
from collections import Counter as Tally

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from benchmarks import networks, peers
from benchmarks.__main__ import app
from benchmarks.ledger import cases
from benchmarks.ledger.counting import Counter
from benchmarks.ledger.entries import (
    ATTENTION,
    CONVOLUTIONS,
    COPIES,
    DIFFUSION,
    ELEMENTWISE,
    KINDS,
    NORMS,
    OPTIMISER,
    REDUCTIONS,
    Line,
)
from benchmarks.ledger.fused import fused
from benchmarks.ledger.launches import multi_tensor_launches
from benchmarks.ledger.pretence import META, as_on_a_gpu
from ddpm_fast import ops
from ddpm_fast.noise import NoiseKey

BF16 = torch.bfloat16
IMAGE = 4 * 64 * 8 * 8 * 2  # bytes of an image() in bf16


def image(*shape, dtype=BF16, channels_last=True, **options):
    made = torch.empty(shape or (4, 64, 8, 8), dtype=dtype, device=META)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return made.contiguous(memory_format=layout).requires_grad_(options.get("grad", False))


def counted(run) -> list[Line]:
    with as_on_a_gpu(), Counter() as counter:
        run()
    return counter.lines


def entries(lines) -> list[tuple[str, int, int]]:
    return [(line.kind, line.kernels, line.bytes) for line in lines]


def layer(kind, *arguments, dtype=BF16, **options):
    return kind(*arguments, device=META, dtype=dtype, **options).to(memory_format=torch.channels_last)


# --- single ops, by hand


def test_a_convolution_with_a_bias_is_two_kernels():
    conv, x = layer(nn.Conv2d, 64, 64, 3, padding=1), image()
    weight = 64 * 64 * 9 * 2
    expected = [(CONVOLUTIONS, 1, 2 * IMAGE + weight), (ELEMENTWISE, 1, 2 * IMAGE + 64 * 2)]
    with torch.no_grad():
        assert entries(counted(lambda: conv(x))) == expected
        # cuDNN computes in the layout of the weights: an image in plain order is copied first.
        plain = image(channels_last=False)
        assert entries(counted(lambda: conv(plain))) == [(COPIES, 1, 2 * IMAGE), *expected]
        conv.bias = None
        assert entries(counted(lambda: conv(x))) == expected[:1]


def test_dropout_is_a_kernel_in_each_direction():
    key, x = NoiseKey.of(0, 4, device=META), image(grad=True)
    whole = [(ELEMENTWISE, 1, 2 * IMAGE + (1 + 4) * 8)]  # the seed and the ids
    assert entries(counted(lambda: ops.dropout(x, key, 3, 0.1))) == whole
    y, grad = ops.dropout(x, key, 3, 0.1), image()
    assert entries(counted(lambda: y.backward(grad))) == whole


def test_the_gradients_of_a_convolution_are_a_kernel_each():
    conv, x, grad = layer(nn.Conv2d, 64, 64, 3, padding=1), image(grad=True), image()
    weight = 64 * 64 * 9 * 2
    y = conv(x)
    found = counted(lambda: y.backward(grad))
    both = (CONVOLUTIONS, 1, 2 * IMAGE + weight)
    assert entries(found) == [both, both, (REDUCTIONS, 1, IMAGE + 64 * 2)]


def test_a_norm_copies_the_image_into_plain_order_and_the_next_convolution_back():
    norm, conv, x = layer(nn.GroupNorm, 32, 64), layer(nn.Conv2d, 64, 64, 1, bias=False), image()
    with torch.no_grad():
        found = counted(lambda: conv(norm(x)))
    kinds = [line.kind for line in found]
    assert kinds == [COPIES, NORMS, NORMS, NORMS, COPIES, CONVOLUTIONS]
    assert [line.bytes for line in found[:2]] == [2 * IMAGE, IMAGE + 2 * 4 * 32 * 2]
    assert found[4].bytes == 2 * IMAGE


def test_views_are_free_and_what_is_expanded_is_read_once():
    x, row = image(), torch.empty(1, 64, 1, 1, dtype=BF16, device=META)
    assert counted(lambda: x.permute(0, 2, 3, 1).view(4, 64, 64)[1:].detach()) == []
    assert entries(counted(lambda: x + row.expand(4, 64, 8, 8))) == [(ELEMENTWISE, 1, 2 * IMAGE + 64 * 2)]
    assert entries(counted(lambda: x.float())) == [(COPIES, 1, 3 * IMAGE)]
    assert entries(counted(lambda: x.mul_(2))) == [(ELEMENTWISE, 1, 2 * IMAGE)]
    assert entries(counted(lambda: F.pad(x, (0, 1, 0, 1)))) == [
        (COPIES, 1, 4 * 64 * 9 * 9 * 2),
        (COPIES, 1, 2 * IMAGE),
    ]
    assert entries(counted(lambda: torch.empty(3, device=META))) == []
    assert entries(counted(lambda: torch.zeros(3, device=META))) == [(COPIES, 1, 12)]


def test_attention_is_one_kernel_and_three_backward():
    q = torch.empty(2, 1, 16, 32, dtype=BF16, device=META, requires_grad=True)
    found = counted(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert [line.kernels for line in found if line.kind == ATTENTION] == [1, 1, 1, 1]
    assert found[0].bytes == 4 * 2 * 16 * 32 * 2


def test_an_op_of_ours_reads_its_tensors_and_writes_its_results():
    key = cases.df.NoiseKey.of(0, 4, device=META)
    found = counted(lambda: cases.df.ops.normal(key, (3, 8, 8)))
    assert (DIFFUSION, 1) in [(line.kind, line.kernels) for line in found]
    (line,) = [line for line in found if line.kind == DIFFUSION]
    assert 4 * 4 * 3 * 64 < line.bytes < 4 * 4 * 3 * 64 + 100, "the normals, and the key"


@pytest.mark.parametrize(
    ("channels", "height", "kernels"), [(128, 32, 1), (384, 32, 1), (128, 64, 2), (128, 256, 2), (36, 8, 2)]
)
def test_a_norm_of_ours_is_one_kernel_where_it_fits_into_registers(channels, height, kernels):
    """16 pixels in each of at most 128 threads, for columns of four channels: up to 2048 pixels."""
    x, values = image(1, channels, height, height), torch.ones(channels, device=META)
    groups = 4 if channels == 36 else 32
    with torch.no_grad():
        (found,) = counted(lambda: cases.df.ops.group_norm(x, values, values, groups, 1e-5, silu=True))
    size = 2 * channels * height**2
    assert (found.kind, found.kernels) == (NORMS, kernels)
    assert kernels * size + size <= found.bytes < 1.01 * (kernels * size + size) + 8 * channels + 12 * groups


# --- launches of several tensors


@pytest.mark.parametrize(
    ("elements", "lists", "launches"),
    [
        ([1], 1, 1),
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([10] * 300, 4, 9),
        ([320 * 65536], 2, 1),
        ([320 * 65536 + 1], 2, 2),
        ([65536 * 319, 1, 1], 2, 2),
    ],
)
def test_multi_tensor_launches(elements, lists, launches):
    """36 tensors of four lists a launch, 110 of one, and 320 blocks of 65,536 elements."""
    assert multi_tensor_launches(elements, lists) == launches


def test_the_optimiser_is_fused_and_the_clipping_multi_tensor():
    model = layer(nn.Linear, 8, 8, dtype=torch.float32)
    with as_on_a_gpu():
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    found = counted(lambda: (torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), optimizer.step()))
    ops = Tally(line.op for line in found if line.kind == OPTIMISER)
    assert ops == {"_foreach_norm": 1, "_foreach_mul_": 1, "_foreach_add_": 1, "_fused_adamw_": 1}
    (step,) = [line for line in found if line.op == "_fused_adamw_"]
    assert step.bytes == 7 * 4 * (64 + 8), "reads weight, gradient and both moments, writes all but the gradient"


# --- autocast


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Tally()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.found[func._schema.name, result.dtype] += 1
        return result


def test_the_same_is_cast_as_by_autocast_itself():
    """Forward and backward of what both devices cast alike, a weight used twice among it."""

    def run(device):
        with device:
            first, second = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 8)
            x = torch.ones(2, 4, 8, 8)
            with Names() as names:
                with torch.autocast(device.type, BF16):
                    h = first(x).flatten(2).transpose(1, 2)
                    y = second(F.silu(second(h))) + h
                y.float().mean().backward()
        return {key: n for key, n in names.found.items() if key[0] in ("aten::_to_copy", "aten::silu", "aten::mm")}

    with as_on_a_gpu():
        there = run(META)
    assert there == run(torch.device("cpu")) and there["aten::_to_copy", BF16] == 6, (
        "image, two weights, two biases, a gradient"
    )


# --- the whole of a network


@pytest.mark.skipif(bool(peers.absent(peers.DIFFUSERS)), reason="diffusers is not installed")
def test_the_counts_are_those_of_a_profile_of_an_h200():
    """torch.profiler, torch 2.11, a forward of diffusers' CIFAR-10 network in bf16 and channels_last at batch 256."""
    lines = cases.count(cases.Case(cases.FORWARD, peers.DIFFUSERS, "cifar10", 256))
    found = Tally()
    for line in lines:
        found[line.op] += line.kernels
    norms = [found[f"native_group_norm: {part}"] for part in ("moments", "factors", "apply")]
    copies = found["_to_copy"] + found["clone"] + found["convolution: layout"] + found["constant_pad_nd"] / 2
    assert norms == [51] * 3 and found["convolution"] == 65 and found["attention"] == 6
    assert copies == 125 and found["silu"] == 68 and found["div"] == 29 and found["cat"] == 13
    assert found["add"] + found["convolution: bias"] == 50 + 83
    assert (found["mm"], found["addmm"], found["upsample_nearest2d"]) == (18, 30, 3)


def test_what_lies_between_two_convolutions_is_fused():
    first, second = (layer(nn.Conv2d, 64, 64, 1) for _ in range(2))
    norm, x = layer(nn.GroupNorm, 32, 64), image()
    with torch.no_grad():
        found = fused(counted(lambda: second(F.silu(first(x) * 2))))
        assert [line.kind for line in found] == [CONVOLUTIONS, ELEMENTWISE, CONVOLUTIONS, ELEMENTWISE]
        assert found[1].bytes == 2 * IMAGE + 64 * 2, "in place, and what nobody else reads stays inside"
        found = fused(counted(lambda: second(F.silu(norm(first(x))))))
        assert [line.kind for line in found] == [CONVOLUTIONS, NORMS, NORMS, CONVOLUTIONS, ELEMENTWISE]


def test_the_command(tmp_path):
    out, figure = tmp_path / "ledger.json", tmp_path / "ledger.svg"
    arguments = ["ledger", "--size", "quick", "--only", "forward", "--out", str(out), "--figure", str(figure)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "convolutions" in done.output and figure.stat().st_size
    found = json.loads(out.read_text())
    assert found["versions"]["torch"] == torch.__version__
    for total in found["ledger"]:
        for name in ("kinds", "ops"):
            for amount in ("kernels", "bytes"):
                assert sum(part[amount] for part in total[name].values()) == total[amount] > 0
        assert set(total["kinds"]) <= set(KINDS)
    eager, together = found["ledger"][:2]
    assert eager["kernels"] > together["kernels"] and eager["bytes"] > together["bytes"]
    assert CliRunner().invoke(app, ["ledger", "--size", "huge"]).exit_code == 2
    assert CliRunner().invoke(app, ["ledger", "--only", "nothing"]).exit_code == 2


# --- budgets: of the CIFAR-10 network in bf16. Before its kernels were fused it took 783 kernels and 54.4 GB a forward,
# 2,564 kernels and 66.8 GB a training step, and 780 kernels a sampling step.


@pytest.mark.parametrize(
    ("work", "batch", "kernels", "gigabytes"),
    [(cases.FORWARD, 256, 195, 12.5), (cases.TRAINING, 128, 750, 22), (cases.SAMPLING, 1, 175, 0.13)],
)
def test_the_budgets_of_a_step(work, batch, kernels, gigabytes):
    lines = cases.count(cases.Case(work, cases.OURS, "cifar10", batch))
    assert sum(line.kernels for line in lines) <= kernels
    assert sum(line.bytes for line in lines) <= 1e9 * gigabytes
    norms = [line for line in lines if line.op == "group_norm"]
    assert len(norms) == sum(line.kernels for line in norms) == 51, "a norm is not one kernel"


@pytest.mark.parametrize("case", [case for case in cases.cases("quick") if case.side == cases.OURS], ids=str)
def test_every_case_of_ours_is_counted(case):
    lines = cases.count(case._replace(batch=2))
    kinds = {line.kind for line in lines}
    assert {CONVOLUTIONS, NORMS, ATTENTION} <= kinds
    assert (OPTIMISER in kinds) == (case.work == cases.TRAINING) and (DIFFUSION in kinds) == (
        case.work != cases.FORWARD
    )
    assert networks.config("quick").attention_resolutions
