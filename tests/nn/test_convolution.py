"""Winograd's convolution is compared with the definition in float64, and is not used where it must not be."""

import copy
import gc
import pickle
import platform
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import ops, use_backend
from ddpm_fast.nn import convolution
from ddpm_fast.nn.convolution import Conv2d
from ddpm_fast.ops.backends import cpu

needs_kernels = pytest.mark.skipif(not cpu.isas(), reason=cpu.unavailable)


def image(*shape: int, seed: int = 1) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def layer(c_in: int = 32, c_out: int = 32, bias: bool = True) -> Conv2d:
    torch.manual_seed(0)
    conv = Conv2d(c_in, c_out).to(memory_format=torch.channels_last)
    if not bias:
        conv.bias = None
    return conv.eval()


def exact(conv: Conv2d, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.detach().double()
    return F.conv2d(x.double(), conv.weight.detach().double(), bias, padding=1)


def error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def winograd(conv: Conv2d, x: Tensor) -> Tensor:
    """What the layer computes if it takes Winograd's algorithm, which it does not for everything."""
    return ops.winograd(x, ops.winograd_filters(conv.weight), conv.bias, conv.out_channels)


@pytest.fixture
def taken(monkeypatch):
    """A list with the shape of each image that went through Winograd's algorithm."""
    shapes, original = [], cpu.OPS["winograd"]
    monkeypatch.setitem(cpu.OPS, "winograd", lambda x, *rest: shapes.append(tuple(x.shape)) or original(x, *rest))
    return shapes


EDITS = {
    "stride": {"stride": (2, 2)},
    "padding": {"padding": (2, 2)},
    "dilation": {"dilation": (2, 2)},
    "groups": {"groups": 2, "weight": nn.Parameter(torch.ones(64, 32, 3, 3))},
    "padding mode": {"padding_mode": "circular", "_reversed_padding_repeated_twice": [1, 1, 1, 1]},
    "a 1x1 weight": {"weight": nn.Parameter(torch.ones(64, 64, 1, 1))},
    "a longer weight": {"weight": nn.Parameter(torch.ones(96, 64, 3, 3)), "bias": None},
    "another bias": {"bias": nn.Parameter(torch.ones(63))},
    "no weight of images": {"weight": nn.Parameter(torch.ones(64, 64, 3))},
}


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_a_layer_whose_attributes_were_edited_does_what_torchs_would(edit):
    ours, torchs = layer(64, 64), nn.Conv2d(64, 64, 3, padding=1)
    torchs.load_state_dict(ours.state_dict())
    for conv in (ours, torchs):
        for name, value in EDITS[edit].items():
            setattr(conv, name, value)
    x = image(1, 64, 16, 16)
    try:
        expected = torchs(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            ours(x)
    else:
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("n", "c_in", "c_out", "height", "width"),
    [
        pytest.param(1, 128, 128, 32, 32, id="one image of 64 tiles"),
        pytest.param(3, 64, 96, 16, 16, id="three of 16 tiles"),
        pytest.param(5, 33, 47, 16, 16, id="channels of no vector's length, 80 tiles: two blocks"),
        pytest.param(1, 130, 65, 12, 20, id="channels of two strips and a rest; not square"),
        pytest.param(2, 48, 32, 7, 7, id="7x7: one row and column of a tile unused"),
        pytest.param(4, 32, 32, 13, 31, id="13x31: three rows unused"),
        pytest.param(2, 32, 33, 14, 14, id="14x14: two unused"),
        pytest.param(8, 256, 256, 4, 4, id="one tile an image"),
        pytest.param(2, 1, 1, 3, 2, id="one channel, smaller than a tile"),
        pytest.param(1, 3, 5, 2, 9, id="lower than a tile"),
        pytest.param(0, 32, 32, 8, 8, id="no image"),
    ],
)
@needs_kernels
@torch.no_grad()
def test_against_float64(isa, n, c_in, c_out, height, width, bias):
    conv, x = layer(c_in, c_out, bias), image(n, c_in, height, width)
    output, expected = winograd(conv, x), exact(conv, x)
    assert output.shape == expected.shape and output.dtype == torch.float32
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert (output - expected).norm() <= 2e-6 * expected.norm()
    if n:
        # By pixel: an edge that is wrong, or a tile, would be lost in the norm of many.
        assert (output - expected).abs().max() <= 3e-5 * expected.std(unbiased=False).clamp_min(1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@needs_kernels
@torch.no_grad()
def test_halves_are_rounded_once(isa, dtype):
    """Summed in fp32: the error is that of the exact result's rounding."""
    conv, x = layer(130, 47).to(dtype), image(3, 130, 14, 14).to(dtype)
    output, expected = winograd(conv, x), exact(conv, x)
    assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last)
    assert error(output, expected) <= 1.001 * error(expected.to(dtype), expected)


@needs_kernels
def test_every_tap_reaches_its_pixel():
    """One pixel and one tap at a time: exact small numbers that no average hides."""
    for row, column in [(0, 0), (3, 4), (4, 3), (7, 8), (8, 0)]:
        x = torch.zeros(1, 2, 9, 9).contiguous(memory_format=torch.channels_last)
        x[0, 1, row, column] = 1
        weight = torch.arange(1.0, 2 * 2 * 9 + 1).view(2, 2, 3, 3)
        output = ops.winograd(x, ops.winograd_filters(weight), None, 2)
        torch.testing.assert_close(output, F.conv2d(x, weight, padding=1), rtol=0, atol=1e-4)


@needs_kernels
@torch.no_grad()
def test_any_memory_layout():
    conv = layer()
    whole = image(4, 32, 16, 20)
    for x in (whole[::2], whole[:, :, :, 2:18], whole.contiguous(), image(4, 64, 16, 16)[:, ::2], whole.mT):
        assert conv.takes_winograd(x)
        assert error(conv(x), exact(conv, x)) < 2e-6
    conv.bias = nn.Parameter(torch.randn(64)[::2])
    assert error(conv(whole), exact(conv, whole)) < 2e-6


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("n", [1, 5], ids=["a block, parted by channels", "three blocks"])
def test_same_bits_on_any_number_of_threads(n):
    conv, x, before = layer(96, 96), image(n, 96, 16, 16), torch.get_num_threads()
    outputs = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        outputs += [winograd(conv, x) for _ in range(2)]
    torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], output) for output in outputs)


@needs_kernels
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch():
    conv, x = layer(), image(9, 32, 16, 16)
    assert torch.equal(winograd(conv, x[7:8]), winograd(conv, x)[7:8])


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda conv: conv.weight.mul_(2), id="in place"),
        pytest.param(lambda conv: conv.weight[3, 1].add_(5), id="a part in place"),
        pytest.param(lambda conv: conv.weight.data.mul_(2), id="through .data, which counts no change"),
        pytest.param(lambda conv: setattr(conv.weight, "data", 2 * conv.weight), id="other data"),
        pytest.param(lambda conv: setattr(conv, "weight", nn.Parameter(2 * conv.weight)), id="another parameter"),
        pytest.param(lambda conv: conv.bias.add_(7), id="the bias"),
        pytest.param(lambda conv: conv.load_state_dict(layer(32, 32).double().state_dict()), id="loaded, the same"),
        pytest.param(lambda conv: conv.train().weight.data[0, 1].add_(5) is conv.eval(), id="trained in between"),
        pytest.param(lambda conv: conv.double().float(), id="converted and back"),
    ],
)
def test_changed_weights_are_seen(change, taken):
    conv, x = layer(), image(2, 32, 16, 16)
    conv(x)
    change(conv)
    assert error(conv(x), exact(conv, x)) < 2e-6
    assert len(taken) == 2


@needs_kernels
@torch.no_grad()
def test_filters_are_made_once_and_go_with_the_layer(monkeypatch):
    made, original = [], convolution.winograd_filters
    monkeypatch.setattr(convolution, "winograd_filters", lambda weight: made.append(weight) or original(weight))
    conv, x = layer(), image(2, 32, 16, 16)
    for _ in range(3):
        conv(x)
    with torch.inference_mode():
        conv(x)
    assert len(made) == 1
    assert set(conv.state_dict()) == {"weight", "bias"}
    assert len(pickle.dumps(conv)) < 1.2 * len(pickle.dumps(nn.Conv2d(32, 32, 3)))
    twin = copy.deepcopy(conv)
    twin.weight.mul_(2)
    assert error(twin(x), exact(twin, x)) < 2e-6 and error(conv(x), exact(conv, x)) < 2e-6
    held = len(convolution._transformed)
    twin.train()
    assert len(convolution._transformed) == held - 1
    conv.training = True
    conv(x)
    assert len(convolution._transformed) == held - 2
    conv.eval()(x)
    assert len(convolution._transformed) == held - 1
    del conv
    gc.collect()
    assert len(convolution._transformed) == held - 2


class Annotated(Tensor):
    pass


def on_the_reference_backend(conv, x):
    with use_backend("reference"):
        return conv(x)


def halves_where_the_library_has_units_for_them(conv, x):
    with mock.patch.object(convolution, "_KEPT", convolution._KEPT._replace(waste={torch.float32: 2.0})):
        return conv.bfloat16()(x.bfloat16())


def made_for_inference(conv, x):
    with torch.inference_mode():
        return layer()(x)


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize(
    "run",
    [
        on_the_reference_backend,
        made_for_inference,
        pytest.param(lambda conv, x: conv.double()(x.double()), id="float64"),
        halves_where_the_library_has_units_for_them,
        pytest.param(lambda conv, x: conv.to("meta")(x.to("meta")), id="another device"),
        pytest.param(lambda conv, x: torch.compile(conv, backend="eager", fullgraph=True)(x), id="compiled"),
        pytest.param(lambda conv, x: conv(x.as_subclass(Annotated)), id="a subclass of Tensor"),
        pytest.param(lambda conv, x: conv(x[0]), id="no batch"),
        pytest.param(lambda conv, x: conv(x[:3, :, :4, :4]), id="few tiles"),
        pytest.param(lambda conv, x: conv(x[:, :, :5, :5]), id="tiles mostly unused"),
        pytest.param(lambda conv, x: torch.func.vmap(conv)(x[None]), id="vmap"),
        pytest.param(lambda conv, x: layer(31, 32)(x[:, :31]), id="few channels in"),
        pytest.param(lambda conv, x: layer(32, 31)(x), id="few channels out"),
    ],
)
def test_falls_back_to_the_plain_convolution(run, taken):
    conv, x = layer(), image(4, 32, 16, 16)
    conv(x)
    assert len(taken) == 1  # the same without what is tested here
    with torch.inference_mode() if run is made_for_inference else torch.no_grad():  # inference_mode(False) records
        run(conv, x)
    assert len(taken) == 1


@torch.no_grad()
def test_errors_are_the_plain_convolutions():
    with pytest.raises(RuntimeError, match="to have 32 channels, but got 33"):
        layer()(image(2, 33, 16, 16))


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_halves(dtype, taken, monkeypatch):
    """Of a layer: taken where the library has no units for them, not where the parameters are of another dtype."""
    monkeypatch.setitem(convolution._KEPT.waste, dtype, 1.5)
    conv, x = layer().to(dtype), image(4, 32, 16, 16).to(dtype)
    assert error(conv(x), exact(conv, x)) < 1.001 * error(exact(conv, x).to(dtype), exact(conv, x))
    assert len(taken) == 1
    assert not conv.takes_winograd(x.float())


@needs_kernels
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="asks Linux on x86")
def test_matrix_units_are_the_processors():
    assert cpu.has_matrix_units() == ("amx_bf16" in Path("/proc/cpuinfo").read_text().split())


@needs_kernels
@torch.no_grad()
def test_empty_batch():
    assert layer()(image(0, 32, 16, 16)).shape == (0, 32, 16, 16)


@needs_kernels
def test_opcheck():
    conv, x = layer(), image(2, 32, 16, 16)
    filters = ops.winograd_filters(conv.weight)
    torch.library.opcheck(torch.ops.ddpm_fast.winograd.default, (x, filters, conv.bias.detach(), 32))
    torch.library.opcheck(torch.ops.ddpm_fast.winograd.default, (x.contiguous().bfloat16(), filters, None, 32))
