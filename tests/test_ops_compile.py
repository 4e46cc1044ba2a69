"""The ops as PyTorch's compiler sees them: opcheck, and torch.compile without a graph break."""

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.noise import NoiseKey

_ops = torch.ops.ddpm_fast
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Q_TABLE = torch.tensor([[0.8, 0.6], [0.1, 0.995]])
LOSS_TABLE = torch.tensor([[0.0, 1.0, 1.0], [-0.6, 0.8, 0.25]])
STEP_TABLE = torch.tensor([[1.25, -0.75, 0.5, 0.4, -0.3, 0.2, 1.0]])
T = torch.tensor([0, 1])
STEP = torch.tensor(0)
KEY = NoiseKey.of(3, 2, first_sample_id=9)
DRAWN = (None, KEY.seed, KEY.sample_id, KEY.step, KEY.stream)


def image(seed=0, dtype=torch.float32, memory_format=torch.contiguous_format, grad=False):
    x = torch.randn((2, 3, 6, 5), generator=torch.Generator().manual_seed(seed)).to(dtype)
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
    "diffusion_loss_backward": lambda like, grad: (_ops.diffusion_loss_backward, (like(0), torch.rand(2))),
    "reverse_step": lambda like, grad: (
        _ops.reverse_step,
        (like(0, grad=grad), like(1, grad=grad), None, STEP_TABLE, STEP, *DRAWN, False, None),
    ),
    "reverse_step, all there is": lambda like, grad: (
        _ops.reverse_step,
        (like(0, grad=grad), like(1, grad=grad), like(2, grad=grad), STEP_TABLE, STEP, *DRAWN, True, torch.bfloat16),
    ),
}
WITHOUT_GRADIENT = ("normal", "diffusion_loss_backward")


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
    def like(seed, dtype=torch.float32, grad=False):
        return image(seed, dtype, FORMATS[memory_format], grad)

    op, arguments = OPCHECKS[word](like, grad)
    torch.library.opcheck(op.default, arguments)


def train_step(output, x0, seed, sample_id, step):
    """What a user's compiled training step does: noise, run a network, take the loss."""
    key = NoiseKey(seed, sample_id, step)
    x_t = ops.q_sample(x0, T, Q_TABLE, key)
    return x_t, ops.diffusion_loss(output * x_t, x0, T, LOSS_TABLE, key).mean()


def sample_step(x, output, seed, sample_id, step):
    key = NoiseKey(seed, sample_id, step)
    first = ops.normal(key, (3, 6, 5), memory_format=torch.channels_last)
    result = ops.reverse_step(
        *(x + first, output, STEP_TABLE, STEP, key), x0_previous=x, return_x0=True, model_dtype=torch.bfloat16
    )
    return result.x, result.x0, result.x_model


COMPILED = {"train_step": train_step, "sample_step": sample_step}


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
        if actual.ndim == 4 and function is train_step:
            assert actual.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("word", COMPILED)
def test_compiled_without_a_graph_break(word, memory_format):
    check_compiled(COMPILED[word], "aot_eager", FORMATS[memory_format], tolerance=0)


@pytest.mark.slow
def test_inductor_keeps_channels_last_and_the_numbers():
    # Inductor may contract its own multiplications and additions, so the last place is its own.
    check_compiled(train_step, "inductor", torch.channels_last, tolerance=1e-6)


def test_a_compiled_step_sees_its_tensors_change():
    torch._dynamo.reset()
    run = torch.compile(
        lambda seed, ids, step: ops.normal(NoiseKey(seed, ids, step), (5,)), fullgraph=True, backend="eager"
    )
    for seed, step in ((0, 0), (1, 0), (0, 1)):
        key = NoiseKey.of(seed, 2, step=step)
        assert torch.equal(run(key.seed, key.sample_id, key.step), ops.normal(key, (5,)))
