"""The ops as PyTorch's compiler sees them: opcheck, and torch.compile without a graph break."""

import math

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.noise import NoiseKey

_ops = torch.ops.ddpm_fast
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Q_TABLE = torch.tensor([[0.8, 0.6], [0.1, 0.995]])
LOSS_TABLE = torch.tensor([[0.0, 1.0, 1.0], [-0.6, 0.8, 0.25]])
STEP_TABLE = torch.tensor([[1.25, -0.75, 0.5, 0.4, -0.3, 0.2, 1.0, 0.35]])
# Rows of a decoder and of a KL divergence, each predicting x0 and eps; hybrid_loss adds its two weights.
BOUND_TABLE = torch.tensor(
    [
        [0.0, 1.0, -0.1, 20.0, -6.0, 0.2, 0.3, 1.0, math.inf],
        [1.0, 0.0, 1.0, 0.5, -4.0, 0.1, 0.2, 0.0, math.inf],
    ]
)
HYBRID_TABLE = torch.cat([BOUND_TABLE, torch.tensor([[1.0, 0.5], [2.0, 0.5]])], 1)
T = torch.tensor([0, 1])
P = torch.tensor([0.25, 0.75], dtype=torch.float64)
STEP = torch.tensor(0)
KEY = NoiseKey.of(3, 2, first_sample_id=9)
DRAWN = (None, KEY.seed, KEY.sample_id, KEY.step, KEY.stream)


def image(seed=0, dtype=torch.float32, memory_format=torch.contiguous_format, grad=False, channels=3):
    x = torch.randn((2, channels, 6, 5), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=memory_format).requires_grad_(grad)


def given(z):
    return (z, None, None, None, 0)


OPCHECKS = {
    "normal": lambda like, grad: (_ops.normal, (*DRAWN[1:], [2, 3, 6, 5], torch.float32, like(0).stride()[1] == 1)),
    "q_sample, noise drawn": lambda like, grad: (
        _ops.q_sample,
        (like(0, grad=grad), T, Q_TABLE, *DRAWN, torch.float32),
    ),
    "q_sample, noise given": lambda like, grad: (
        _ops.q_sample,
        (like(0, grad=grad), T, Q_TABLE, *given(like(1, grad=grad)), torch.bfloat16),
    ),
    "q_sample of pixels": lambda like, grad: (
        _ops.q_sample,
        (like(0).abs().mul(50).to(torch.uint8), T, Q_TABLE, *given(like(1, grad=grad)), torch.float32),
    ),
    "diffusion_loss": lambda like, grad: (
        _ops.diffusion_loss,
        (like(0, grad=grad), like(1), T, LOSS_TABLE, *DRAWN, grad),
    ),
    "diffusion_loss, fp16": lambda like, grad: (
        _ops.diffusion_loss,
        (like(0, torch.float16, grad=grad), like(1), T, LOSS_TABLE, *given(like(2)), grad),
    ),
    "loss_backward": lambda like, grad: (_ops.loss_backward, (like(0), torch.rand(2, 1))),
    "loss_backward, two groups": lambda like, grad: (_ops.loss_backward, (like(0, channels=6), torch.rand(2, 2))),
    "hybrid_loss": lambda like, grad: (
        _ops.hybrid_loss,
        (like(0, grad=grad, channels=6), like(1), T, HYBRID_TABLE, *DRAWN, grad),
    ),
    "hybrid_loss, fp16": lambda like, grad: (
        _ops.hybrid_loss,
        (like(0, torch.float16, grad=grad, channels=6), like(1), T, HYBRID_TABLE, *given(like(2)), grad),
    ),
    "vlb_terms": lambda like, grad: (
        _ops.vlb_terms,
        (like(0, grad=grad), like(1), T, BOUND_TABLE, *DRAWN, grad),
    ),
    "vlb_terms, learned variance in fp16": lambda like, grad: (
        _ops.vlb_terms,
        (like(0, torch.float16, grad=grad, channels=6), like(1), T, BOUND_TABLE, *given(like(2)), grad),
    ),
    "reverse_step": lambda like, grad: (
        _ops.reverse_step,
        (like(0, grad=grad), like(1, grad=grad), None, STEP_TABLE, STEP, *DRAWN, False, None),
    ),
    "reverse_step, all operands": lambda like, grad: (
        _ops.reverse_step,
        (like(0, grad=grad), like(1, grad=grad), like(2, grad=grad), STEP_TABLE, STEP, *DRAWN, True, torch.bfloat16),
    ),
    "reverse_step, learned variance": lambda like, grad: (
        _ops.reverse_step,
        (like(0, grad=grad), like(1, grad=grad, channels=6), None, STEP_TABLE, STEP, *DRAWN, False, None),
    ),
    "reverse_step, learned variance in fp16, all operands": lambda like, grad: (
        _ops.reverse_step,
        (
            like(0, grad=grad),
            like(1, torch.float16, grad=grad, channels=6),
            like(2, grad=grad),
            STEP_TABLE,
            STEP,
            *given(like(3)),
            True,
            torch.bfloat16,
        ),
    ),
    "reverse_step_": lambda like, grad: (
        _ops.reverse_step_,
        (like(0), like(1, torch.bfloat16), None, None, STEP_TABLE, STEP, *DRAWN),
    ),
    "reverse_step_, all operands": lambda like, grad: (
        _ops.reverse_step_,
        (like(0), like(1, channels=6), like(2), like(3, torch.bfloat16), STEP_TABLE, STEP, *given(like(4))),
    ),
    "draw_timesteps": lambda like, grad: (_ops.draw_timesteps, (*DRAWN[1:], 5, 2, None, None, None, None, 0, 0)),
    "draw_timesteps, all operands": lambda like, grad: (
        _ops.draw_timesteps,
        (*DRAWN[1:], 2, 0, P, P.cumsum(0), torch.tensor([0, 7]), T, 2**22, 2),
    ),
    "record_losses": lambda like, grad: (_ops.record_losses, (torch.rand(2, 3), T.clone(), T, torch.rand(2))),
    "dropout": lambda like, grad: (_ops.dropout, (like(0, grad=grad), KEY.seed, KEY.sample_id, 3, 20000)),
}
WITHOUT_GRADIENT = (
    "normal",
    "loss_backward",
    "loss_backward, two groups",
    "reverse_step_",
    "reverse_step_, all operands",
    "draw_timesteps",
    "draw_timesteps, all operands",
    "record_losses",
)


@pytest.mark.pairwise
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("word", "grad"),
    [
        pytest.param(word, grad, id=f"{word}, {'requires_grad' if grad else 'no grad'}")
        for word in OPCHECKS
        for grad in ([False] if word in WITHOUT_GRADIENT else [False, True])
    ],
)
def test_opcheck(word, grad, memory_format):
    def like(seed, dtype=torch.float32, grad=False, channels=3):
        return image(seed, dtype, FORMATS[memory_format], grad, channels)

    op, arguments = OPCHECKS[word](like, grad)
    torch.library.opcheck(op.default, arguments)


def train_step(output, x0, seed, sample_id, step):
    """What a user's compiled training step does: noise, run a network, take the loss."""
    key = NoiseKey(seed, sample_id, step)
    x_t = ops.q_sample(x0, T, Q_TABLE, key)
    return x_t, ops.diffusion_loss(output * x_t, x0.detach(), T, LOSS_TABLE, key).mean()


def bound_step(output, x0, seed, sample_id, step):
    """The same with a learned variance: L_hybrid, and the bound of the same output."""
    key = NoiseKey(seed, sample_id, step)
    both = torch.cat([output, output * x0], 1)
    images = x0.detach()  # the losses have no gradient in them
    hybrid = ops.hybrid_loss(both, images, T, HYBRID_TABLE, key)
    fixed, learned = (ops.vlb_terms(out, images, T, BOUND_TABLE, key) for out in (output, both))
    return both, hybrid.mean(), fixed.bits_per_dim.mean(), learned.bits_per_dim.mean(), learned.mse_x0.mean()


def sample_step(x, output, seed, sample_id, step):
    key = NoiseKey(seed, sample_id, step)
    first = ops.normal(key, (3, 6, 5), memory_format=torch.channels_last)
    result = ops.reverse_step(
        x + first,
        torch.cat([output, x], 1),
        STEP_TABLE,
        STEP,
        key,
        x0_previous=x,
        return_x0=True,
        model_dtype=torch.bfloat16,
    )
    return result.x, result.x0, result.x_model


def draw_step(x, output, seed, sample_id, step):
    """What a compiled training step draws and remembers."""
    key, history, counts = NoiseKey(seed, sample_id, step), output.new_zeros(5, 3), T.new_zeros(5)
    drawn = ops.draw_timesteps(key, 5, label_drop=ops.LabelDrop(T, 0.5, 2))
    ops.record_losses(history, counts, drawn.t, x.detach().mean((1, 2, 3)))
    return x * drawn.weights[:, None, None, None], output * drawn.labels.sum(), history + counts[:, None]


def dropping_step(x, output, seed, sample_id, step):
    """What a network does between two convolutions in training."""
    key = NoiseKey(seed, sample_id, step)
    return (ops.dropout(x * output, key, 3, 0.4), ops.dropout(output, key, 4, 0.1))


COMPILED = {
    "train_step": train_step,
    "bound_step": bound_step,
    "sample_step": sample_step,
    "draw_step": draw_step,
    "dropping_step": dropping_step,
}


def results_and_gradients(run, arguments):
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    results = run(*leaves, KEY.seed, KEY.sample_id, KEY.step)
    sum(result.float().square().sum() for result in results).backward()
    return results, [leaf.grad for leaf in leaves]


def check_compiled(function, backend, memory_format, tolerance):
    torch._dynamo.reset()
    arguments = [image(seed, memory_format=memory_format) for seed in (0, 1)]
    run = torch.compile(function, fullgraph=True, backend=backend)
    results, gradients = results_and_gradients(run, arguments)
    expected, expected_gradients = results_and_gradients(function, arguments)
    for actual, wanted in zip((*results, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
        assert actual.stride() == wanted.stride()
        if actual.ndim == 4 and function is not sample_step:
            assert actual.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("word", COMPILED)
def test_compiled_without_a_graph_break(word, memory_format):
    check_compiled(COMPILED[word], "aot_eager", FORMATS[memory_format], tolerance=0)


@pytest.mark.slow
def test_inductor_keeps_channels_last_and_the_numbers():
    def all_losses(*arguments):
        return (*train_step(*arguments), *bound_step(*arguments))

    # Inductor may contract its own multiplications and additions, so the last place is its own. What it keeps on disk
    # names the ops of the day it was compiled.
    with torch._inductor.config.patch(force_disable_caches=True):
        check_compiled(all_losses, "inductor", torch.channels_last, tolerance=1e-6)


def test_a_compiled_step_sees_its_tensors_change():
    torch._dynamo.reset()
    run = torch.compile(
        lambda seed, ids, step: ops.normal(NoiseKey(seed, ids, step), (5,)), fullgraph=True, backend="eager"
    )
    for seed, step in ((0, 0), (1, 0), (0, 1)):
        key = NoiseKey.of(seed, 2, step=step)
        assert torch.equal(run(key.seed, key.sample_id, key.step), ops.normal(key, (5,)))
