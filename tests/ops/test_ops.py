"""The fused ops against the papers' formulas in float64: every dtype, every mix of memory formats, awkward shapes.

An op's error may be at most twice that of the same formula in plain torch at the dtype of its result. The formulas are
written here a second time, so that the package's own reference is tested too.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import diffusion_loss, normal, q_sample, reverse_step, reverse_step_, use_backend
from ddpm_fast.ops.backends import cpu

F32, BF16, F16, F64, U8 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8
FLOATS = (F32, BF16, F16)
Q_TABLE = torch.tensor([[0.9999, 0.0141], [0.8, 0.6], [0.1, 0.995]])
LOSS_TABLE = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 5.0], [-0.6, 0.8, 0.25]])  # eps, x0 and v
STEP_TABLE = torch.tensor(
    [
        [20291.0, -20290.9, 0.002, 0.998, 0.0, 0.999, 1.0, 0.0],  # the first step of a cosine schedule
        [1.25, -0.75, 0.5, 0.4, 0.0, 0.2, 1.0, 0.0],
        [1.25, -0.75, 0.6, 0.7, -0.3, 0.0, math.inf, 0.0],  # multi-step, no noise, no clipping
        [0.9, -0.3, 0.3, 0.7, 0.2, 0.1, 1.5, 0.0],
    ]
)
LEARNED_TABLE = torch.tensor(
    [
        [1.25, -0.75, 0.5, 0.4, 0.0, 0.2, 1.0, 0.35],  # learned_range: sigma e^(spread v) between two fixed ones
        [0.9, -0.3, 0.3, 0.7, 0.2, 1.0, math.inf, 0.5],  # learned: v is the log variance
        [0.9, -0.3, 0.3, 0.7, 0.2, 0.0, 1.5, 0.5],  # the last step draws no noise
        [0.9, -0.3, 0.3, 0.7, 0.2, 0.1, 1.5, 0.0],  # a fixed variance, of a network that learns one
    ]
)
SHAPES = {
    "one element": (3, 1),
    "1-D samples": (3, 301),
    "channels and length": (2, 3, 65),
    "one channel": (3, 1, 28, 28),
    "no multiple of the block": (2, 3, 17, 19),
    "a CIFAR batch": (4, 3, 32, 32),
    "many channels": (2, 130, 5, 3),
    "many channels, one pixel": (3, 700, 1, 1),
    "one wide row": (2, 3, 1, 4099),
    "one sample": (1, 3, 9, 9),
    "volume": (2, 3, 5, 7, 9),
}
LAYOUTS = ("contiguous", "channels_last", "sliced")


def image(shape, dtype=F32, seed=0, layout="contiguous") -> torch.Tensor:
    """Random pixels, or floats about the size of an image's; the values depend on shape, dtype and seed alone."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == U8:
        x = torch.randint(0, 256, shape, generator=generator, dtype=U8)
    else:
        x = torch.randn(shape, generator=generator).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    if layout == "sliced":  # every other element of a larger tensor
        spaced = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
        spaced[..., ::2] = x
        return spaced[..., ::2]
    return x


def wide(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) / 127.5 - 1 if x.dtype == U8 else x.to(dtype)


def columns(table, t, like, dtype):
    return (column.view(-1, *[1] * (like.ndim - 1)) for column in table[t].to(dtype).unbind(1))


def q_sample_formula(x0, t, table, z, dtype=F64):
    signal, sigma = columns(table, t, x0, dtype)
    return signal * wide(x0, dtype) + sigma * z.to(dtype)


def loss_formula(output, x0, t, table, z, dtype=F64):
    c_x0, c_noise, _ = columns(table, t, x0, dtype)
    squares = (output.to(dtype) - (c_x0 * wide(x0, dtype) + c_noise * z.to(dtype))) ** 2
    return table[t, 2].to(dtype) * squares.flatten(1).mean(1)


def step_formula(x, output, row, z, previous=None, dtype=F64):
    """(x_next, x0)"""
    a_x, a_out, b_x, b_x0, b_previous, sigma, clip, spread = row.to(dtype)
    out, v = output[:, : x.shape[1]].to(dtype), output[:, x.shape[1] :].to(dtype)
    x0 = (a_x * x.to(dtype) + a_out * out).clamp(-clip, clip)
    deviation = sigma * (spread * v).exp() if v.shape == x.shape else sigma
    following = b_x * x.to(dtype) + b_x0 * x0 + deviation * z.to(dtype)
    return (following if previous is None else following + b_previous * previous.to(dtype)), x0


def close(actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """The rule: at most twice plain torch's error, and always within fp32's rounding of a few operations."""
    assert actual.shape == exact.shape
    if not exact.numel():
        return
    error = (actual.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 4e-7 * max(1.0, float(exact.abs().max()))
    assert error <= allowed, f"error {error:.3g} against float64, allowed {allowed:.3g}"


def timesteps(n: int, rows: int = 3) -> torch.Tensor:
    return torch.arange(n) % rows


def noise_for(kind, shape, layout="contiguous"):
    """(what the op is given, the numbers it stands for)"""
    if kind == "key":
        key = NoiseKey.of(11, shape[0], first_sample_id=5)
        return key, normal(key, shape[1:])
    z = image(shape, kind, seed=9, layout=layout)
    return z, z


# --- every dtype


@pytest.mark.pairwise
@pytest.mark.parametrize("out", FLOATS, ids=str)
@pytest.mark.parametrize("noise", ["key", *FLOATS], ids=str)
@pytest.mark.parametrize("x0", [U8, *FLOATS], ids=str)
def test_q_sample_dtypes(x0, noise, out, backend):
    x, t = image((4, 3, 17, 5), x0), timesteps(4)
    given, z = noise_for(noise, x.shape)
    x_t = q_sample(x, t, Q_TABLE, given, out)
    assert x_t.dtype == out
    close(x_t, q_sample_formula(x, t, Q_TABLE, z), q_sample_formula(x, t, Q_TABLE, z, out))


@pytest.mark.parametrize(("x0", "expected"), [(U8, F32), (F32, F32), (BF16, BF16), (F16, F16), (F64, F64)], ids=str)
def test_q_sample_result_dtype(x0, expected):
    assert q_sample(image((2, 3), x0), timesteps(2), Q_TABLE, image((2, 3))).dtype == expected


@pytest.mark.pairwise
@pytest.mark.parametrize("noise", ["key", *FLOATS], ids=str)
@pytest.mark.parametrize("x0", [U8, *FLOATS], ids=str)
@pytest.mark.parametrize("output", FLOATS, ids=str)
def test_diffusion_loss_dtypes(output, x0, noise, backend):
    out, x, t = image((6, 3, 17, 5), output, seed=1), image((6, 3, 17, 5), x0), timesteps(6)
    given, z = noise_for(noise, x.shape)
    loss = diffusion_loss(out, x, t, LOSS_TABLE, given)
    assert loss.dtype == F32 and loss.shape == (6,)
    close(loss, loss_formula(out, x, t, LOSS_TABLE, z), loss_formula(out, x, t, LOSS_TABLE, z, output))


@pytest.mark.pairwise
@pytest.mark.parametrize("previous", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("output", FLOATS, ids=str)
@pytest.mark.parametrize("x_t", FLOATS, ids=str)
def test_reverse_step_dtypes(x_t, output, previous, some_of):
    shape = (3, 3, 11, 5)
    x, before = image(shape, x_t), None if previous is None else image(shape, previous, seed=2)
    cases = itertools.product(range(len(STEP_TABLE)), ["key", F32, BF16], [None, BF16, F16, F32])
    for i, noise, model in some_of(cases, step=11):
        out = image(shape, output, seed=1)
        if i == 0:  # as a trained network would: the difference of two large numbers is an image
            out = (image(shape, x_t).float() - 1e-5 * out.float()).to(output)
        given, z = noise_for(noise, shape)
        step = reverse_step(
            x, out, STEP_TABLE, torch.tensor(i), given, x0_previous=before, return_x0=True, model_dtype=model
        )
        exact, exact_x0 = step_formula(x, out, STEP_TABLE[i], z, before)
        in_fp32, x0_in_fp32 = step_formula(x, out, STEP_TABLE[i], z, before, F32)
        assert (step.x.dtype, step.x0.dtype) == (x_t, F32)
        close(step.x, exact, in_fp32.to(x_t))
        close(step.x0, exact_x0, x0_in_fp32)
        if model is None:
            assert step.x_model is None
        else:
            assert step.x_model.dtype == model
            close(step.x_model, exact, in_fp32.to(model))


@pytest.mark.pairwise
@pytest.mark.parametrize("noise", ["key", F32, BF16], ids=str)
@pytest.mark.parametrize("output", FLOATS, ids=str)
@pytest.mark.parametrize("x_t", FLOATS, ids=str)
def test_reverse_step_with_a_learned_variance(x_t, output, noise, backend):
    shape = (3, 3, 11, 5)
    x, out, before = image(shape, x_t), image((3, 6, 11, 5), output, seed=1), image(shape, seed=2)
    given, z = noise_for(noise, shape)
    for i, model in itertools.product(range(len(LEARNED_TABLE)), [None, F16]):
        step = reverse_step(
            x, out, LEARNED_TABLE, torch.tensor(i), given, x0_previous=before, return_x0=True, model_dtype=model
        )
        exact, exact_x0 = step_formula(x, out, LEARNED_TABLE[i], z, before)
        in_fp32, x0_in_fp32 = step_formula(x, out, LEARNED_TABLE[i], z, before, F32)
        close(step.x, exact, in_fp32.to(x_t))
        close(step.x0, exact_x0, x0_in_fp32)
        if model is not None:
            close(step.x_model, exact, in_fp32.to(model))


def steps_in_place(x_t, model, learned, layout) -> None:
    """reverse_step_ gives reverse_step's bits, where they were asked for."""
    shape, table = (3, 3, 11, 5), LEARNED_TABLE if learned else STEP_TABLE
    memory_format = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
    key = NoiseKey.of(4, 3, step=2)
    out = image((3, 6 if learned else 3, 11, 5), BF16, seed=1)
    for i, before in itertools.product(range(len(table)), [None, image(shape, F64 if x_t == F64 else F32, seed=2)]):
        x = image(shape, x_t).contiguous(memory_format=memory_format)
        x0 = None if before is None else before.contiguous(memory_format=memory_format).clone()
        x_model = None if model is None else torch.empty_like(x, dtype=model)
        expected = reverse_step(
            x, out, table, torch.tensor(i), key, x0_previous=before, return_x0=True, model_dtype=model
        )
        places = [t if t is None else t.data_ptr() for t in (x, x0, x_model)]
        reverse_step_(x, out, table, torch.tensor(i), key, x0=x0, x_model=x_model)
        assert [t if t is None else t.data_ptr() for t in (x, x0, x_model)] == places
        assert torch.equal(x, expected.x)
        assert x0 is None or torch.equal(x0, expected.x0)
        assert model is None or torch.equal(x_model, expected.x_model)


IN_PLACE = [
    pytest.mark.parametrize("layout", ["contiguous", "channels_last"]),
    pytest.mark.parametrize("learned", [False, True], ids=["fixed variance", "learned variance"]),
    pytest.mark.parametrize("model", [None, BF16, F32], ids=str),
]


def each(*marks):
    return lambda test: functools.reduce(lambda marked, mark: mark(marked), marks, test)


@pytest.mark.pairwise
@each(*IN_PLACE, pytest.mark.parametrize("x_t", FLOATS, ids=str))
def test_reverse_step_in_place_is_reverse_step_bit_for_bit(x_t, model, learned, layout, backend):
    steps_in_place(x_t, model, learned, layout)


@each(*IN_PLACE)
def test_reverse_step_in_place_in_float64(model, learned, layout):
    steps_in_place(F64, model, learned, layout)


def test_reverse_step_in_place_with_itself_as_the_output(backend):
    x = image((3, 3, 11, 5))
    expected = reverse_step(x, x, STEP_TABLE, torch.tensor(1), NoiseKey.of(4, 3)).x
    reverse_step_(x, x, STEP_TABLE, torch.tensor(1), NoiseKey.of(4, 3))
    assert torch.equal(x, expected)


def test_float64_is_exact_and_falls_to_the_reference():
    x, out, t, z = (image((3, 4, 5), F64, seed=i) for i in (0, 1)), None, timesteps(3), image((3, 4, 5), F64, seed=2)
    x, out = x
    tables = Q_TABLE.double(), LOSS_TABLE.double(), STEP_TABLE.double()
    torch.testing.assert_close(
        q_sample(x, t, tables[0], z), q_sample_formula(x, t, tables[0], z), rtol=1e-15, atol=1e-15
    )
    loss = diffusion_loss(out, x, t, tables[1], z)
    torch.testing.assert_close(loss, loss_formula(out, x, t, tables[1], z), rtol=1e-14, atol=0)
    step = reverse_step(x, out, tables[2], torch.tensor(1), z, return_x0=True)
    assert step.x0.dtype == F64
    torch.testing.assert_close(step.x, step_formula(x, out, tables[2][1], z)[0], rtol=1e-15, atol=1e-15)
    both, row = torch.cat([out, x], 1), LEARNED_TABLE.double()
    step = reverse_step(x, both, row, torch.tensor(1), z)
    torch.testing.assert_close(step.x, step_formula(x, both, row[1], z)[0], rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("operand", ["noise", "x0_previous", "model_dtype"])
def test_one_float64_operand_among_fp32_ones(operand):
    x, out, z, before = (image((2, 3, 4), seed=i) for i in range(4))
    others = {"x0_previous": before.double() if operand == "x0_previous" else before}
    if operand == "model_dtype":
        others["model_dtype"] = F64
    noise = z.double() if operand == "noise" else z
    step = reverse_step(x, out, STEP_TABLE, torch.tensor(3), noise, **others)
    exact, _ = step_formula(x, out, STEP_TABLE[3], z, before)
    close(step.x, exact, exact.float())
    if operand == "noise":
        t = timesteps(2)
        close(
            q_sample(x, t, Q_TABLE, noise), q_sample_formula(x, t, Q_TABLE, z), q_sample_formula(x, t, Q_TABLE, z, F32)
        )


def test_float64_tables_are_rounded_to_the_arithmetic(backend):
    x, out, z, t = image((2, 3, 4)), image((2, 3, 4), seed=1), image((2, 3, 4), seed=2), timesteps(2)
    step = torch.tensor(1)
    assert torch.equal(q_sample(x, t, Q_TABLE.double(), z), q_sample(x, t, Q_TABLE, z))
    assert torch.equal(diffusion_loss(out, x, t, LOSS_TABLE.double(), z), diffusion_loss(out, x, t, LOSS_TABLE, z))
    assert torch.equal(
        reverse_step(x, out, STEP_TABLE.double(), step, z).x, reverse_step(x, out, STEP_TABLE, step, z).x
    )


# --- every shape and memory format


def layouts_of(shape):
    return LAYOUTS if len(shape) in (4, 5) else ("contiguous", "sliced")


def expect_format(result: torch.Tensor, source: torch.Tensor) -> None:
    """channels_last for a channels_last source, contiguous otherwise."""
    channels_last = torch.channels_last if source.ndim == 4 else torch.channels_last_3d
    if not source.is_contiguous() and source.ndim in (4, 5) and source.is_contiguous(memory_format=channels_last):
        assert result.is_contiguous(memory_format=channels_last)
    else:
        assert result.is_contiguous()


@pytest.mark.parametrize("word", SHAPES)
def test_q_sample_shapes_and_formats(word, some_of):
    shape = SHAPES[word]
    t = timesteps(shape[0])
    cases = itertools.product(layouts_of(shape), layouts_of(shape), (F32, U8, F16))
    for x0_layout, z_layout, dtype in some_of(cases, step=5):
        x, z = image(shape, dtype, layout=x0_layout), image(shape, seed=9, layout=z_layout)
        x_t = q_sample(x, t, Q_TABLE, z, F32)
        expect_format(x_t, x)
        close(x_t, q_sample_formula(x, t, Q_TABLE, z), q_sample_formula(x, t, Q_TABLE, z, F32))


@pytest.mark.parametrize("word", SHAPES)
def test_diffusion_loss_shapes_and_formats(word, some_of):
    shape = SHAPES[word]
    t = timesteps(shape[0])
    for layouts in some_of(itertools.product(layouts_of(shape), repeat=3), step=7):
        out, x, z = (
            image(shape, dtype, seed, layout)
            for dtype, seed, layout in zip((F32, U8, BF16), (1, 0, 9), layouts, strict=True)
        )
        loss = diffusion_loss(out, x, t, LOSS_TABLE, z)
        close(loss, loss_formula(out, x, t, LOSS_TABLE, z), loss_formula(out, x, t, LOSS_TABLE, z, F32))


@pytest.mark.parametrize("word", SHAPES)
def test_reverse_step_shapes_and_formats(word, some_of):
    shape = SHAPES[word]
    for layouts in some_of(itertools.product(layouts_of(shape), repeat=4), step=11):
        x, out, before, z = (image(shape, F32, seed, layout) for seed, layout in enumerate(layouts))
        step = reverse_step(
            x, out, STEP_TABLE, torch.tensor(3), z, x0_previous=before, return_x0=True, model_dtype=BF16
        )
        exact, exact_x0 = step_formula(x, out, STEP_TABLE[3], z, before)
        plain, plain_x0 = step_formula(x, out, STEP_TABLE[3], z, before, F32)
        close(step.x, exact, plain)
        close(step.x0, exact_x0, plain_x0)
        close(step.x_model, exact, plain.bfloat16())
        for result in step:
            expect_format(result, x)


@pytest.mark.parametrize("word", SHAPES)
def test_reverse_step_with_a_learned_variance_shapes_and_formats(word, some_of):
    shape = SHAPES[word]
    doubled = (shape[0], 2 * shape[1], *shape[2:])
    for layouts in some_of(itertools.product(layouts_of(shape), repeat=3), step=7):
        x, z = image(shape, layout=layouts[0]), image(shape, seed=3, layout=layouts[2])
        out = image(doubled, seed=1, layout=layouts[1])
        step = reverse_step(x, out, LEARNED_TABLE, torch.tensor(0), z, return_x0=True, model_dtype=BF16)
        exact, exact_x0 = step_formula(x, out, LEARNED_TABLE[0], z)
        plain, plain_x0 = step_formula(x, out, LEARNED_TABLE[0], z, dtype=F32)
        close(step.x, exact, plain)
        close(step.x0, exact_x0, plain_x0)
        close(step.x_model, exact, plain.bfloat16())
        for result in step:
            expect_format(result, x)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (0, 5), (2, 0, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape, backend):
    x, t = image(shape), timesteps(shape[0])
    key = NoiseKey.of(0, shape[0])
    assert q_sample(x, t, Q_TABLE, key).shape == shape
    assert reverse_step(x, x, STEP_TABLE, torch.tensor(0), key).x.shape == shape
    assert reverse_step(x, torch.cat([x, x], 1), LEARNED_TABLE, torch.tensor(0), key).x.shape == shape
    if shape[0] == 0:
        assert diffusion_loss(x, x, t, LOSS_TABLE, key).shape == (0,)


@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_2_to_the_31_elements(channels_last):
    # NumPy's zeros take no memory until they are written: 6.4 GB are addressed, a page is used. The one element that
    # is not zero lies beyond 2^31, so the loss is right only if every offset to it has 64 bits.
    shape = (1, 26755, 26755, 3) if channels_last else (1, 3, 26755, 26755)
    output, x0 = (torch.from_numpy(np.zeros(shape, dtype)) for dtype in (np.float16, np.uint8))
    output.view(-1)[-2] = 256.0
    if channels_last:
        output, x0 = output.permute(0, 3, 1, 2), x0.permute(0, 3, 1, 2)
    with use_backend("cpu"):
        loss = diffusion_loss(output, x0, torch.tensor([0]), torch.tensor([[0.0, 0.0, 1.0]]), output)
    assert output.numel() > 2**31
    assert loss.item() == pytest.approx(65536 / output.numel(), rel=1e-7)


# --- the same bits


def test_cpp_equals_the_reference_bit_for_bit_in_fp32(isa):
    shape = (4, 3, 33, 31)
    pixels, x, out, before, z = image(shape, U8), *(image(shape, seed=i) for i in range(1, 5))
    pixels.view(-1)[:256] = torch.arange(256)
    t, key = timesteps(4), NoiseKey.of(3, 4)

    def results():
        out_with_grad = out.clone().requires_grad_()
        diffusion_loss(out_with_grad, pixels, t, LOSS_TABLE, key).sum().backward()
        steps = [
            reverse_step(x, out, STEP_TABLE, torch.tensor(i), noise, x0_previous=previous, return_x0=True)
            for i, noise, previous in itertools.product(range(4), (key, z), (None, before))
        ]
        return [
            *(q_sample(source, t, Q_TABLE, noise, F32) for source in (pixels, x) for noise in (key, z)),
            out_with_grad.grad,
            *(result for step in steps for result in step[:2]),
        ]

    actual = results()
    with use_backend("reference"):
        expected = results()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_a_learned_variance_has_the_same_bits_on_every_instruction_set(isa):
    x, out, key = image((2, 3, 33, 31)), 5 * image((2, 6, 33, 31), seed=1), NoiseKey.of(3, 2)

    def results():
        return [reverse_step(x, out, LEARNED_TABLE, torch.tensor(i), key).x.view(torch.int32) for i in range(4)]

    actual = results()
    cpu.use_isa("generic")
    for a, b in zip(actual, results(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", ["q_sample", "diffusion_loss", "reverse_step", "reverse_step, learned variance"])
def test_a_key_stands_for_the_normals_it_names(op, backend):
    x, out, t = image((3, 3, 9, 7)), image((3, 3, 9, 7), seed=1), timesteps(3)
    key = NoiseKey.of(4, 3, first_sample_id=2**33)
    call = {
        "q_sample": lambda noise: q_sample(x, t, Q_TABLE, noise),
        "diffusion_loss": lambda noise: diffusion_loss(out, x, t, LOSS_TABLE, noise),
        "reverse_step": lambda noise: reverse_step(x, out, STEP_TABLE, torch.tensor(1), noise).x,
        "reverse_step, learned variance": lambda noise: (
            reverse_step(x, torch.cat([out, x], 1), LEARNED_TABLE, torch.tensor(0), noise).x
        ),
    }[op]
    assert torch.equal(call(key), call(normal(key, (3, 9, 7))))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_loss_has_the_same_bits_on_any_number_of_threads(layout, isa):
    out, x, t = image((3, 3, 70, 69), seed=1, layout=layout), image((3, 3, 70, 69), U8), timesteps(3)
    before = torch.get_num_threads()
    losses = []
    try:
        for threads in (1, 2, 3, 1, 3):
            torch.set_num_threads(threads)
            losses.append(diffusion_loss(out, x, t, LOSS_TABLE, NoiseKey.of(0, 3)).view(torch.int32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


# --- where it goes wrong


def test_a_step_without_sigma_draws_no_noise(backend):
    x, out = image((2, 3, 8, 8)), image((2, 3, 8, 8), seed=1)
    poison = torch.full_like(x, math.nan)
    step = reverse_step(x, out, STEP_TABLE, torch.tensor(2), poison)
    close(step.x, *(step_formula(x, out, STEP_TABLE[2], torch.zeros_like(x), dtype=d)[0] for d in (F64, F32)))
    both = torch.cat([out, poison], 1)  # nor does it look at the variance that was learned
    step = reverse_step(x, both, LEARNED_TABLE, torch.tensor(2), poison)
    close(step.x, *(step_formula(x, out, LEARNED_TABLE[2], torch.zeros_like(x), dtype=d)[0] for d in (F64, F32)))


def test_a_row_without_spread_ignores_v(backend):
    x, out, z = (image((2, 3, 8, 8), seed=i) for i in range(3))
    both = torch.cat([out, torch.full_like(out, math.nan)], 1)
    step = torch.tensor(3)
    assert torch.equal(reverse_step(x, both, LEARNED_TABLE, step, z).x, reverse_step(x, out, LEARNED_TABLE, step, z).x)


def test_a_row_with_spread_reads_nothing_beyond_an_output_without_v(backend):
    x, z = image((1, 3, 8, 8)), image((1, 3, 8, 8), seed=2)
    memory = torch.cat([image((1, 3, 8, 8), seed=1), torch.full((1, 3, 8, 8), 50.0)])
    out = memory[:1]  # what lies behind it in memory is not its v
    step = torch.tensor(0)
    fixed = LEARNED_TABLE.clone()
    fixed[:, 7] = 0
    assert torch.equal(reverse_step(x, out, LEARNED_TABLE, step, z).x, reverse_step(x, out, fixed, step, z).x)


@pytest.mark.parametrize("v", [1e4, -1e4])
def test_an_absurd_log_variance_gives_a_finite_step(v, backend):
    x = torch.ones(1, 3)
    out = torch.cat([x, torch.full_like(x, v)], 1)
    step = reverse_step(x, out, LEARNED_TABLE, torch.tensor(1), x)
    assert not step.x.isnan().any()
    if v < 0:  # the deviation is negligible
        close(step.x, *(step_formula(x, out, LEARNED_TABLE[1], x, dtype=d)[0] for d in (F64, F32)))


def test_x0_is_formed_and_clipped_in_fp32(backend):
    # sqrt(1 / alpha_bar_T) of a cosine schedule with T = 4000 is beyond fp16's largest number.
    row = torch.tensor([[81165.0, -81165.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]])
    x, out = torch.tensor([[2.0, 2.0, 0.5]], dtype=F16), torch.tensor([[2.0, -2.0, 1.0]], dtype=F16)
    assert reverse_step(x, out, row, torch.tensor(0), x).x.tolist() == [[0.0, 1.0, -1.0]]


def test_a_bad_output_is_not_hidden_by_the_clip(backend):
    x = torch.zeros(1, 3)
    out = torch.tensor([[math.nan, math.inf, -math.inf]])
    x0 = reverse_step(x, out, STEP_TABLE, torch.tensor(1), x, return_x0=True).x0[0].tolist()
    assert math.isnan(x0[0]) and x0[1:] == [-1.0, 1.0]


def test_every_pixel_value(backend):
    pixels = torch.arange(256, dtype=U8).view(1, 256)
    x = q_sample(pixels, torch.tensor([0]), torch.tensor([[1.0, 0.0]]), torch.zeros(1, 256))
    exact = torch.arange(256, dtype=F64) / 127.5 - 1
    assert x[0, 0] == -1 and x[0, 255] == 1
    assert (x[0].double() - exact).abs().max() <= 2.0**-24
