"""The ops in plain torch, on any device: the oracle that every kernel is tested against, and the fallback.

Arithmetic is fp32 (float64 where an image is float64), operation for operation as in csrc/*.h, so that in fp32 the
results are the same bits as the kernels'.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError
from ..noise import NoiseKey, normals


def working_dtype(*images: Tensor) -> torch.dtype:
    """What to compute in: float64 if any image is, else fp32."""
    return torch.float64 if any(image.dtype == torch.float64 for image in images) else torch.float32


def per_sample(values: Tensor, image: Tensor) -> Tensor:
    """[N] shaped to multiply an image [N, C, ...]."""
    return values.view(-1, *[1] * (image.ndim - 1))


def widen(image: Tensor, dtype: torch.dtype) -> Tensor:
    """Storage to arithmetic: uint8 pixels become -1..1, floats are cast."""
    return image.to(dtype) / 127.5 - 1.0 if image.dtype == torch.uint8 else image.to(dtype)


def draw(noise: Tensor | NoiseKey, image: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise of an image: given, or drawn in fp32 from its key."""
    if isinstance(noise, NoiseKey):
        return normals(noise, math.prod(image.shape[1:])).view(image.shape).to(dtype)
    return noise.to(dtype)


def check_rows(op: str, name: str, table: Tensor, index: Tensor) -> None:
    """Raises InputError for an index outside the table, on the CPU: looking on a GPU would wait for it."""
    if index.device.type != "cpu":
        return
    index, rows = index.view(-1), table.shape[0]
    if len(outside := ((index < 0) | (index >= rows)).nonzero()):
        i = int(outside[0])
        raise InputError(f"{op}: {name}[{i}] is {int(index[i])}, outside the table's range 0..{rows - 1}")


def row_of(table: Tensor, step: Tensor) -> Tensor:
    """table[step] for a scalar tensor, which as an index would be read back to the host first."""
    return table.index_select(0, step.view(1))[0]


def normal(key: NoiseKey, out: Tensor) -> None:
    out.copy_(draw(key, out, torch.float32))


def q_sample(x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey, out: Tensor) -> None:
    dtype = working_dtype(x0, out)
    check_rows("q_sample", "t", table, t)
    signal, sigma = (per_sample(column, x0) for column in table[t].to(dtype).unbind(1))
    out.copy_(signal * widen(x0, dtype) + sigma * draw(noise, x0, dtype))


def diffusion_loss(
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | NoiseKey,
    residual: Tensor | None,
    loss: Tensor,
) -> None:
    dtype = working_dtype(output, x0)
    check_rows("diffusion_loss", "t", table, t)
    c_x0, c_noise, weight = table[t].to(dtype).unbind(1)
    target = per_sample(c_x0, x0) * widen(x0, dtype) + per_sample(c_noise, x0) * draw(noise, x0, dtype)
    difference = output.to(dtype) - target
    if residual is not None:
        residual.copy_(difference)
    loss.copy_(weight * difference.flatten(1).square().mean(dim=1))


def diffusion_loss_backward(residual: Tensor, scale: Tensor, grad: Tensor) -> None:
    grad.copy_(residual.to(working_dtype(residual)) * per_sample(scale, residual))


def reverse_step(
    x_t: Tensor,
    output: Tensor,
    x0_previous: Tensor | None,
    table: Tensor,
    step: Tensor,
    noise: Tensor | NoiseKey,
    x_out: Tensor,
    x0_out: Tensor | None,
    model_out: Tensor | None,
) -> None:
    dtype = working_dtype(x_t, output)
    check_rows("reverse_step", "step", table, step)
    a_x, a_out, b_x, b_x0, b_previous, sigma, clip = row_of(table, step).to(dtype).unbind()
    x = x_t.to(dtype)
    x0 = torch.clamp(a_x * x + a_out * output.to(dtype), -clip, clip)
    following = b_x * x + b_x0 * x0
    if x0_previous is not None:
        following = following + b_previous * x0_previous.to(dtype)
    # A step without noise ignores what is in it, without asking the device whether it is one.
    following = torch.where(sigma == 0, following, following + sigma * draw(noise, x_t, dtype))
    x_out.copy_(following)
    if x0_out is not None:
        x0_out.copy_(x0)
    if model_out is not None:
        model_out.copy_(following)


OPS = {
    "normal": normal,
    "q_sample": q_sample,
    "diffusion_loss": diffusion_loss,
    "diffusion_loss_backward": diffusion_loss_backward,
    "reverse_step": reverse_step,
}
