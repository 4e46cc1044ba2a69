"""The ops' formulas in float64 and in torch's own operations: independent of the package, and differentiable to any
order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.noise import NoiseKey

F64 = torch.float64


def _wide(x: Tensor) -> Tensor:
    return x.to(F64) / 127.5 - 1 if x.dtype == torch.uint8 else x.to(F64)


def _columns(table: Tensor, t: Tensor, like: Tensor) -> list[Tensor]:
    return [column.view(-1, *[1] * (like.ndim - 1)) for column in table[t].float().to(F64).unbind(1)]


def noise_of(arguments: dict[str, Any], like: Tensor) -> Tensor:
    """The noise that a call's arguments stand for, in float64."""
    noise = arguments["noise"]
    if noise is None:
        noise = NoiseKey(arguments["seed"], arguments["sample_id"], arguments["step_id"], arguments["stream"])
    if isinstance(noise, NoiseKey):
        with ops.use_backend("reference"):
            noise = ops.normal(noise, tuple(like.shape[1:]))
    return noise.to(F64)


def q_sample(a: dict[str, Any]) -> Tensor:
    signal, sigma = _columns(a["table"], a["t"], a["x0"])
    return signal * _wide(a["x0"]) + sigma * noise_of(a, a["x0"])


def diffusion_loss(a: dict[str, Any]) -> Tensor:
    c_x0, c_noise, weight = _columns(a["table"], a["t"], a["x0"])
    squares = (a["output"].to(F64) - (c_x0 * _wide(a["x0"]) + c_noise * noise_of(a, a["x0"]))) ** 2
    return weight.flatten() * squares.flatten(1).mean(1)


def reverse_step(a: dict[str, Any]) -> Tensor:
    x, output, previous = a["x_t"].to(F64), a["output"].to(F64), a["x0_previous"]
    a_x, a_out, b_x, b_x0, b_previous, sigma, clip, spread = a["table"][int(a["step"])].float().to(F64)
    out, v = output[:, : x.shape[1]], output[:, x.shape[1] :]
    x0 = (a_x * x + a_out * out).clamp(-clip, clip)
    deviation = sigma * (spread * v).exp() if v.shape == x.shape and x.shape[1] else sigma
    following = b_x * x + b_x0 * x0
    if previous is not None:
        following = following + b_previous * previous.to(F64)
    return following if sigma == 0 else following + deviation * noise_of(a, x)


def dropout(a: dict[str, Any]) -> Tensor:
    x = a["x"].to(F64)
    key = a["key"] if "key" in a else NoiseKey(a["seed"], a["sample_id"], a["seed"])
    share = a["share"] if "share" in a else a["dropped"] / 2**16
    with ops.use_backend("reference"), torch.no_grad():
        mask = ops.dropout(torch.ones(x.shape, dtype=F64), key, a["layer"], share)
    return x * mask


def group_norm(a: dict[str, Any]) -> Tensor:
    x = a["x"].to(F64)
    scale, shift = a["scale_shift"] or (None, None) if "scale_shift" in a else (a["scale"], a["shift"])
    if a["added"] is not None:
        x = x + a["added"].to(F64)[..., None, None]
    # Not F.group_norm, whose backward crashes for some combinations of what requires a gradient (torch 2.13).
    groups = x.unflatten(1, (a["groups"], -1))
    variance, mean = torch.var_mean(groups, (2, 3, 4), correction=0, keepdim=True)
    y = ((groups - mean) * (variance + a["eps"]).rsqrt()).flatten(1, 2)
    y = y * a["weight"].to(F64)[:, None, None] + a["bias"].to(F64)[:, None, None]
    if scale is not None:
        y = y * (1 + scale.to(F64)[..., None, None])
    if shift is not None:
        y = y + shift.to(F64)[..., None, None]
    return F.silu(y) if a["silu"] else y


FORMULAS = {
    "q_sample": q_sample,
    "diffusion_loss": diffusion_loss,
    "reverse_step": reverse_step,
    "dropout": dropout,
    "group_norm": group_norm,
}
