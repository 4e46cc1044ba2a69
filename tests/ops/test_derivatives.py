"""A derivative that an op does not have is refused, and never 0 in silence; one that it has is torch's own. And what an
op writes in place: torch sees it, and it may not share memory with anything else.
"""

import pytest
import torch
from torch.autograd import forward_ad

from ddpm_fast import ops
from ddpm_fast.errors import InputError
from ddpm_fast.nn.convolution import Conv2d
from ddpm_fast.noise import NoiseKey

X0 = torch.linspace(-1, 1, 120).view(2, 3, 4, 5)
OUT = torch.linspace(2, -1, 120).view(2, 3, 4, 5).sin()
T = torch.tensor([0, 1])
KEY = NoiseKey.of(3, 2)
LOSS_TABLE = torch.tensor([[0.0, 1.0, 1.0], [0.5, -0.5, 2.0]])
BOUND_TABLE = torch.tensor([[0.0, 1.0, -0.1, 2.0, -6.0, 0.2, 0.3, 0.0, torch.inf]]).repeat(2, 1)
HYBRID_TABLE = torch.cat([BOUND_TABLE, torch.tensor([[1.0, 0.5], [2.0, 0.5]])], 1)
STEP_TABLE = torch.tensor([[1.25, -0.75, 0.5, 0.4, -0.3, 0.2, 0.9, 0.35]])
STEP = torch.tensor(0)


def group_norm(x):
    return ops.group_norm(x, torch.ones(3), torch.zeros(3), 1, 1e-5, silu=True)


def normed_by(weight):
    return ops.group_norm(OUT, weight, torch.zeros(3), 1, 1e-5, silu=True)


# Ops with a first derivative alone: what is differentiated, and its value.
ONCE = {
    "diffusion_loss": (lambda out: ops.diffusion_loss(out, X0, T, LOSS_TABLE, KEY), OUT),
    "hybrid_loss": (lambda out: ops.hybrid_loss(out, X0, T, HYBRID_TABLE, KEY), torch.cat([OUT, X0], 1)),
    "vlb_terms": (lambda out: ops.vlb_terms(out, X0, T, BOUND_TABLE, KEY).bits_per_dim, OUT),
    "group_norm": (group_norm, OUT),
    "group_norm ": (normed_by, torch.linspace(1, 2, 3)),  # in its weight
}


@pytest.mark.parametrize("op", ONCE)
@pytest.mark.parametrize("through", ["the loss", "a network", "what comes after"])
def test_a_second_derivative_raises(op, through):
    # The gradient depends on the parameter by what comes in, by the network before the op, or through the op alone.
    run, value = ONCE[op]
    parameter = torch.tensor(0.7, requires_grad=True)
    leaf = value.clone().requires_grad_()
    with ops.use_backend("cpu"):
        if through == "a network":
            loss, by, again = run(parameter**2 * value).sum(), parameter, parameter
        elif through == "the loss":
            loss, by, again = run(leaf).square().sum(), leaf, leaf
        else:
            loss, by, again = (run(leaf) * parameter).sum(), leaf, parameter
        (plain,) = torch.autograd.grad(loss, by, retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, by, create_graph=True)
        assert torch.equal(plain, gradient.detach())  # asked for in case, it is what it was
        with pytest.raises(RuntimeError, match=rf"{op.strip()} has no second derivative: "):
            torch.autograd.grad(gradient.square().sum(), again, retain_graph=True)
        with pytest.raises(RuntimeError, match=rf"{op.strip()} has no second derivative: "):
            gradient.sum().backward()


def test_second_derivatives_that_there_are():
    x, z = (v[:, :1, :2, :2].double().requires_grad_() for v in (X0, OUT))
    doubled = torch.cat([OUT[:, :1], X0[:, :1]], 1)[..., :2, :2].double().requires_grad_()
    table = torch.tensor([[0.8, 0.6], [0.1, 0.9]], dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x, z: ops.q_sample(x, T, table, z), (x, z))

    def step(x, output, previous):
        made = ops.reverse_step(x, output, STEP_TABLE.double(), STEP, KEY, x0_previous=previous, return_x0=True)
        return made.x, made.x0

    assert torch.autograd.gradgradcheck(step, (x, doubled, z))


CONSTANT = {
    "diffusion_loss, x0": lambda x: ops.diffusion_loss(OUT, x, T, LOSS_TABLE, KEY),
    "diffusion_loss, noise": lambda x: ops.diffusion_loss(OUT.clone().requires_grad_(), X0, T, LOSS_TABLE, x),
    "hybrid_loss, x0": lambda x: ops.hybrid_loss(torch.cat([OUT, X0], 1).requires_grad_(), x, T, HYBRID_TABLE, KEY),
    "vlb_terms, noise": lambda x: ops.vlb_terms(OUT, X0, T, BOUND_TABLE, x),
    "reverse_step, noise": lambda x: ops.reverse_step(X0, OUT, STEP_TABLE, STEP, x),
}


@pytest.mark.parametrize("word", CONSTANT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_input_without_a_derivative_must_not_ask_for_one(word, dtype):
    op, name = word.split(", ")
    backend = "cpu" if dtype == torch.float32 else "reference"
    x = X0.clone().to(dtype).requires_grad_()
    with ops.use_backend(backend):
        with pytest.raises(InputError, match=rf"{op} has no gradient in {name}, only in .*: call .detach\(\)"):
            CONSTANT[word](x)
        with torch.no_grad():
            CONSTANT[word](x)


def test_the_other_results_of_a_loss_have_no_gradient():
    out = OUT.clone().requires_grad_()
    _, residual = torch.ops.ddpm_fast.diffusion_loss(
        out, X0, T, LOSS_TABLE, None, KEY.seed, KEY.sample_id, KEY.step, 0, True
    )
    assert not residual.requires_grad


def test_an_op_without_a_gradient_refuses_one():
    image, filters = torch.zeros(1, 32, 8, 8), ops.winograd_filters(torch.zeros(32, 32, 3, 3))
    x = OUT.clone().requires_grad_()
    calls = {
        "winograd": (image.requires_grad_(), filters, None, 32),
        "loss_backward": (x, torch.ones(2, 1)),
        "reverse_step_": (OUT.clone(), x, None, None, STEP_TABLE, STEP, *[None, *_parts()]),
    }
    for name, arguments in calls.items():
        op = getattr(torch.ops.ddpm_fast, name)
        with pytest.raises(InputError, match=f"{name} has no gradient"):
            op(*arguments)
        with torch.no_grad():
            op(*arguments)


def _parts():
    return KEY.seed, KEY.sample_id, KEY.step, KEY.stream


FORWARD = {
    "q_sample": lambda x: ops.q_sample(x, T, torch.ones(2, 2), KEY),
    "diffusion_loss": lambda x: ops.diffusion_loss(x, X0, T, LOSS_TABLE, KEY),
    "vlb_terms": lambda x: ops.vlb_terms(x, X0, T, BOUND_TABLE, KEY).bits_per_dim,
    "reverse_step": lambda x: ops.reverse_step(x, OUT, STEP_TABLE[:, :], STEP, X0).x,
    "reverse_step_": lambda x: ops.reverse_step_(x, OUT, STEP_TABLE, STEP, KEY),
    "loss_backward": lambda x: torch.ops.ddpm_fast.loss_backward(x, torch.ones(2, 1)),
}


@pytest.mark.parametrize("word", FORWARD)
def test_forward_mode_is_refused(word):
    said = rf"{word} has no derivative in forward mode"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(OUT.clone(), torch.ones_like(OUT))
        with pytest.raises(InputError, match=said):
            FORWARD[word](dual)
    with pytest.raises(InputError, match=said):
        torch.func.jvp(FORWARD[word], (OUT.clone(),), (torch.ones_like(OUT),))
    FORWARD[word](OUT.clone())


def test_forward_mode_through_the_networks_ops_is_torchs():
    torch.manual_seed(0)
    conv = Conv2d(32, 32).eval().requires_grad_(False)
    x, tangent = torch.randn(1, 32, 16, 16), torch.randn(1, 32, 16, 16)
    norm = torch.nn.GroupNorm(4, 32).requires_grad_(False)

    def ours(x):
        return ops.group_norm(conv(x), norm.weight, norm.bias, 4, 1e-5)

    def torchs(x):
        return norm(torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1))

    found, expected = (torch.func.jvp(f, (x,), (tangent,)) for f in (ours, torchs))
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_torch_sees_what_is_written_in_place(host_backend):
    x, x0, x_model = X0.clone(), X0.clone(), X0.half()
    weight = torch.ones((), requires_grad=True)
    for written in (x, x0, x_model):
        product = (weight * written).float().sum()  # saves what is about to be written
        with torch.no_grad():
            ops.reverse_step_(x, OUT, STEP_TABLE, STEP, KEY, x0=x0, x_model=x_model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with torch.inference_mode():
        ops.reverse_step_(X0.clone(), OUT, STEP_TABLE, STEP, KEY)


def overlapping(kind):
    """Arguments of reverse_step_ in which two share memory, and the names of the two."""
    memory = torch.rand(1000)
    x = memory[:120].view(2, 3, 4, 5)
    last = memory[119:239].view(2, 3, 4, 5)  # begins at x's last element
    given = {"x": x, "output": OUT, "table": STEP_TABLE, "step": STEP, "noise": KEY, "x0": None, "x_model": None}
    ints = memory[:4].view(torch.int64)
    return {
        "output begins in x": (given | {"output": last}, "output shares memory with x"),
        "output of twice the channels begins as x": (
            given | {"output": memory[:240].view(2, 6, 4, 5)},
            "output shares memory with x",
        ),
        "output is x in another order": (
            given | {"output": memory[:120].view(2, 4, 5, 3).permute(0, 3, 1, 2)},
            "output shares memory with x",
        ),
        "x0 is x": (given | {"x0": x}, "x0 shares memory with x"),
        "x0 is the output": (given | {"x0": OUT.clone(), "output": None}, "output shares memory with x0"),
        "x_model is x0": (given | {"x": X0.clone(), "x0": last, "x_model": last}, "x_model shares memory with x0"),
        "x_model begins in x0": (
            given | {"x": X0.clone(), "x0": x, "x_model": last},
            "x_model shares memory with x0",
        ),
        "noise is x": (given | {"noise": x}, "noise shares memory with x"),
        "the table": (given | {"table": memory[100:108].view(1, 8)}, "table shares memory with x"),
        "the step": (given | {"step": ints[0]}, "step shares memory with x"),
        "the seed": (given | {"noise": NoiseKey(ints[0], KEY.sample_id, KEY.step)}, "seed shares memory with x"),
        "the ids": (given | {"noise": NoiseKey(KEY.seed, ints, KEY.step)}, "sample_id shares memory with x"),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "output begins in x",
        "output of twice the channels begins as x",
        "output is x in another order",
        "x0 is x",
        "x0 is the output",
        "x_model is x0",
        "x_model begins in x0",
        "noise is x",
        "the table",
        "the step",
        "the seed",
        "the ids",
    ],
)
def test_what_is_written_in_place_shares_no_memory(kind, host_backend):
    given, said = overlapping(kind)
    if given["output"] is None:
        given["output"] = given["x0"]
    before = given["x"].clone()
    with pytest.raises(InputError, match=f"reverse_step_: {said}"):
        ops.reverse_step_(**given)
    assert torch.equal(given["x"], before)


def test_the_output_may_be_x_itself(host_backend):
    x = X0.clone()
    expected = ops.reverse_step(x, x.clone(), STEP_TABLE, STEP, KEY).x
    ops.reverse_step_(x, x, STEP_TABLE, STEP, KEY)
    assert torch.equal(x, expected)
    # What is copied before it is read may share memory: here, another order of x itself.
    x = X0.clone()
    strided = x.flip(0).transpose(2, 3).contiguous().transpose(2, 3)
    expected = ops.reverse_step(x, strided, STEP_TABLE, STEP, KEY).x
    ops.reverse_step_(x, strided, STEP_TABLE, STEP, KEY)
    assert torch.equal(x, expected)
