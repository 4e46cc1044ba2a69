"""The training losses and the terms of the variational bound, each with its gradient from one pass.

A forward leaves derivatives behind, in the output's dtype and about 1 in size, and numbers for each sample that make
gradients of them. `loss_backward` multiplies the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.checks import (
    PIXELS,
    check_device,
    check_groups,
    check_image,
    check_layout,
    check_like,
    check_noise,
    check_tensors,
    check_timesteps,
)
from ddpm_fast.ops.declare import Gradient, declare, kernel_for
from ddpm_fast.ops.direct import on_cpu
from ddpm_fast.ops.tensors import VlbTerms, coefficients, dense, dense_noise, like, working_dtype

_ops = torch.ops.ddpm_fast


_INSTEAD = "compute the loss in plain torch"  # for a second derivative


def _check_loss(op: str, output: Tensor, x0: Tensor, t: Tensor, table: Tensor, columns: int) -> None:
    check_image(op, "output", output)
    check_image(op, "x0", x0, PIXELS)
    check_timesteps(op, output, t, table, columns)
    if output[0:1].numel() == 0 and output.shape[0] > 0:
        raise InputError(f"{op}: samples of shape {tuple(output.shape[1:])} have no elements to average over")


def _wants_gradient(op: str, output: Tensor, x0: Tensor, t: Tensor, table: Tensor) -> bool:
    """Whether the forward has to leave something for a backward. The first to look at what a caller gave."""
    if not (
        isinstance(output, Tensor) and isinstance(x0, Tensor) and isinstance(t, Tensor) and isinstance(table, Tensor)
    ):
        check_tensors(op, output=output, x0=x0, t=t, table=table)
    return output.requires_grad and torch.is_grad_enabled()


# --- loss_backward: of all of the losses


def _loss_backward_empty(stored, scale):
    check_image("loss_backward", "stored", stored)
    check_device("loss_backward", "scale", scale, "stored", stored)
    check_layout("loss_backward", "scale", scale)
    shape, dtype = tuple(stored.shape), working_dtype(stored)
    groups = scale.shape[1] if scale.ndim == 2 else 0
    fits = scale.ndim == 2 and scale.shape[0] == shape[0] and groups > 0 and shape[1] % groups == 0
    if not fits or scale.dtype != dtype:
        raise InputError(
            f"loss_backward: scale is {scale.dtype} of shape {tuple(scale.shape)} and stored has shape {shape}; "
            f"expected {dtype} [{shape[0]}, groups], where the groups divide the channels"
        )
    return like(stored)


def _save_loss(ctx, outputs, *others):
    """Saves what the backward needs, and after it the loss, which leads a second derivative back to the output."""
    ctx.save_for_backward(*others, outputs[0])
    ctx.mark_non_differentiable(*outputs[1:])
    # Without this, zero gradients of the other results are made every time, one of them of the image's size.
    ctx.set_materialize_grads(False)


def _loss_backward(stored, scale):
    grad = _loss_backward_empty(stored, scale)
    kernel_for("loss_backward", stored)(dense(stored), scale.contiguous(), grad)
    return grad


declare(
    "loss_backward(Tensor stored, Tensor scale) -> Tensor",
    run=_loss_backward,
    shapes=_loss_backward_empty,
)


# --- diffusion_loss: the forward leaves output - target behind


def diffusion_loss(output: Tensor, x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey) -> Tensor:
    """The regression loss of each sample: weight_t * mean((output - target)^2) (Ho et al. 2020, eq. 14).

    The target is linear in x0 and the noise, which covers every prediction: target = table[t, 0] x0 + table[t, 1] eps.
    One pass computes the loss and keeps output - target, in output's dtype, for the gradient. Differentiable in output
    only.

    Args:
        output: float [N, C, ...], the network's.
        x0: [N, C, ...], uint8 or float.
        t: int64 [N], the timesteps.
        table: fp32 [T, 3], Objective.loss_table(schedule).float(), on output's device: the target's two coefficients
            and weight_t.
        noise: eps, shaped like x0, or a NoiseKey of N samples.

    Returns:
        fp32 [N]; float64 for a float64 output.

    Raises:
        InputError: shapes, dtypes or devices do not fit; on the CPU also for t outside 0..T-1.
    """
    if (direct := on_cpu()) is not None:
        loss = direct.diffusion_loss(output, x0, t, table, noise)
        if loss is not None:
            return loss
    with_residual = _wants_gradient("diffusion_loss", output, x0, t, table)
    loss, _ = _call_diffusion_loss(output, x0, t, table, noise, with_residual)
    return loss


def _diffusion_loss_empty(output, x0, t, table, noise, with_residual):
    _check_loss("diffusion_loss", output, x0, t, table, columns=3)
    check_like("diffusion_loss", "x0", x0, "output", output)
    check_noise("diffusion_loss", noise, x0)
    loss = torch.empty(output.shape[0], dtype=working_dtype(output), device=output.device)
    return loss, like(output) if with_residual else output.new_empty(0)


def _diffusion_loss(output, x0, t, table, noise, with_residual):
    loss, residual = _diffusion_loss_empty(output, x0, t, table, noise, with_residual)
    run = kernel_for("diffusion_loss", output, x0, noise)
    rows = coefficients(table, output, x0)
    run(dense(output), dense(x0), t.contiguous(), rows, dense_noise(noise), residual if with_residual else None, loss)
    return loss, residual


def _diffusion_loss_save(ctx, inputs, outputs):
    _save_loss(ctx, outputs, outputs[1], inputs.t, inputs.table)


def _diffusion_loss_backward(ctx, grad_loss, _):
    if grad_loss is None:
        return {}
    residual, t, table, _ = ctx.saved_tensors
    elements = residual[0].numel() if residual.shape[0] else 1
    scale = grad_loss * table[t, 2].to(grad_loss.dtype) * (2.0 / elements)
    return {"output": _ops.loss_backward(residual, scale[:, None])}


_call_diffusion_loss = declare(
    "diffusion_loss(Tensor output, Tensor x0, Tensor t, Tensor table, NOISE, bool with_residual) -> (Tensor, Tensor)",
    run=_diffusion_loss,
    shapes=_diffusion_loss_empty,
    gradient=Gradient(("output",), _diffusion_loss_save, _diffusion_loss_backward, _INSTEAD),
)


# --- hybrid_loss and vlb_terms: the forward leaves derivatives behind, and factors [N, groups] that make gradients of
# them, where groups is how many times x0's channels the output has


def hybrid_loss(output: Tensor, x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey) -> Tensor:
    """L_hybrid of each sample, for a learned variance (Nichol & Dhariwal 2021, eq. 16).

    The regression loss of diffusion_loss plus a multiple of the variational bound's term at t in bits/dim, whose
    gradient reaches the variance alone. One pass computes the loss and keeps what its gradient needs, in output's
    dtype. Differentiable in output only.

    Args:
        output: float [N, 2C, ...], the prediction and then v, which sets the variance.
        x0: [N, C, ...], uint8 or float.
        t: int64 [N], the timesteps.
        table: fp32 [T, 11], Objective.hybrid_table.
        noise: eps, shaped like x0, or a NoiseKey of N samples.

    Returns:
        fp32 [N]; float64 for a float64 output.

    Raises:
        InputError: shapes, dtypes or devices do not fit; on the CPU also for t outside 0..T-1.
    """
    if (direct := on_cpu()) is not None:
        loss = direct.hybrid_loss(output, x0, t, table, noise)
        if loss is not None:
            return loss
    with_gradient = _wants_gradient("hybrid_loss", output, x0, t, table)
    loss, *_ = _call_hybrid_loss(output, x0, t, table, noise, with_gradient)
    return loss


def vlb_terms(output: Tensor, x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey) -> VlbTerms:
    """The variational bound's term at each sample's t in bits/dim (Ho et al. 2020, eq. 5 and 13): the KL divergence of
    the posterior from the model's step, or at t = 0 the negative log likelihood of x_0 given x_1.

    bits_per_dim is differentiable in output (its gradient too comes from the one pass), mse_x0 is not.

    Args:
        output: float [N, C, ...], or [N, 2C, ...] with a learned variance.
        x0: [N, C, ...], uint8 or float.
        t: int64 [N], the timesteps.
        table: fp32 [T, 9], Objective.bound_table.
        noise: eps, shaped like x0, or a NoiseKey of N samples.

    Returns:
        bits_per_dim, fp32 [N], and mse_x0, fp32 [N]: the mean squared error of the predicted x_0, which is clipped as
        the table says. The mean squared error of eps is SNR_t times it.

    Raises:
        InputError: shapes, dtypes or devices do not fit; on the CPU also for t outside 0..T-1.
    """
    if (direct := on_cpu()) is not None:
        terms = direct.vlb_terms(output, x0, t, table, noise)
        if terms is not None:
            return VlbTerms(*terms)
    with_gradient = _wants_gradient("vlb_terms", output, x0, t, table)
    bits, mse_x0, *_ = _call_vlb_terms(output, x0, t, table, noise, with_gradient)
    return VlbTerms(bits, mse_x0.detach())


def _bound_empty(output, groups, with_gradient):
    """(loss, gradient, factors); groups: how many times the output has x0's channels."""
    dtype = working_dtype(output)
    loss = torch.empty(output.shape[0], dtype=dtype, device=output.device)
    factors = torch.empty((output.shape[0], groups), dtype=dtype, device=output.device)
    return loss, like(output) if with_gradient else output.new_empty(0), factors


def _hybrid_loss_empty(output, x0, t, table, noise, with_gradient):
    _check_loss("hybrid_loss", output, x0, t, table, columns=11)
    check_groups("hybrid_loss", output, x0, (2,))
    check_noise("hybrid_loss", noise, x0)
    return _bound_empty(output, 2, with_gradient)


def _hybrid_loss(output, x0, t, table, noise, with_gradient):
    loss, gradient, factors = _hybrid_loss_empty(output, x0, t, table, noise, with_gradient)
    run = kernel_for("hybrid_loss", output, x0, noise)
    rows = coefficients(table, output, x0)
    kept = gradient if with_gradient else None
    run(dense(output), dense(x0), t.contiguous(), rows, dense_noise(noise), kept, loss, factors)
    return loss, gradient, factors


def _vlb_terms_empty(output, x0, t, table, noise, with_gradient):
    _check_loss("vlb_terms", output, x0, t, table, columns=9)
    check_groups("vlb_terms", output, x0, (1, 2))
    check_noise("vlb_terms", noise, x0)
    bits, gradient, factors = _bound_empty(output, 2 if output.shape[1] > x0.shape[1] else 1, with_gradient)
    return bits, torch.empty_like(bits), gradient, factors


def _vlb_terms(output, x0, t, table, noise, with_gradient):
    bits, mse_x0, gradient, factors = _vlb_terms_empty(output, x0, t, table, noise, with_gradient)
    run = kernel_for("vlb_terms", output, x0, noise)
    rows = coefficients(table, output, x0)
    kept = gradient if with_gradient else None
    terms = VlbTerms(bits, mse_x0)
    run(dense(output), dense(x0), t.contiguous(), rows, dense_noise(noise), kept, terms, factors)
    return bits, mse_x0, gradient, factors


def _bound_save(ctx, inputs, outputs):
    _save_loss(ctx, outputs, *outputs[-2:])


def _bound_backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return {}
    gradient, factors, _ = ctx.saved_tensors
    return {"output": _ops.loss_backward(gradient, grad_loss[:, None] * factors)}


_call_hybrid_loss = declare(
    "hybrid_loss(Tensor output, Tensor x0, Tensor t, Tensor table, NOISE, bool with_gradient) "
    "-> (Tensor, Tensor, Tensor)",
    run=_hybrid_loss,
    shapes=_hybrid_loss_empty,
    gradient=Gradient(("output",), _bound_save, _bound_backward, _INSTEAD),
)
_call_vlb_terms = declare(
    "vlb_terms(Tensor output, Tensor x0, Tensor t, Tensor table, NOISE, bool with_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    run=_vlb_terms,
    shapes=_vlb_terms_empty,
    gradient=Gradient(("output",), _bound_save, _bound_backward, _INSTEAD),
)
