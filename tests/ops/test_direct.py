"""The short way of a call: that it is taken, that it is not taken where torch may want to see the call, and that it
gives what the long way gives."""

import contextlib
import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_fast as df
from ddpm_fast import compat, ops
from ddpm_fast.ops import direct
from ddpm_fast.ops.backends import cpu
from ddpm_fast.ops.dispatch import is_usual_on_cpu, use_backend

SHAPE = (2, 4, 6, 5)
KEY = df.NoiseKey.of(3, 2, first_sample_id=9)
T, STEP = torch.tensor([0, 1]), torch.tensor(1)


def image(seed=0, channels=4, dtype=torch.float32, memory_format=torch.contiguous_format):
    values = torch.randn((2, channels, 6, 5), generator=torch.Generator().manual_seed(seed))
    return values.to(dtype=dtype, memory_format=memory_format)


def table(columns):
    rows = torch.rand((5, columns), generator=torch.Generator().manual_seed(columns))
    if columns >= 9:
        rows[:, 7], rows[:, 8] = 0.0, math.inf  # the KL divergence, unclipped
    return rows


TABLES = {columns: table(columns) for columns in (2, 3, 8, 9, 11)}
LAST = image(memory_format=torch.channels_last)


def in_place(x, noise):
    x, x0, x_model = x.clone(), torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(x)
    ops.reverse_step_(x, image(1), TABLES[8], STEP, noise, x0=x0, x_model=x_model)
    return x, x0, x_model


# Each op of an image x, and of noise.
CALLS = {
    "normal": lambda x, noise: ops.normal(KEY, (4, 6, 5), dtype=x.dtype),
    "q_sample": lambda x, noise: ops.q_sample(x, T, TABLES[2], noise),
    "diffusion_loss": lambda x, noise: ops.diffusion_loss(x, image(1), T, TABLES[3], noise),
    "hybrid_loss": lambda x, noise: ops.hybrid_loss(image(1, 8), x, T, TABLES[11], noise),
    "vlb_terms": lambda x, noise: ops.vlb_terms(image(1, 8), x, T, TABLES[9], noise),
    "reverse_step": lambda x, noise: ops.reverse_step(
        x, image(1, 8), TABLES[8], STEP, noise, x0_previous=image(2), return_x0=True, model_dtype=torch.bfloat16
    ),
    "reverse_step_": in_place,
    "group_norm": lambda x, noise: ops.group_norm(
        x.contiguous(memory_format=torch.channels_last),
        torch.nn.Parameter(torch.rand(4), requires_grad=False),
        torch.ones(4),
        2,
        1e-5,
        scale_shift=(torch.full((1, 4), 0.5), torch.full((1, 4), 0.25)),
        added=torch.arange(8.0).view(2, 4),
        silu=True,
    ),
}


class Counting:
    """The C++ functions, which write down the calls that they did not leave to the long way."""

    def __init__(self, functions):
        self._functions, self.taken = functions, []

    def __getattr__(self, name):
        function = getattr(self._functions, name)

        def call(*given):
            result = function(*given)
            if result is not None and result is not False:
                self.taken.append(name)
            return result

        return call


def _need_the_short_way():
    """Where torch and the kernels have all that it needs, a short way that is not there is a fault, not a skip."""
    if compat.tensor_exchange() is None or cpu.unavailable:
        pytest.skip("the short way needs the C++ kernels, and DLPack's exchange, which torch has from 2.13 on")
    if not is_usual_on_cpu():
        pytest.skip("the short way is that of the C++ kernels, and another backend was asked for")
    assert direct._direct is not None


@pytest.fixture
def taken(monkeypatch):
    """The names of the short ways that were taken: of an op, or is_plain."""
    _need_the_short_way()
    assert direct.on_cpu() is not None
    counting = Counting(direct.on_cpu())
    monkeypatch.setattr(direct, "_direct", counting)
    return counting.taken


def both_ways(monkeypatch, call):
    torch.manual_seed(0)
    short = call()
    with monkeypatch.context() as patch:
        patch.setattr(direct, "_direct", None)
        torch.manual_seed(0)
        return short, call()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, dtype) for op in CALLS for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    + [(op, torch.uint8) for op in ("q_sample", "hybrid_loss", "vlb_terms")],
    ids=str,
)
def test_both_ways_give_the_same(op, dtype, memory_format, taken, monkeypatch):
    """The long way is what the other tests compare with references of their own."""
    x = image(dtype=dtype, memory_format=memory_format)
    for noise in (KEY, image(3)):
        short, long = both_ways(monkeypatch, lambda noise=noise: CALLS[op](x, noise))
        assert taken == [op]
        taken.clear()
        assert type(short) is type(long)
        for made, expected in zip(*((r,) if isinstance(r, Tensor) else r for r in (short, long)), strict=True):
            assert (made.dtype, made.stride()) == (expected.dtype, expected.stride())
            assert torch.equal(made, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_normals(memory_format, taken):
    z = ops.normal(KEY, (4, 6, 5), memory_format=memory_format)
    assert taken == ["normal"]
    assert z.is_contiguous(memory_format=memory_format)
    assert torch.equal(z.flatten(1), df.noise.normals(KEY, 120))


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Dispatched, Functions])
@pytest.mark.parametrize("op", CALLS)
def test_a_mode_sees_each_op(op, mode, taken):
    with mode() as entered:
        CALLS[op](image(), KEY)
    assert taken == []
    assert any(op in name for name in entered.seen)


@pytest.mark.parametrize("op", CALLS)
def test_a_profiler_sees_each_op(op, taken):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        CALLS[op](image(), KEY)
    assert taken == []
    assert f"ddpm_fast::{op}" in [event.name for event in profile.events()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tracing", ["jit", "make_fx", "make_fx before dispatch", "symbolic make_fx", "export"])
def test_what_traces_sees_the_op(tracing, taken):
    def f(x, t, table, noise):
        return ops.q_sample(x, t, table, noise)

    given = (image(), T, TABLES[2], image(3))
    if tracing == "jit":
        graph = str(torch.jit.trace(f, given, check_trace=False).graph)
    elif tracing == "export":
        module = torch.nn.Module()
        module.forward = f
        graph = str(torch.export.export(module, given, strict=False).graph)
    else:
        mode = "symbolic" if tracing.startswith("symbolic") else "real"
        graph = str(make_fx(f, tracing_mode=mode, pre_dispatch="before" in tracing)(*given).graph)
    assert taken == []
    assert "ddpm_fast::q_sample" in graph or "ddpm_fast.q_sample" in graph


def test_compiled_code_sees_the_op(taken):
    graphs = []

    def backend(module, _):
        graphs.append(str(module.graph))
        return module.forward

    torch.compile(CALLS["q_sample"], backend=backend, fullgraph=True)(image(), image(3))
    assert "q_sample" in graphs[0]
    assert "q_sample" not in taken


class Watching(Tensor):
    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("op", ["q_sample", "diffusion_loss", "hybrid_loss", "reverse_step", "reverse_step_"])
def test_a_subclass_sees_the_op(op, taken):
    Watching.seen.clear()
    CALLS[op](image().as_subclass(Watching), KEY)
    assert taken == []
    assert any(f"ddpm_fast.{op}" in name for name in Watching.seen)


def test_noise_of_a_subclass_is_seen_too(taken):
    Watching.seen.clear()
    key = df.NoiseKey(KEY.seed, KEY.sample_id.as_subclass(Watching), KEY.step)
    CALLS["q_sample"](image(), key)
    assert taken == []
    assert any("ddpm_fast.q_sample" in name for name in Watching.seen)


@pytest.mark.parametrize("wanted", ["x0", "noise"])
def test_a_gradient_that_is_wanted(wanted, taken):
    given = {"x0": image(), "noise": image(3)}
    given[wanted].requires_grad_()
    (grad,) = torch.autograd.grad(ops.q_sample(given["x0"], T, TABLES[2], given["noise"]).sum(), given[wanted])
    assert taken == []
    column = TABLES[2][T, 0 if wanted == "x0" else 1]
    torch.testing.assert_close(grad, column.view(2, 1, 1, 1).expand(SHAPE))
    with torch.no_grad():
        assert not ops.q_sample(given["x0"], T, TABLES[2], given["noise"]).requires_grad
    assert taken == ["q_sample"]


@pytest.mark.filterwarnings("ignore")  # vmap says that it calls the op once for each of its samples
def test_transforms_see_the_op(taken):
    def f(x):
        return ops.q_sample(x, T, TABLES[2], KEY)

    x = image()
    mapped = torch.vmap(f)(torch.stack([x, 2 * x]))
    functional = torch.func.functionalize(f)(x)
    with pytest.raises(RuntimeError, match="setup_context"):  # as any autograd.Function with a ctx in its forward
        torch.func.grad(lambda x: f(x).sum())(x)
    with pytest.raises(df.InputError, match="forward mode"), torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(x, x))
    assert taken == []
    for made, expected in zip((*mapped, functional), (f(x), f(2 * x), f(x)), strict=True):
        assert torch.equal(made, expected)


def wrapped(kind):
    """Tensors of torch's own type whose memory does not hold their values."""
    if kind == "negative":
        return torch._neg_view(image())
    if kind == "zero":
        return torch._efficientzerotensor(SHAPE)
    return torch._to_functional_tensor(image())


@pytest.mark.parametrize("kind", ["negative", "zero", "functional"])
@pytest.mark.parametrize("op", ["q_sample", "reverse_step"])
def test_memory_that_does_not_hold_the_values(op, kind, taken):
    x = wrapped(kind)
    if kind == "functional":  # what torch cannot read either is at least not read
        with contextlib.suppress(Exception):
            CALLS[op](x, KEY)
        assert taken == []
        return
    made, expected = (CALLS[op](given, KEY) for given in (x, {"negative": -image()}.get(kind, torch.zeros(SHAPE))))
    assert taken == [op]  # of what was expected alone
    assert torch.equal(made[0], expected[0])


def test_a_lazy_copy_is_made_before_it_is_written(taken):
    x = image()
    lazy = torch._lazy_clone(x)
    ops.reverse_step_(lazy, image(1), TABLES[8], STEP, KEY)
    assert taken == ["reverse_step_"]
    assert torch.equal(x, image())
    assert not torch.equal(lazy, x)


@pytest.mark.parametrize("op", CALLS)
def test_inference_mode(op, taken):
    with torch.inference_mode():
        result = CALLS[op](image(), KEY)
    assert taken == [op]
    for tensor in (result,) if isinstance(result, Tensor) else result:
        assert tensor.is_inference()


def test_another_backend_is_asked_for(taken):
    with use_backend("reference"):
        ops.q_sample(image(), T, TABLES[2], KEY)
    assert taken == ["is_plain"]  # called as it is, but for the choice of the backend


STRANGE = {
    "in float64": lambda: ops.q_sample(image().double(), T, TABLES[2], KEY),
    "not dense": lambda: ops.q_sample(image(channels=8)[:, ::2], T, TABLES[2], KEY),
    "strided t": lambda: ops.q_sample(image(), torch.tensor([0, 9, 1])[::2], TABLES[2], KEY),
    "a norm of one that is contiguous": lambda: ops.group_norm(image(), torch.ones(4), torch.ones(4), 2, 1e-5),
}


@pytest.mark.parametrize("word", STRANGE)
def test_what_a_kernel_cannot_take_as_it_is(word, taken, monkeypatch):
    short, long = both_ways(monkeypatch, STRANGE[word])
    assert taken == ["is_plain"]
    assert torch.equal(short, long)


def test_an_empty_batch(taken):
    assert ops.q_sample(image()[:0], T[:0], TABLES[2], df.NoiseKey.of(0, 0)).shape == (0, *SHAPE[1:])
    assert taken == []


def test_plain_arguments():
    _need_the_short_way()
    x, weight = image(), torch.nn.Parameter(torch.ones(3))
    assert direct.is_plain(x, KEY, None, 3, 0.5, True, torch.float32, weight.detach())
    assert not direct.is_plain(x, weight)
    with torch.no_grad():
        assert direct.is_plain(x, weight)
    for other in ([x], "x", x.to_sparse(), x.as_subclass(Watching), object()):
        assert not direct.is_plain(x, other)
