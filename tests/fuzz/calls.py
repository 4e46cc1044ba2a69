"""Calls of the fused ops with arguments that fit: small, of every dtype, layout and number of dimensions."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.noise import NoiseKey
from ddpm_fast.objective import Objective
from ddpm_fast.samplers import SAMPLERS, make_table
from ddpm_fast.schedule import Schedule
from tests.fuzz.guard import Guarded

F32, BF16, F16, F64, U8, I64 = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64
)  # fmt: skip
FLOATS = (F32, F32, F32, BF16, F16, F64)
SIZES = (0, 1, 1, 2, 2, 3, 3, 4, 5, 7, 8, 9, 16, 17, 33)
WILD = (float("nan"), float("inf"), float("-inf"), 1e10, -1e10, 3e4, 0.0, -0.0, 1e-40, 1.0)


@dataclass
class Call:
    """A call of an op: the function, its arguments by name, and how they are passed.

    Attributes:
        op: The op's name.
        direct: Whether torch.ops.ddpm_fast.<op> is called, and not the public function.
        arguments: By name, in the order of the registered op's schema or of the public function.
        positional: How many are passed by position; the public functions take the rest by name.
        written: The names of those that the op writes to.
        wild: Whether there are infinities, NaN or large numbers among the values.
        differentiable: The names of those that the op is differentiable in.
    """

    op: str
    direct: bool
    arguments: dict[str, Any]
    positional: int = 99
    written: Sequence[str] = ()
    wild: bool = False
    differentiable: Sequence[str] = ()

    def __call__(self) -> Any:
        function = getattr(torch.ops.ddpm_fast, self.op) if self.direct else getattr(ops, self.op)
        values = list(self.arguments.items())
        return function(*(v for _, v in values[: self.positional]), **dict(values[self.positional :]))

    def __str__(self) -> str:
        said = ", ".join(f"{name}={describe(value)}" for name, value in self.arguments.items())
        return f"{'torch.ops.ddpm_fast' if self.direct else 'ops'}.{self.op}({said}){' with wild values' * self.wild}"


def describe(value: Any) -> str:
    """A tensor by dtype, shape, strides and offset; anything else as it is."""
    if isinstance(value, NoiseKey):
        key = f"{describe(value.seed)}, {describe(value.sample_id)}, {describe(value.step)}, {int(value.stream)}"
        return f"NoiseKey({key})"
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return f"{value!r:.60}"
    if value.ndim == 0 and value.device.type == "cpu":
        return f"{value.item()!r} ({value.dtype})"
    words = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if not value.is_contiguous():
        words += f" strides {list(value.stride())}"
    if value.storage_offset() * value.element_size() != 64 and value.device.type == "cpu":
        words += f" at {value.storage_offset()}"
    if value.device.type != "cpu":
        words += f" on {value.device}"
    if value.dtype == I64 and value.ndim == 1 and value.device.type == "cpu":
        words += f" {value.tolist()[:4]}"
    return words + " requires grad" * value.requires_grad


class Maker:
    """Makes the tensors of one case."""

    def __init__(self, rng: random.Random, guarded: Guarded):
        self.rng, self.guarded = rng, guarded
        self.wild = rng.random() < 0.1
        # torch.manual_seed also notes where it was called from, for CUDA, which takes longer than all the rest.
        torch.default_generator.manual_seed(rng.getrandbits(31))
        self.most = rng.choice((100, 300, 3000))  # elements

    def shape(self) -> tuple[int, ...]:
        """[N, C, ...] of at most self.most elements, seldom without any."""
        rng = self.rng
        dimensions = rng.choice((2, 3, 4, 4, 4, 4, 5))
        while True:
            shape = tuple(rng.choice(SIZES) for _ in range(dimensions))
            elements = functools.reduce(lambda a, b: a * b, shape)
            if elements <= self.most and (elements or rng.random() < 0.3):
                return shape

    def laid_out(self, values: Tensor) -> Tensor:
        """The values in a random layout, between red zones."""
        rng, shape = self.rng, values.shape
        kind = rng.choice(("contiguous", "contiguous", "channels_last", "channels_last", "sliced", "permuted"))
        if not values.numel():
            kind = "contiguous"
        order = list(range(values.ndim))
        if kind == "channels_last" and values.ndim > 2:
            order = [0, *order[2:], 1]
        elif kind == "permuted":
            rng.shuffle(order)
        strides, step = [0] * values.ndim, 2 if kind == "sliced" else 1
        for d in reversed(order):
            strides[d] = step
            step *= max(1, shape[d])
        return self.guarded.tensor(values, strides, offset=rng.choice((0, 0, 0, 1)))

    def image(self, shape: Sequence[int], dtype: torch.dtype | None = None, wild: bool | None = None) -> Tensor:
        """Numbers about the size of an image's, some of them wild."""
        rng = self.rng
        dtype = dtype or rng.choice(FLOATS)
        if dtype == U8:
            return self.laid_out(torch.randint(0, 256, shape, dtype=U8))
        values = torch.randn(tuple(shape))
        if (self.wild if wild is None else wild) and values.numel():
            flat = values.view(-1)
            for _ in range(rng.choice((1, 2, 5))):
                flat[rng.randrange(len(flat))] = rng.choice(WILD)
        return self.laid_out(values.to(dtype))

    def plain(self, values: Tensor) -> Tensor:
        """The values contiguous, between red zones."""
        return self.guarded.tensor(values, values.contiguous().stride())

    def number(self, value: int) -> Tensor:
        return self.plain(torch.tensor(value, dtype=I64))

    def key(self, n: int) -> NoiseKey:
        rng = self.rng
        first = rng.choice((0, 1, 5, 2**32 - 1, 2**33, 2**56 - n, rng.randrange(2**40)))
        ids = torch.arange(first, first + n, dtype=I64)
        if rng.random() < 0.2:
            ids = ids.flip(0)
        sample_id = self.guarded.tensor(ids, (rng.choice((1, 1, 1, 2)),))
        seed = rng.choice((0, 1, -1, 2**63 - 1, -(2**63), rng.getrandbits(62)))
        return NoiseKey(self.number(seed), sample_id, self.number(rng.choice((0, 3, 2**32 - 1))), rng.randrange(256))

    def noise(self, shape: Sequence[int]) -> Tensor | NoiseKey:
        return self.key(shape[0]) if self.rng.random() < 0.4 else self.image(shape)

    def timesteps(self, n: int, rows: int) -> Tensor:
        t = torch.randint(0, rows, (n,))
        return self.guarded.tensor(t, (self.rng.choice((1, 1, 2)),))

    def table(self, values: Tensor) -> Tensor:
        """The table in fp32 or float64, in a random layout."""
        dtype = self.rng.choice((F32, F32, F64))
        return self.laid_out(values.to(dtype)) if self.rng.random() < 0.3 else self.plain(values.to(dtype))


# --- what is made once


def _diffusions() -> list[GaussianDiffusion]:
    chains = Schedule.cosine(8), Schedule.linear(30), Schedule.cosine(20).zero_terminal_snr()
    choices = ("v", "fixed_small", "vlb"), ("x0", "fixed_large", "vlb"), ("v", "learned_range", "hybrid")
    made = [GaussianDiffusion(chain, *choice) for chain in chains for choice in choices]
    return [*made, *(GaussianDiffusion(chain, "eps", "learned", "hybrid") for chain in chains[:2])]


DIFFUSIONS = functools.cache(_diffusions)


@functools.cache
def bound_table(i: int, hybrid: bool, clip: bool, decoder: str) -> Tensor:
    diffusion = DIFFUSIONS()[i]
    objective: Objective = diffusion.objective
    if hybrid:
        return objective.hybrid_table(diffusion.schedule)
    return objective.bound_table(diffusion.schedule, clip, decoder)


@functools.cache
def step_table(i: int, sampler: str) -> Tensor:
    return make_table(DIFFUSIONS()[i], sampler, 5).coefficients


# --- one maker for each op


def normal(make: Maker, direct: bool) -> Call:
    rng = make.rng
    shape = make.shape()
    key, dtype = make.key(shape[0]), rng.choice(FLOATS)
    last = len(shape) in (4, 5) and rng.random() < 0.4
    if direct:
        seed, sample_id, step = key.seed, key.sample_id, key.step
        arguments = {"seed": seed, "sample_id": sample_id, "step_id": step, "stream": key.stream}
        return Call("normal", True, {**arguments, "shape": list(shape), "dtype": dtype, "channels_last": last})
    memory_format = torch.channels_last if last else torch.contiguous_format
    return Call("normal", False, {"key": key, "shape": shape[1:], "dtype": dtype, "memory_format": memory_format}, 2)


def _noise_arguments(noise: Tensor | NoiseKey, direct: bool) -> dict[str, Any]:
    """The noise as the public function takes it, or as the five arguments of the registered op."""
    if not direct:
        return {"noise": noise}
    if isinstance(noise, Tensor):
        return {"noise": noise, "seed": None, "sample_id": None, "step_id": None, "stream": 0}
    parts = {"seed": noise.seed, "sample_id": noise.sample_id, "step_id": noise.step, "stream": noise.stream}
    return {"noise": None, **parts}


def q_sample(make: Maker, direct: bool) -> Call:
    shape, rows = make.shape(), make.rng.choice((1, 3, 10))
    x0 = make.image(shape, make.rng.choice((U8, *FLOATS)))
    arguments = {
        "x0": x0,
        "t": make.timesteps(shape[0], rows),
        "table": make.table(torch.rand(rows, 2)),
        **_noise_arguments(make.noise(shape), direct),
        "dtype": make.rng.choice(FLOATS),
    }
    return Call("q_sample", direct, arguments, 4 + 5 * direct, differentiable=("x0", "noise"), wild=make.wild)


def diffusion_loss(make: Maker, direct: bool) -> Call:
    shape, rows = make.shape(), make.rng.choice((1, 3, 10))
    if shape[0] and not all(shape):
        shape = (0, *shape[1:])
    arguments = {
        "output": make.image(shape),
        "x0": make.image(shape, make.rng.choice((U8, *FLOATS))),
        "t": make.timesteps(shape[0], rows),
        "table": make.table(torch.randn(rows, 3)),
        **_noise_arguments(make.noise(shape), direct),
        **({"with_residual": make.rng.random() < 0.5} if direct else {}),
    }
    return Call("diffusion_loss", direct, arguments, differentiable=("output",), wild=make.wild)


def _bound(make: Maker, direct: bool, name: str) -> Call:
    """hybrid_loss or vlb_terms, for outputs that are off by about as much as an untrained network's."""
    rng, shape = make.rng, make.shape()
    if shape[0] and not all(shape):
        shape = (0, *shape[1:])
    hybrid = name == "hybrid_loss"
    found = [i for i, d in enumerate(DIFFUSIONS()) if d.objective.learned or not hybrid]
    i = rng.choice(found)
    diffusion = DIFFUSIONS()[i]
    x0 = make.image(shape, rng.choice((U8, U8, *FLOATS)), wild=False)
    t = make.timesteps(shape[0], len(diffusion.schedule))
    noise = make.noise(shape)
    table = bound_table(i, hybrid, rng.random() < 0.5, rng.choice(("paper", "exact")))
    groups = 2 if diffusion.objective.learned else 1
    output = make.image((shape[0], groups * shape[1], *shape[2:]))
    if groups == 2 and diffusion.objective.variance == "learned" and shape[0]:
        base = diffusion.schedule.posterior_log_variance_clipped[t].view(-1, *[1] * (len(shape) - 1))
        output = make.laid_out(output.double() + torch.cat([0 * base, base], 1).repeat_interleave(shape[1], 1))
        output = make.laid_out(output.to(rng.choice(FLOATS)))
    arguments = {
        "output": output,
        "x0": x0,
        "t": t,
        "table": make.table(table),
        **_noise_arguments(noise, direct),
        **({"with_gradient": rng.random() < 0.5} if direct else {}),
    }
    return Call(name, direct, arguments, differentiable=("output",), wild=make.wild)


def loss_backward(make: Maker, direct: bool) -> Call:
    shape = make.shape()
    groups = make.rng.choice([g for g in (1, 1, 2, 3) if g == 1 or (shape[1] and shape[1] % g == 0)])
    stored = make.image(shape)
    scale = make.image((shape[0], groups), F64 if stored.dtype == F64 else F32)
    return Call("loss_backward", True, {"stored": stored, "scale": scale}, wild=make.wild)


def _step(make: Maker) -> tuple[tuple[int, ...], int, Tensor, int]:
    """The shape, the groups of the output, a table, and a row."""
    rng = make.rng
    if rng.random() < 0.6:
        i = rng.randrange(len(DIFFUSIONS()))
        learned = DIFFUSIONS()[i].objective.learned
        sampler = rng.choice(["ddpm"] if learned else sorted(SAMPLERS))
        table, groups = step_table(i, sampler), 2 if learned else 1
    else:
        rows, groups = rng.choice((1, 4)), rng.choice((1, 2))
        table = torch.randn(rows, 8, dtype=F64)
        table[:, 5:7] = table[:, 5:7].abs()
        if rng.random() < 0.5:
            table[:, 6] = float("inf")
        table[:, 7] = 0.3 if groups == 2 else 0.0
    return make.shape(), groups, make.table(table), rng.randrange(len(table))


def reverse_step(make: Maker, direct: bool) -> Call:
    rng = make.rng
    shape, groups, table, row = _step(make)
    x, output = make.image(shape), make.image((shape[0], groups * shape[1], *shape[2:]))
    previous = make.image(shape) if rng.random() < 0.5 else None
    noise = _noise_arguments(make.noise(shape), direct)
    with_x0, model_dtype = rng.random() < 0.5, rng.choice((None, *FLOATS))
    step = make.number(row)
    if direct:
        arguments = {
            "x_t": x,
            "output": output,
            "x0_previous": previous,
            "table": table,
            "step": step,
            **noise,
            "with_x0": with_x0,
            "model_dtype": model_dtype,
        }
    else:
        options = {"x0_previous": previous, "return_x0": with_x0, "model_dtype": model_dtype}
        arguments = {"x_t": x, "output": output, "table": table, "step": step, **noise, **options}
    made = Call("reverse_step", direct, arguments, 99 if direct else 5, wild=make.wild)
    made.differentiable = ("x_t", "output", "x0_previous")
    return made


def reverse_step_(make: Maker, direct: bool) -> Call:
    rng = make.rng
    shape, groups, table, row = _step(make)
    x = make.image(shape)
    while not (x.is_contiguous() or _is_last(x)):
        x = make.laid_out(x)
    wide = F64 if x.dtype == F64 else F32

    def like(dtype: torch.dtype) -> Tensor:
        made = make.image(shape, dtype)
        while not (made.is_contiguous() or _is_last(made)):
            made = make.laid_out(made)
        return made

    output = x if groups == 1 and rng.random() < 0.2 else make.image((shape[0], groups * shape[1], *shape[2:]))
    x0 = like(wide) if rng.random() < 0.6 else None
    x_model = like(rng.choice(FLOATS)) if rng.random() < 0.5 else None
    noise = _noise_arguments(make.noise(shape), direct)
    step = make.number(row)
    if direct:
        arguments = {"x": x, "output": output, "x0": x0, "x_model": x_model, "table": table, "step": step, **noise}
    else:
        options = {"x0": x0, "x_model": x_model}
        arguments = {"x": x, "output": output, "table": table, "step": step, **noise, **options}
    written = ("x", "x0", "x_model")
    return Call("reverse_step_", direct, arguments, 99 if direct else 5, written=written, wild=make.wild)


def _is_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])


def _norm(make: Maker, direct: bool) -> tuple[dict[str, Any], tuple[int, ...]]:
    rng = make.rng
    groups = rng.choice((1, 2, 3, 4, 8))
    shape = make.shape()
    if len(shape) != 4:
        shape = (*shape, 1, 1, 1)[:4]
    shape = (shape[0], groups * rng.choice((1, 2, 3, 4)), rng.choice((1, 2, 5)), rng.choice((1, 3, 4)))

    def rows() -> Tensor:
        one = rng.random() < 0.3 and not direct
        return make.laid_out(torch.randn(1 if one else shape[0], shape[1]).to(rng.choice(FLOATS[:5])))

    dtype = rng.choice(FLOATS)
    shifted = (rows(), rows()) if rng.random() < 0.5 else (None, None)
    arguments = {
        "x": make.image(shape, dtype),
        "weight": make.image(shape[1:2], rng.choice(FLOATS), wild=False),
        "bias": make.image(shape[1:2], rng.choice(FLOATS), wild=False),
        "scale": shifted[0],
        "shift": shifted[1],
        "added": rows() if rng.random() < 0.3 else None,
        "groups": groups,
        "eps": rng.choice((1e-5, 1e-6, 1e-3)),
        "silu": rng.random() < 0.5,
    }
    return arguments, shape


def group_norm(make: Maker, direct: bool) -> Call:
    arguments, _ = _norm(make, direct)
    inputs = ("x", "weight", "bias", "scale", "shift", "added")
    if direct:
        return Call("group_norm", True, arguments, wild=make.wild, differentiable=inputs)
    pair = (arguments["scale"], arguments["shift"]) if arguments["scale"] is not None else None
    options = {"scale_shift": pair, "added": arguments["added"], "silu": arguments["silu"]}
    plain = {name: arguments[name] for name in ("x", "weight", "bias", "groups", "eps")}
    return Call("group_norm", False, {**plain, **options}, 5, wild=make.wild, differentiable=inputs)


def group_norm_backward(make: Maker, direct: bool) -> Call:
    arguments, shape = _norm(make, True)
    groups = arguments["groups"]
    x = arguments["x"].double()
    if arguments["added"] is not None:
        x = x + arguments["added"].double()[..., None, None]
    variance, mean = torch.var_mean(x.unflatten(1, (groups, -1)).flatten(2), 2, correction=0)
    statistics = make.plain(torch.stack([mean, (variance + 1e-5).rsqrt()], 2))
    given = {name: arguments[name] for name in ("x", "weight", "bias", "scale", "shift", "added")}
    grad = make.image(shape, arguments["x"].dtype)
    made = {"grad": grad, **given, "statistics": statistics, "silu": arguments["silu"]}
    return Call("group_norm_backward", True, made, wild=make.wild)


def winograd(make: Maker, direct: bool) -> Call:
    rng = make.rng
    shape = (rng.choice((0, 1, 2)), rng.choice((1, 3, 8, 33)), rng.choice((1, 2, 4, 5, 9)), rng.choice((1, 3, 8)))
    k = rng.choice((1, 2, 31, 32, 33))
    weight = torch.randn(k, shape[1], 3, 3)
    arguments = {
        "x": make.image(shape, wild=False),
        "filters": make.plain(ops.winograd_filters(weight)),
        "bias": make.image((k,)) if rng.random() < 0.5 else None,
        "out_channels": k,
    }
    return Call("winograd", direct, arguments, wild=make.wild)


def winograd_filters(make: Maker, direct: bool) -> Call:
    shape = (make.rng.choice((1, 3, 33)), make.rng.choice((1, 4)), 3, 3)
    return Call("winograd_filters", False, {"weight": make.image(shape)}, wild=make.wild)


MAKERS: dict[str, Callable[[Maker, bool], Call]] = {
    "normal": normal,
    "q_sample": q_sample,
    "diffusion_loss": diffusion_loss,
    "hybrid_loss": functools.partial(_bound, name="hybrid_loss"),
    "vlb_terms": functools.partial(_bound, name="vlb_terms"),
    "loss_backward": loss_backward,
    "reverse_step": reverse_step,
    "reverse_step_": reverse_step_,
    "group_norm": group_norm,
    "group_norm_backward": group_norm_backward,
    "winograd": winograd,
    "winograd_filters": winograd_filters,
}
