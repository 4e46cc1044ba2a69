"""The group norm of the U-Net is compared with the definition in float64; what its kernel promises; where the kernel is
not used."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import ops, use_backend
from ddpm_fast.errors import InputError
from ddpm_fast.nn.layers import GroupNorm, ResBlock
from ddpm_fast.ops.backends import cpu

needs_kernels = pytest.mark.skipif(not cpu.isas(), reason=cpu.unavailable)
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]
PRECISION = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 1e-5}
op = torch.ops.ddpm_fast.group_norm.default


def layer(groups: int, channels: int, silu: bool = True) -> GroupNorm:
    torch.manual_seed(0)
    norm = GroupNorm(groups, channels, 1e-5, silu)
    with torch.no_grad():
        norm.weight.add_(0.3 * torch.randn(channels))
        norm.bias.add_(0.3 * torch.randn(channels))
    return norm


def image(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, mean: float = 3.0, std: float = 2.0) -> Tensor:
    x = mean + std * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.to(dtype, memory_format=torch.channels_last)


def rows(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape[:2], generator=torch.Generator().manual_seed(2 + i)).to(dtype) for i in range(count)]


def exact(norm: GroupNorm, x: Tensor, scale: Tensor | None, shift: Tensor | None, added: Tensor | None) -> Tensor:
    """In float64, where torch's own norm loses the digits that the square of a large mean takes."""
    groups = (x if added is None else x + added[..., None, None]).unflatten(1, (norm.num_groups, -1))
    variance, mean = torch.var_mean(groups, (2, 3, 4), correction=0, keepdim=True)
    y = ((groups - mean) * (variance + norm.eps).rsqrt()).flatten(1, 2)
    y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    if scale is not None:
        y = y * (1 + scale[..., None, None]) + shift[..., None, None]
    return F.silu(y) if norm.silu else y


def with_gradients(function, norm: GroupNorm, inputs: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    inputs = [None if v is None else v.detach().requires_grad_() for v in inputs]
    output = function(norm, *inputs)
    wanted = [v for v in (*inputs, norm.weight, norm.bias) if v is not None]
    return [output, *torch.autograd.grad(output, wanted, grad)]


def check_against_float64(norm: GroupNorm, inputs: list[Tensor | None], tolerance: float | None = None) -> None:
    """Output and gradients, each to one rounding to its dtype and fp32 sums, of its largest value."""
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9)).to(inputs[0].dtype)
    values = with_gradients(GroupNorm.__call__, norm, inputs, grad)
    exactly = copy.deepcopy(norm).double()
    doubles = [None if v is None else v.double() for v in inputs]
    expected = with_gradients(exact, exactly, doubles, grad.double())
    sources = [inputs[0], *(v for v in inputs if v is not None), norm.weight, norm.bias]
    for value, reference, source in zip(values, expected, sources, strict=True):
        assert value.shape == reference.shape and value.dtype == source.dtype
        bound = tolerance or PRECISION[value.dtype]
        assert (value - reference).abs().max() <= bound * reference.abs().max().clamp_min(0.1)
    for value in values[:2]:
        assert value.is_contiguous(memory_format=torch.channels_last)


SHAPES = [
    pytest.param((3, 16, 4, 4), 8, id="as in a residual block"),
    pytest.param((2, 64, 7, 7), 32, id="one strip; a block of pixels and one more"),
    pytest.param((2, 192, 5, 3), 32, id="groups of 6: strips of 48 channels"),
    pytest.param((2, 15, 3, 5), 3, id="groups of 5"),
    pytest.param((2, 150, 3, 3), 2, id="groups of more than a strip"),
    pytest.param((3, 16, 4, 4), 16, id="one channel a group"),
    pytest.param((2, 24, 3, 4), 1, id="one group"),
    pytest.param((2, 32, 1, 1), 8, id="one pixel"),
    pytest.param((2, 1, 3, 2), 1, id="one channel"),
    pytest.param((1, 8, 256, 256), 2, id="262,144 values a group"),
]


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@needs_kernels
def test_against_float64(isa, shape, groups, dtype):
    x, (scale, shift, added) = image(shape, dtype), rows(shape, 3, dtype)
    check_against_float64(layer(groups, shape[1]), [x, None, None, None])
    check_against_float64(layer(groups, shape[1], silu=False), [x, scale, shift, None])
    check_against_float64(layer(groups, shape[1]), [x, scale, shift, added])


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_against_float64(dtype):
    shape = (3, 16, 4, 4)
    with use_backend("reference"):
        check_against_float64(layer(8, 16), [image(shape, dtype), *rows(shape, 3, dtype)])
        check_against_float64(layer(8, 16, silu=False), [image(shape, dtype), None, None, None])


def test_gradient_by_finite_differences():
    norm = layer(2, 4).double()
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    scale, shift, added = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(norm, (x, scale, shift, added))


@pytest.mark.parametrize("dtype", DTYPES)
@needs_kernels
def test_error_is_at_most_that_of_plain_torch(dtype):
    """Both round once to the dtype; in fp32 ours may be off by twice as much as torch's own norm and SiLU."""
    shape = (4, 64, 16, 16)
    norm, x = layer(8, 64), image(shape, dtype)
    expected = exact(copy.deepcopy(norm).double(), x.double(), None, None, None)
    error = (norm(x) - expected).norm()
    with use_backend("reference"):
        assert error <= 2 * (norm(x) - expected).norm()


@pytest.mark.parametrize("mean", [1000.0, -4096.0, 1e6])
@needs_kernels
def test_a_large_mean_costs_nothing(isa, mean):
    """Where variance 1 stands on a mean of 4096, E[x^2] - E[x]^2 in fp32 is off by 100%; on one of 1e6 an fp32 mean is
    off by up to 0.03, while x is what it is."""
    x = image((2, 16, 24, 24), mean=mean, std=1.0)
    check_against_float64(layer(4, 16), [x, None, None, None], tolerance=1e-5)
    check_against_float64(layer(4, 16, silu=False), [x, None, None, -mean + rows(x.shape, 1)[0]], tolerance=1e-5)


@needs_kernels
def test_silu_over_the_whole_range(isa):
    """u from the smallest to the largest fp32 numbers: a norm of 1 pixel gives its bias, whatever x."""
    u = torch.cat([torch.linspace(-110, 110, 100_001), torch.logspace(-40, 38, 1000), -torch.logspace(-40, 38, 1000)])
    limits = torch.tensor([0.0, 3.4028234e38, -3.4028234e38, torch.inf, -torch.inf, torch.nan])
    u = torch.cat([u, limits])
    n = len(u)
    x = torch.zeros(1, n, 1, 1)
    grad = torch.ones(1, n, 1, 1)
    y, _, statistics = op(x, torch.ones(n), u, None, None, None, None, None, n, 1e-5, True, False)
    y, finite = y.flatten().double(), u.double()[:-3]
    expected = F.silu(finite)
    relative = torch.where(finite < -8, 5e-6, 7e-7)  # SiLU of -8 is -0.0027
    assert ((y[:-3] - expected).abs() <= 1e-35 + relative * expected.abs()).all()
    assert y[-3] == torch.inf and y[-2:].isnan().all()  # what is not finite shows, as it does in torch's

    given = torch.ones(n), u, None, None, None
    _, _, sums = torch.ops.ddpm_fast.group_norm_backward(grad, None, x, None, *given, statistics, True)
    finite = finite.requires_grad_()
    (slope,) = torch.autograd.grad(F.silu(finite).sum(), finite)
    assert ((sums[0, 0, :-3] - slope).abs() <= 3e-7).all()
    assert sums[0, 0, -3:].isnan().all()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32 weights", "bf16 weights"])
@needs_kernels
def test_weights_of_another_dtype(weights):
    """Autocast brings bf16 images to fp32 weights; model.bfloat16() may meet fp32 images."""
    shape = (2, 16, 4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [image(shape, dtype), *rows(shape, 3, torch.bfloat16)]
        check_against_float64(layer(4, 16).to(weights), inputs)


@needs_kernels
def test_any_memory_layout():
    norm, whole = layer(8, 32), image((4, 32, 10, 12))
    wide = rows((4, 64), 1)[0]
    scale, shift = wide.chunk(2, 1)
    for x in (whole.contiguous(), whole[::2], whole[:, :, 1:7, ::2], image((4, 64, 6, 6))[:, ::2], whole.mT):
        check_against_float64(norm, [x, scale[: len(x)], shift[: len(x)], wide[: len(x), ::2]])
    norm.weight, norm.bias = (torch.nn.Parameter(v[::2]) for v in (wide[0], wide[1]))
    x, grad = whole.requires_grad_(), image((4, 32, 10, 12)).contiguous()
    y = norm(x)
    torch.testing.assert_close(
        y.double(), exact(copy.deepcopy(norm).double(), x.double(), None, None, None), rtol=1e-5, atol=1e-5
    )
    ours = torch.autograd.grad(y, x, grad)
    assert torch.equal(ours[0], torch.autograd.grad(norm(x), x, grad.contiguous(memory_format=torch.channels_last))[0])


def every_result(norm: GroupNorm, x: Tensor, scale: Tensor, shift: Tensor, added: Tensor) -> list[Tensor]:
    arguments = norm.weight.detach(), norm.bias.detach(), scale, shift, added
    y, _, statistics = op(x, *arguments, None, None, norm.num_groups, norm.eps, norm.silu, False)
    grad = torch.cos(7 * x)
    dx, _, sums = torch.ops.ddpm_fast.group_norm_backward(grad, None, x, None, *arguments, statistics, norm.silu)
    return [y, statistics, dx, *sums]


BITS = [
    pytest.param((3, 192, 12, 12), 32, id="blocks of channels"),
    pytest.param((2, 150, 9, 9), 2, id="groups wider than a strip"),
    pytest.param((5, 15, 20, 20), 3, id="few odd channels"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), BITS)
@needs_kernels
def test_same_bits_on_any_threads_and_batch(shape, groups, dtype):
    norm, inputs = layer(groups, shape[1]), [image(shape, dtype), *rows(shape, 3, dtype)]
    whole = every_result(norm, *inputs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            assert all(map(torch.equal, every_result(norm, *inputs), whole)), count
            one = every_result(norm, *(v[1:2] for v in inputs))
            assert all(torch.equal(v, w[1:2]) for v, w in zip(one, whole, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("shape", "groups"), BITS)
@needs_kernels
def test_instruction_sets_differ_by_the_rounding_of_fused_products_at_most(shape, groups):
    norm, inputs = layer(groups, shape[1]), [image(shape, torch.float32), *rows(shape, 3, torch.float32)]
    isa, found = cpu.isa(), {}
    try:
        for name in cpu.isas():
            cpu.use_isa(name)
            found[name] = every_result(norm, *inputs)
    finally:
        cpu.use_isa(isa)
    for name, results in found.items():
        for one, other in zip(results, found[isa], strict=True):
            assert torch.equal(one, other) or "generic" in (name, isa), name
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("backend_name", [None, "reference"])
def test_empty_batch(backend_name):
    norm = layer(4, 16)
    with use_backend(backend_name):
        y, dx, *gradients = with_gradients(
            GroupNorm.__call__, norm, [torch.zeros(0, 16, 3, 3), *rows((0, 16), 3)], torch.zeros(0, 16, 3, 3)
        )
    assert y.shape == dx.shape == (0, 16, 3, 3)
    assert [v.shape for v in gradients] == [(0, 16)] * 3 + [(16,)] * 2
    assert all(v.count_nonzero() == 0 for v in gradients)


@pytest.fixture
def taken(monkeypatch):
    """A list with the shape of each image that went through the kernel."""
    shapes, original = [], cpu.OPS["group_norm"]
    monkeypatch.setitem(
        cpu.OPS, "group_norm", lambda norm, *rest: shapes.append(tuple(norm.x.shape)) or original(norm, *rest)
    )
    return shapes


def on_the_reference_backend(norm, x):
    with use_backend("reference"):
        return norm(x)


@needs_kernels
@pytest.mark.parametrize(
    "run",
    [
        on_the_reference_backend,
        pytest.param(lambda norm, x: norm.double()(x.double()), id="float64"),
        pytest.param(lambda norm, x: norm.to("meta")(x.to("meta")), id="another device"),
        pytest.param(lambda norm, x: norm(x, *[v.double() for v in rows(x.shape, 2)]), id="float64 scale and shift"),
        pytest.param(lambda norm, x: torch.compile(norm, backend="eager", fullgraph=True)(x), id="compiled"),
    ],
)
def test_falls_back_to_plain_torch(run, taken):
    norm, x = layer(4, 16), image((2, 16, 4, 4))
    with_kernel = norm(x)
    assert taken == [(2, 16, 4, 4)]
    assert run(norm, x).shape == with_kernel.shape
    assert len(taken) == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"weight has shape \(16,\) and x 15 channels"):
        layer(4, 16)(image((2, 15, 4, 4)))
    with pytest.raises(InputError, match=r"scale has shape \(2, 12\).*expected \(2, 16\), or \(1, 16\)"):
        layer(4, 16)(image((2, 16, 4, 4)), *rows((2, 12), 2))
    with pytest.raises(InputError, match="3 groups do not divide x's 16 channels"):
        ops.group_norm(image((2, 16, 4, 4)), torch.ones(16), torch.ones(16), 3, 1e-5)


@needs_kernels
def test_a_second_derivative_is_refused():
    x = image((2, 16, 4, 4)).requires_grad_()
    (first,) = torch.autograd.grad(layer(4, 16)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@needs_kernels
def test_only_what_needs_a_gradient_gets_one():
    norm, x = layer(4, 16), image((2, 16, 4, 4))
    norm.requires_grad_(False)
    assert not norm(x).requires_grad
    (dx,) = torch.autograd.grad(norm(x.requires_grad_()).sum(), x)
    assert dx.shape == x.shape and norm.weight.grad is None
    frozen = copy.deepcopy(norm)
    frozen.bias.requires_grad_()
    frozen(x.detach()).sum().backward()
    assert frozen.bias.grad.shape == (16,) and frozen.weight.grad is None


@pytest.mark.parametrize("name", [None, "reference"])
def test_residual_block_adds_the_embedding_before_its_norm(name):
    torch.manual_seed(0)
    block = ResBlock(8, 8, 12, groups=4, eps=1e-5, dropout=0.0, scale_shift=False)
    torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x, emb = image((2, 8, 6, 6)), torch.randn(2, 12)
    twin, x64 = copy.deepcopy(block).double(), x.double()
    h = F.conv2d(F.silu(F.group_norm(x64, 4)), twin.conv1.weight, twin.conv1.bias, padding=1)
    h = h + (emb.double() @ twin.emb.weight.T + twin.emb.bias)[..., None, None]
    expected = x64 + F.conv2d(F.silu(F.group_norm(h, 4)), twin.conv2.weight, twin.conv2.bias, padding=1)
    with use_backend(name):
        torch.testing.assert_close(block(x, emb).double(), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_opcheck():
    shape = (2, 16, 4, 3)
    for x in (image(shape), image(shape, torch.bfloat16).contiguous()):
        for extra in ([None] * 3, rows(shape, 3)):
            arguments = [x, torch.randn(16), torch.randn(16), *extra, None, None]
            torch.library.opcheck(op, (*arguments, 4, 1e-5, True, False))
            statistics = op(*arguments, 4, 1e-5, True, False)[2]
            backward = torch.ops.ddpm_fast.group_norm_backward.default
            torch.library.opcheck(backward, (torch.ones_like(x), None, x, None, *arguments[1:6], statistics, True))
            with_gradient = [v if v is None else v.clone().requires_grad_() for v in arguments]
            torch.library.opcheck(op, (*with_gradient, 4, 1e-5, True, False))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_groups", 0, "0 groups do not divide"),
        ("num_groups", -2, "-2 groups do not divide"),
        ("num_groups", 3, "3 groups do not divide"),
        ("weight", torch.nn.Parameter(torch.ones(7)), r"weight has shape \(7,\) and x 8 channels"),
        ("bias", torch.nn.Parameter(torch.ones(8, 1)), r"bias has shape \(8, 1\) and x 8 channels"),
        ("weight", None, "weight is a NoneType"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True)
def test_a_layer_whose_attributes_were_edited_refuses(name, value, said, backend):
    norm = GroupNorm(2, 8, 1e-5)
    setattr(norm, name, value)
    with pytest.raises(InputError, match=f"group_norm: {said}"):
        norm(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize("given", ["scale", "shift"])
def test_a_scale_without_a_shift_is_refused(given):
    norm = GroupNorm(2, 8, 1e-5)
    with pytest.raises(InputError, match="scale and shift belong together; give both, or neither"):
        norm(torch.randn(2, 8, 4, 4), **{given: torch.zeros(2, 8)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_of_one_value_are_their_bias(dtype):
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((1, 3, 1, 1), (3,), (3,)))
    torch.testing.assert_close(ops.group_norm(x, weight, bias, 3, 1e-3).flatten(), bias)


def test_the_weight_of_a_norm_learns_from_1x1_images_in_channels_last_that_need_no_gradient():
    # torch 2.13 crashes there: 1x1 images are contiguous and have the strides of channels_last.
    x = image((3, 4, 1, 1), torch.float64)
    assert x.stride() == (4, 1, 4, 4)
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(
        ops.group_norm(x, weight, torch.zeros(4, dtype=torch.float64), 2, 1e-5).sum(), weight
    )
    pairs = x.view(3, 2, 2)
    normalised = (pairs - pairs.mean(2, keepdim=True)) / (pairs.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found, normalised.view(3, 4).sum(0))
