"""The module's convolution where gradients are recorded, or would be: it is Winograd's on a CPU in anybody's training
loop, its gradients are those of the definition, and it stays out of what only torch's own can do.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import random_unet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm_fast import use_backend
from ddpm_fast.nn import convolution
from ddpm_fast.nn.convolution import Conv2d
from ddpm_fast.ops.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.isas(), reason=cpu.unavailable)


def image(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def layer(c_in: int = 32, c_out: int = 32) -> Conv2d:
    torch.manual_seed(0)
    return Conv2d(c_in, c_out)


def error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


def gradients(conv: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The result, and the gradients of x and of what is not frozen."""
    x = x.detach().requires_grad_()
    y = conv(x)
    wanted = [parameter for parameter in conv.parameters() if parameter.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *wanted], grad.to(y.dtype))]


def exact(conv: Conv2d, x: Tensor, grad: Tensor) -> list[Tensor]:
    with use_backend("reference"):
        return gradients(copy.deepcopy(conv).double(), x.double(), grad)


@pytest.fixture
def ran(monkeypatch):
    """How often each kernel of Winograd's ran."""
    counts = dict.fromkeys(("winograd", "winograd_filters", "winograd_weight_gradient"), 0)

    def counted(name, original):
        def run(*arguments):
            counts[name] += 1
            original(*arguments)

        return run

    for name in counts:
        monkeypatch.setitem(cpu.OPS, name, counted(name, cpu.OPS[name]))
    return counts


@pytest.mark.parametrize("channels", [(32, 32), (33, 47), (64, 96)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train mode", "eval mode"])
def test_gradients(training, channels, ran):
    conv, x, grad = layer(*channels).train(training), image(4, channels[0], 14, 14), image(4, channels[1], 14, 14)
    found = gradients(conv, x, grad)
    assert ran == {"winograd": 2, "winograd_filters": 2, "winograd_weight_gradient": 1}
    for value, wanted in zip(found, exact(conv, x, grad), strict=True):
        assert value.dtype == torch.float32 and error(value, wanted) < 2e-6
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_training_and_sampling_give_the_same_bits():
    conv, x = layer(), image(4, 32, 14, 14)
    with torch.no_grad():
        kept = conv.eval()(x)
        assert torch.equal(conv.train()(x), kept)
    assert torch.equal(conv(x), kept) and torch.equal(conv.eval()(x), kept)


@torch.no_grad()
def test_in_train_mode_no_filters_are_kept(ran):
    conv, x = layer().train(), image(4, 32, 14, 14)
    held = len(convolution._transformed)
    for _ in range(2):
        conv(x)
    assert ran["winograd_filters"] == ran["winograd"] == 2 and len(convolution._transformed) == held


@pytest.mark.parametrize("training", [True, False], ids=["train mode", "eval mode"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_under_autocast(dtype, training, ran, monkeypatch):
    """The image is cast, the weight is not, and nothing but the results and the image's gradient is rounded."""
    monkeypatch.setitem(convolution._MADE.waste, dtype, 1.5)
    conv, x, grad = layer(40, 33).train(training), image(4, 40, 16, 16), image(4, 33, 16, 16, dtype=dtype)
    with torch.autocast("cpu", dtype):
        y, by_x, *by_parameters = gradients(conv, x, grad)
    assert ran == {"winograd": 2, "winograd_filters": 2, "winograd_weight_gradient": 1}
    expected = exact(conv, x.to(dtype), grad)
    assert y.dtype == dtype and by_x.dtype == torch.float32
    for value, wanted in zip((y, by_x), expected, strict=False):
        assert error(value, wanted) <= 1.001 * error(wanted.to(dtype), wanted)
    for value, wanted in zip(by_parameters, expected[2:], strict=True):
        assert value.dtype == torch.float32 and error(value, wanted) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sampling_under_autocast_keeps_the_filters(dtype, ran, monkeypatch):
    monkeypatch.setitem(convolution._KEPT.waste, dtype, 1.5)
    conv, x = layer().eval(), image(4, 32, 16, 16)
    with torch.autocast("cpu", dtype):
        made = [conv(x), conv(x)]
    assert ran == {"winograd": 2, "winograd_filters": 1, "winograd_weight_gradient": 0}
    expected = F.conv2d(x.to(dtype).double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert all(error(y, expected) <= 1.001 * error(expected.to(dtype), expected) and y.dtype == dtype for y in made)


def test_frozen_weights_leave_the_gradient_of_the_image(ran):
    conv, x, grad = layer().requires_grad_(False), image(4, 32, 14, 14), image(4, 32, 14, 14, seed=2)
    found = gradients(conv, x, grad)
    assert len(found) == 2 and ran["winograd_weight_gradient"] == 0 and ran["winograd"] == 2
    for value, wanted in zip(found, exact(conv, x, grad), strict=True):
        assert error(value, wanted) < 2e-6


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_checkpointing_gives_the_same_bits(dtype, reentrant, ran, monkeypatch):
    monkeypatch.setitem(convolution._MADE.waste, torch.bfloat16, 1.5)
    conv, x, grad = layer(), image(4, 32, 16, 16), image(4, 32, 16, 16, seed=2)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        expected = gradients(conv, x, grad)
        assert ran["winograd_weight_gradient"] == 1
        y = checkpoint(conv, x.requires_grad_(), use_reentrant=reentrant)
        y.backward(grad.to(y.dtype))
        found = [y, x.grad, conv.weight.grad, conv.bias.grad]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ran["winograd_weight_gradient"] == 2


def test_a_step_before_the_backward_is_torchs_error():
    conv, x = layer(), image(4, 32, 14, 14).requires_grad_()
    loss = conv(x).square().mean()
    loss.backward(retain_graph=True)
    torch.optim.SGD(conv.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_reference_backend_is_exactly_torchs_convolution(ran):
    conv, x, grad = layer(), image(4, 32, 14, 14), image(4, 32, 14, 14, seed=2)
    plain = nn.Conv2d(32, 32, 3, padding=1)
    plain.load_state_dict(conv.state_dict())
    with use_backend("reference"):
        inside = gradients(conv, x, grad)
        y = conv(x.requires_grad_())
    outside = [y, *torch.autograd.grad(y, [x, *conv.parameters()], grad)]
    expected = gradients(plain, x, grad)
    for found in (inside, outside):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(ran.values())


class Annotated(Tensor):
    pass


def parametrized(conv: Conv2d, x: Tensor) -> Tensor:
    return torch.nn.utils.parametrizations.weight_norm(conv)(x)


def matrix_units(conv: Conv2d, x: Tensor) -> Tensor:
    convolution._MADE.waste.pop(torch.bfloat16, None)
    with torch.autocast("cpu", torch.bfloat16):
        return conv(x)


@pytest.mark.parametrize(
    "run",
    [
        parametrized,
        matrix_units,
        pytest.param(lambda conv, x: torch.compile(conv, backend="eager", fullgraph=True)(x), id="compiled"),
        pytest.param(lambda conv, x: torch.compile(conv, backend="aot_eager", fullgraph=True)(x), id="traced"),
        pytest.param(lambda conv, x: conv(x.as_subclass(Annotated)), id="a subclass of Tensor"),
        pytest.param(lambda conv, x: torch.func.vmap(conv)(x[:, None]), id="vmap"),
        pytest.param(lambda conv, x: torch.func.grad(lambda x: conv(x).sum())(x), id="torch.func.grad"),
        pytest.param(lambda conv, x: torch.func.jvp(conv, (x,), (x,))[1], id="forward mode"),
        pytest.param(lambda conv, x: conv.double()(x.double()), id="float64"),
        pytest.param(lambda conv, x: conv.to("meta")(x.to("meta")), id="another device"),
        pytest.param(lambda conv, x: conv(x[:1, :, :8, :8]), id="few tiles"),
        pytest.param(lambda conv, x: conv(x[:, :, :5, :5]), id="tiles mostly unused"),
        pytest.param(lambda conv, x: layer(31, 32)(x[:, :31]), id="few channels in"),
    ],
)
def test_torchs_own_runs_the_rest(run, ran, monkeypatch):
    monkeypatch.setattr(convolution, "_MADE", convolution._MADE._replace(waste=dict(convolution._MADE.waste)))
    conv, x = layer(), image(4, 32, 16, 16)
    conv(x)
    assert ran["winograd"] == 1  # the same without what is tested here
    y = run(conv, x)
    if y.requires_grad and y.device.type == "cpu":
        y.sum().backward()
    assert ran["winograd"] == 1 and ran["winograd_weight_gradient"] == 0


def test_a_whole_networks_gradients_are_no_further_from_float64_than_twice_torchs(ran):
    config = {"image_size": 28, "in_channels": 1, "model_channels": 32, "channel_mult": (1, 2), "norm_groups": 8}
    model = random_unet(**config, attention_resolutions=(14,)).train()
    twin = copy.deepcopy(model).double()
    x, t, grad = image(4, 1, 28, 28), torch.arange(4) * 200, image(4, 1, 28, 28, seed=3)

    def parameters_gradients(network):
        y = network(x.to(next(network.parameters()).dtype), t)
        return torch.cat([v.flatten() for v in torch.autograd.grad(y, list(network.parameters()), grad.to(y.dtype))])

    ours = parameters_gradients(model)
    assert ran["winograd_weight_gradient"] > 10
    with use_backend("reference"):
        theirs, wanted = parameters_gradients(model), parameters_gradients(twin)
    assert error(ours, wanted) <= 2 * error(theirs, wanted)
