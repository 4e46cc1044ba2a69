"""Calls of the fused ops with arguments that fit: one maker for each op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.noise import NoiseKey
from ddpm_fast.objective import Objective
from ddpm_fast.samplers import SAMPLERS, make_table
from ddpm_fast.schedule import Schedule
from tests.fuzz.maker import F32, F64, FLOATS, U8, Call, Maker

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
        settings = {name: arguments.pop(name) for name in ("groups", "eps", "silu")}
        arguments |= {"residual": None, "joined": None, **settings, "keep": False}
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
    centre = mean.float()
    statistics = make.plain(torch.stack([centre, mean - centre, (variance + 1e-5).rsqrt()], 2).float())
    given = {name: arguments[name] for name in ("weight", "bias", "scale", "shift", "added")}
    given = {"grad_total": None, "x": arguments["x"], "joined": None, **given}
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
    shape = (make.rng.choice((1, 3, 33)), make.rng.choice((1, 4, 35)), 3, 3)
    arguments: dict[str, Any] = {"weight": make.image(shape, wild=False)}
    if direct:
        arguments["flipped"] = make.rng.random() < 0.5
    return Call("winograd_filters", direct, arguments)


def winograd_weight_gradient(make: Maker, direct: bool) -> Call:
    rng = make.rng
    n, size = rng.choice((0, 1, 2, 9)), (rng.choice((1, 2, 4, 5, 9)), rng.choice((1, 3, 8)))
    channels, dtype = [rng.choice((1, 3, 8, 33, 65)) for _ in range(2)], rng.choice(FLOATS)
    x, grad = (make.image((n, c, *size), dtype, wild=False) for c in channels)
    return Call("winograd_weight_gradient", True, {"x": x, "grad": grad})


def convolve(make: Maker, direct: bool) -> Call:
    rng = make.rng
    shape = (rng.choice((0, 1, 2)), rng.choice((1, 3, 8, 33)), rng.choice((1, 2, 4, 5, 9)), rng.choice((1, 3, 8)))
    k = rng.choice((1, 2, 31, 32, 33))
    arguments = {
        "x": make.image(shape, wild=False),
        "weight": make.image((k, shape[1], 3, 3), wild=False),
        "bias": make.image((k,), wild=False) if rng.random() < 0.5 else None,
    }
    return Call("convolve", direct, arguments)


def draw_timesteps(make: Maker, direct: bool) -> Call:
    rng = make.rng
    n, T = rng.choice((0, 1, 5, 33)), rng.choice((1, 2, 10, 1000))
    key = make.key(n)
    p = torch.rand(T, dtype=F64) if rng.random() < 0.4 else None
    names = make.guarded.tensor(torch.arange(T), (rng.choice((1, 2)),)) if rng.random() < 0.5 else None
    labels = make.timesteps(n, 10) if rng.random() < 0.5 else None
    parts, share = rng.choice((0, 0, 1, max(1, n), 2**31)), rng.choice((0.0, 0.1, 1.0))
    if direct:
        arguments = {"seed": key.seed, "sample_id": key.sample_id, "step_id": key.step, "stream": key.stream}
        sums = None if p is None else make.plain(p.cumsum(0))
        arguments |= {"num_timesteps": T, "parts": parts, "probabilities": None if p is None else make.plain(p)}
        arguments |= {"cumulative": sums, "network_timesteps": names, "labels": labels}
        return Call("draw_timesteps", True, {**arguments, "dropped": round(share * 2**24), "null_label": 10})
    drop = None if labels is None else ops.LabelDrop(labels, share, 10)
    options = {"parts": parts, "probabilities": p, "network_timesteps": names, "label_drop": drop}
    return Call("draw_timesteps", False, {"key": key, "num_timesteps": T, **options}, 2)


def record_losses(make: Maker, direct: bool) -> Call:
    rng = make.rng
    n, T, slots = rng.choice((0, 1, 5, 33)), rng.choice((1, 2, 10)), rng.choice((1, 3, 10))
    arguments = {
        "history": make.plain(torch.zeros(T, slots)),
        "counts": make.plain(torch.randint(0, 100, (T,))),
        "t": make.timesteps(n, T),
        "losses": make.guarded.tensor(torch.rand(n), (rng.choice((1, 2)),)),
    }
    return Call("record_losses", direct, arguments, written=("history", "counts"))


def dropout(make: Maker, direct: bool) -> Call:
    rng = make.rng
    shape = make.shape()
    x, key = make.image(shape), make.key(shape[0])
    layer, share = rng.choice((0, 1, 7, 2**31, 2**32 - 1)), rng.choice((0.0, 0.1, 0.5, 1.0))
    if direct:
        arguments = {"x": x, "seed": key.seed, "sample_id": key.sample_id, "layer": layer}
        arguments["dropped"] = round(share * 2**16)
    else:
        arguments = {"x": x, "key": key, "layer": layer, "share": share}
    return Call("dropout", direct, arguments, differentiable=("x",), wild=make.wild)


MAKERS: dict[str, Callable[[Maker, bool], Call]] = {
    "normal": normal,
    "q_sample": q_sample,
    "diffusion_loss": diffusion_loss,
    "hybrid_loss": functools.partial(_bound, name="hybrid_loss"),
    "vlb_terms": functools.partial(_bound, name="vlb_terms"),
    "loss_backward": loss_backward,
    "reverse_step": reverse_step,
    "reverse_step_": reverse_step_,
    "draw_timesteps": draw_timesteps,
    "record_losses": record_losses,
    "dropout": dropout,
    "group_norm": group_norm,
    "group_norm_backward": group_norm_backward,
    "winograd": winograd,
    "winograd_filters": winograd_filters,
    "winograd_weight_gradient": winograd_weight_gradient,
    "convolve": convolve,
}
