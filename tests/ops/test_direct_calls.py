"""torch.ops.ddpm_fast.* called directly, as torch.compile, torch.export and other people's code do: whatever is given,
an op refuses it or computes what the reference does, and it never reads or writes out of bounds.
"""

import math

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.convolution import winograd_filters

_ops = torch.ops.ddpm_fast
SHAPE = (2, 4, 6, 5)
KEY = NoiseKey.of(3, 2, first_sample_id=9)
DRAWN = (None, KEY.seed, KEY.sample_id, KEY.step, KEY.stream)
T = torch.tensor([0, 1])
STEP = torch.tensor(1)


def image(seed=0, channels=4):
    shape = (SHAPE[0], channels, *SHAPE[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def table(columns):
    rows = torch.rand((5, columns), generator=torch.Generator().manual_seed(columns))
    if columns >= 9:
        rows[:, 7], rows[:, 8] = 0.0, math.inf  # the KL divergence, unclipped
    return rows


GIVEN = (image(9), None, None, None, 0)
NORM = (image(), torch.ones(4), torch.zeros(4), *(uniform(2, 4, seed=i) for i in range(3)))
WIDER = (torch.ones(6), torch.zeros(6), *(uniform(2, 6, seed=i) for i in range(2)))
STATISTICS = torch.ones(2, 2, 3)
P = torch.tensor([0.1, 0.3, 0.0, 0.2, 0.4], dtype=torch.float64)
WEIGHT = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(1))
FILTERS = winograd_filters(WEIGHT)
CALLS = {
    "normal": (*DRAWN[1:], [*SHAPE], torch.float32, False),
    "q_sample": (image(), T, table(2), *DRAWN, torch.float32),
    "diffusion_loss": (image(), image(1), T, table(3), *GIVEN, True),
    "hybrid_loss": (image(channels=8), image(1), T, table(11), *DRAWN, True),
    "vlb_terms": (image(), image(1), T, table(9), *GIVEN, True),
    "loss_backward": (image(), uniform(2, 2)),
    "reverse_step": (image(), image(1, 8), image(2), table(8), STEP, *GIVEN, True, torch.bfloat16),
    "reverse_step_": (image(), image(1), image(2), image(3), table(8), STEP, *DRAWN),
    "group_norm": (*NORM, None, None, 2, 1e-5, True, False),
    "group_norm of a sum": (image(), *WIDER, uniform(2, 4, seed=9), image(3), image(7, 2), 2, 1e-5, True, True),
    "group_norm_backward": (image(5), None, NORM[0], None, *NORM[1:], STATISTICS, True),
    "group_norm_backward of a sum": (image(5, 6), image(8), image(), image(7, 2), *WIDER, None, STATISTICS, True),
    "group_norm_parameters": (torch.rand(3, 2, 4), *NORM[1:4]),
    "add_bias": (image(), image(1), torch.ones(4)),
    "channel_sums": (image(),),
    "draw_timesteps": (*DRAWN[1:], 5, 3, P, P.cumsum(0), torch.arange(0, 50, 10), torch.tensor([2, 0]), 2**23, 7),
    "record_losses": (uniform(5, 3), torch.arange(5), T, uniform(2)),
    "dropout": (image(), KEY.seed, KEY.sample_id, 3, 20000),
    "winograd": (image(), FILTERS, uniform(3), 3),
    "winograd_filters": (WEIGHT, True),
    "winograd_weight_gradient": (image(), image(1, 3)),
    "convolve": (image(), WEIGHT, uniform(3)),
}
WRITTEN = {"reverse_step_": 4, "record_losses": 2}  # how many of the first arguments an op writes to


def tensors_instead_of(x):
    """Tensors that differ from x in one respect, each with a word for it."""
    shape = tuple(x.shape)
    yield "meta", x.to("meta")
    yield "0 dimensions", x.new_zeros(())
    yield "no dimension less", x.new_zeros((1, *shape))
    yield "empty", x.new_zeros(0)
    for i, size in enumerate(shape):
        for other in {0, 1, size - 1, size + 1, 2 * size, 3 * size} - {size, -1}:
            yield f"{other} along {i}", x.new_zeros((*shape[:i], other, *shape[i + 1 :]))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool, torch.complex64):
        if dtype != x.dtype:
            yield str(dtype), x.to(dtype)
    if x.ndim:
        yield "sparse", x.to_sparse()
        yield "every other of a larger one", torch.stack([x, x], -1)[..., 0]
        yield "expanded", x[:1].expand(shape)
        yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    if x.is_floating_point():
        yield "quantised", torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8)
    else:
        yield "a number outside", torch.full_like(x, 2**40)
        yield "a negative number", torch.full_like(x, -1)


def values_instead_of(value):
    if isinstance(value, torch.Tensor):
        yield from tensors_instead_of(value)
        yield "None", None
        yield "a list", value.tolist()
        yield "a number", 3
    elif isinstance(value, bool):
        yield "the other", not value
    elif isinstance(value, int):
        yield from ((str(other), other) for other in (0, -1, 1, 3, 5, 2**31, 2**62, -(2**62)))
    elif isinstance(value, float):
        yield from ((str(other), other) for other in (-1.0, math.nan, math.inf))
    elif isinstance(value, torch.dtype):
        yield from ((str(other), other) for other in (torch.uint8, torch.int64, torch.complex64, torch.bool))
    elif isinstance(value, list):
        for i in range(len(value)):
            for size in (0, -1, 3, 2**33, 2**62):
                yield f"{size} at {i}", [*value[:i], size, *value[i + 1 :]]
        yield "no dimensions", []
        yield "one dimension", value[:1]
    else:
        yield "a tensor", image()


def cases():
    for op, arguments in CALLS.items():
        for i, value in enumerate(arguments):
            for word, other in values_instead_of(value):
                yield pytest.param(op, i, other, id=f"{op}, argument {i}: {word}")


def outcome(op, arguments):
    """The results, with what was written into; or None for a refusal."""
    with torch.no_grad():
        copies = [
            x.clone() if isinstance(x, torch.Tensor) and (x.is_floating_point() or op == "record_losses") else x
            for x in arguments
        ]
        try:
            made = getattr(_ops, op.split()[0])(*copies)
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:  # ours, and torch's
            assert str(error)
            return None
    made = () if made is None else made if isinstance(made, tuple | list) else (made,)
    return [*made, *copies[: WRITTEN.get(op, 0)]]


def test_noise_and_a_key_at_once_are_refused():
    # A tensor on meta that is ignored would make torch run the op there.
    with pytest.raises(InputError, match="and not both"):
        _ops.q_sample(image(), T, table(2), image(9), None, None, STEP.to("meta"), 0, torch.float32)


@pytest.mark.parametrize("op", CALLS)
def test_the_calls_that_the_others_are_made_of_are_taken(op):
    assert outcome(op, CALLS[op]) is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("op", "position", "value"), list(cases()))
def test_a_call_with_one_argument_changed_is_refused_or_right(op, position, value):
    arguments = [*CALLS[op][:position], value, *CALLS[op][position + 1 :]]
    with ops.use_backend("cpu"):
        found = outcome(op, arguments)
    with ops.use_backend("reference"):
        expected = outcome(op, arguments)
    if found is None and isinstance(value, torch.Tensor) and value.dtype == torch.float64:
        return  # the kernels have no float64, and refuse it
    assert (found is None) == (expected is None)
    for actual, wanted in zip(found or (), expected or (), strict=True):
        if actual is not None and actual.device.type != "meta":
            half = actual.dtype in (torch.float16, torch.bfloat16)  # which may round a last bit the other way
            tolerance = torch.finfo(actual.dtype).eps if half else 1e-4
            torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
