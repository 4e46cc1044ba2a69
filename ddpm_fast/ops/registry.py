"""The ops as PyTorch knows them: schema, shape function and gradient of each, in one look.

`Library.define` rather than `custom_op`: 2 us a call against 8 to 13. The implementation is the same for every
device, because the choice of a backend is ours (backend.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import dispatch as backend
from ddpm_fast.ops import reference

_library = torch.library.Library("ddpm_fast", "DEF")
_NOISE = "Tensor? noise, Tensor? seed, Tensor? sample_id, Tensor? step_id, int stream"
_TAGS = (torch.Tag.pt2_compliant_tag,)


def dense(x: Tensor) -> Tensor:
    """x itself if it is contiguous or channels_last, otherwise a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether x is channels_last and not contiguous as well (with one channel it can be both)."""
    if x.is_contiguous():
        return False
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor with the shape and memory format that an op gives to what it computes from x."""
    in_place = x.is_contiguous() or is_channels_last(x)
    memory_format = torch.preserve_format if in_place else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype or x.dtype, memory_format=memory_format)


def _dtypes(*tensors: Tensor | None) -> list[torch.dtype]:
    return [x.dtype for x in tensors if x is not None]


def _coefficients(table: Tensor, *images: Tensor) -> Tensor:
    """The table as a kernel reads it: dense, in the dtype of the arithmetic on these images."""
    return table.to(reference.working_dtype(*images)).contiguous()


def _noise(noise, seed, sample_id, step_id, stream) -> Tensor | NoiseKey:
    return dense(noise) if noise is not None else NoiseKey(seed, sample_id.contiguous(), step_id, stream)


def _register(schema: str, run, fake) -> None:
    name = schema.split("(")[0]
    _library.define(schema, tags=_TAGS)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ddpm_fast::{name}", fake, lib=_library)


def _differentiable(name: str, setup, backward) -> None:
    """Gives an op its gradient, as torch.library.register_autograd does and with the same arguments.

    That one lists the schema's arguments anew at each call, to fill in defaults (ours have none) and pass keywords on
    (ours take none): 40 us of the 166 us that a tiny loss takes, forward and backward.
    """
    op = getattr(torch.ops.ddpm_fast, name).default

    def run(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    def forward(ctx, *inputs):
        output = run(*inputs)
        setup(ctx, inputs, output)
        return output

    function = type(
        f"{name}_gradient",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def choose(*inputs):
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        return function.apply(*inputs) if wanted else run(*inputs)

    _library.impl(name, choose, "Autograd")


# --- normal


def _normal_empty(seed, sample_id, step_id, stream, shape, dtype, channels_last):
    memory_format = torch.contiguous_format
    if channels_last:
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=dtype, device=seed.device, memory_format=memory_format)


def _normal(seed, sample_id, step_id, stream, shape, dtype, channels_last):
    out = _normal_empty(seed, sample_id, step_id, stream, shape, dtype, channels_last)
    backend.kernel("normal", seed.device, dtype)(_noise(None, seed, sample_id, step_id, stream), out)
    return out


_register(
    "normal(Tensor seed, Tensor sample_id, Tensor step_id, int stream, SymInt[] shape, ScalarType dtype, "
    "bool channels_last) -> Tensor",
    _normal,
    _normal_empty,
)


# --- q_sample


def _q_sample(x0, t, table, noise, seed, sample_id, step_id, stream, dtype):
    out = _like(x0, dtype)
    z = _noise(noise, seed, sample_id, step_id, stream)
    run = backend.kernel("q_sample", x0.device, dtype, *_dtypes(x0, noise))
    run(dense(x0), t.contiguous(), _coefficients(table, x0, out), z, out)
    return out


def _q_sample_setup(ctx, inputs, output):
    x0, t, table, noise, *_ = inputs
    ctx.save_for_backward(t, table)
    ctx.dtypes = x0.dtype, None if noise is None else noise.dtype


def _q_sample_backward(ctx, grad):
    t, table = ctx.saved_tensors
    rows = table[t].to(reference.working_dtype(grad))
    signal, sigma = (reference.per_sample(column, grad) for column in rows.unbind(1))
    x0_dtype, noise_dtype = ctx.dtypes
    grad_x0 = (grad * signal).to(x0_dtype) if ctx.needs_input_grad[0] else None
    grad_noise = (grad * sigma).to(noise_dtype) if ctx.needs_input_grad[3] else None
    return grad_x0, None, None, grad_noise, None, None, None, None, None


_register(
    f"q_sample(Tensor x0, Tensor t, Tensor table, {_NOISE}, ScalarType dtype) -> Tensor",
    _q_sample,
    lambda x0, t, table, noise, seed, sample_id, step_id, stream, dtype: _like(x0, dtype),
)
_differentiable("q_sample", _q_sample_setup, _q_sample_backward)


# --- diffusion_loss: the forward leaves output - target behind, in output's dtype; the backward scales it


def _loss_empty(output, x0, t, table, noise, seed, sample_id, step_id, stream, with_residual):
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    loss = torch.empty(output.shape[0], dtype=dtype, device=output.device)
    return loss, _like(output) if with_residual else output.new_empty(0)


def _loss(output, x0, t, table, noise, seed, sample_id, step_id, stream, with_residual):
    loss, residual = _loss_empty(output, x0, t, table, noise, seed, sample_id, step_id, stream, with_residual)
    z = _noise(noise, seed, sample_id, step_id, stream)
    run = backend.kernel("diffusion_loss", output.device, *_dtypes(output, x0, noise))
    rows = _coefficients(table, output, x0)
    run(dense(output), dense(x0), t.contiguous(), rows, z, residual if with_residual else None, loss)
    return loss, residual


def _loss_backward_run(stored, scale):
    grad = _like(stored)
    run = backend.kernel("loss_backward", stored.device, stored.dtype)
    run(dense(stored), scale.contiguous(), grad)
    return grad


def _loss_setup(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2], inputs[3])
    # The residual gets no gradient; without this a zero one of the image's size is made for it every time.
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, grad_loss, _):
    if grad_loss is None:
        return (None,) * 10
    residual, t, table = ctx.saved_tensors
    elements = residual[0].numel() if residual.shape[0] else 1
    scale = grad_loss * table[t, 2].to(grad_loss.dtype) * (2.0 / elements)
    return (torch.ops.ddpm_fast.loss_backward(residual, scale[:, None]), *[None] * 9)


_register(
    f"diffusion_loss(Tensor output, Tensor x0, Tensor t, Tensor table, {_NOISE}, bool with_residual) "
    "-> (Tensor, Tensor)",
    _loss,
    _loss_empty,
)
_register(
    "loss_backward(Tensor stored, Tensor scale) -> Tensor", _loss_backward_run, lambda stored, scale: _like(stored)
)
_differentiable("diffusion_loss", _loss_setup, _loss_backward)


# --- hybrid_loss and vlb_terms: the forward leaves derivatives of about 1 behind, and factors [N, groups] that make
# gradients of them


def _bound_empty(output, x0, with_gradient):
    """(gradient, factors)"""
    dtype = reference.working_dtype(output)
    groups = 2 if output.shape[1] > x0.shape[1] else 1
    factors = torch.empty((output.shape[0], groups), dtype=dtype, device=output.device)
    return _like(output) if with_gradient else output.new_empty(0), factors


def _bound_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[-2:])
    # Neither what is stored nor a metric gets a gradient; without this zero ones are made of them every time.
    ctx.set_materialize_grads(False)


def _bound_backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 10
    gradient, factors = ctx.saved_tensors
    return (torch.ops.ddpm_fast.loss_backward(gradient, grad_loss[:, None] * factors), *[None] * 9)


def _hybrid_empty(output, x0, t, table, noise, seed, sample_id, step_id, stream, with_gradient):
    loss = torch.empty(output.shape[0], dtype=reference.working_dtype(output), device=output.device)
    return loss, *_bound_empty(output, x0, with_gradient)


def _hybrid(output, x0, t, table, noise, seed, sample_id, step_id, stream, with_gradient):
    loss, gradient, factors = _hybrid_empty(
        output, x0, t, table, noise, seed, sample_id, step_id, stream, with_gradient
    )
    z = _noise(noise, seed, sample_id, step_id, stream)
    backend.kernel("hybrid_loss", output.device, *_dtypes(output, x0, noise))(
        *(dense(output), dense(x0), t.contiguous(), _coefficients(table, output, x0), z),
        *(gradient if with_gradient else None, loss, factors),
    )
    return loss, gradient, factors


_register(
    f"hybrid_loss(Tensor output, Tensor x0, Tensor t, Tensor table, {_NOISE}, bool with_gradient) "
    "-> (Tensor, Tensor, Tensor)",
    _hybrid,
    _hybrid_empty,
)
_differentiable("hybrid_loss", _bound_setup, _bound_backward)


def _vlb_empty(output, x0, t, table, noise, seed, sample_id, step_id, stream, with_gradient):
    bits, gradient, factors = _hybrid_empty(
        output, x0, t, table, noise, seed, sample_id, step_id, stream, with_gradient
    )
    return bits, torch.empty_like(bits), gradient, factors


def _vlb(output, x0, t, table, noise, seed, sample_id, step_id, stream, with_gradient):
    bits, mse_x0, gradient, factors = _vlb_empty(
        output, x0, t, table, noise, seed, sample_id, step_id, stream, with_gradient
    )
    z = _noise(noise, seed, sample_id, step_id, stream)
    backend.kernel("vlb_terms", output.device, *_dtypes(output, x0, noise))(
        *(dense(output), dense(x0), t.contiguous(), _coefficients(table, output, x0), z),
        *(gradient if with_gradient else None, bits, mse_x0, factors),
    )
    return bits, mse_x0, gradient, factors


_register(
    f"vlb_terms(Tensor output, Tensor x0, Tensor t, Tensor table, {_NOISE}, bool with_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _vlb,
    _vlb_empty,
)
_differentiable("vlb_terms", _bound_setup, _bound_backward)


# --- reverse_step: x0 and x_model are empty where they are not wanted


def _step_empty(x_t, output, x0_previous, table, step, noise, seed, sample_id, step_id, stream, with_x0, model_dtype):
    x0_dtype = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    return (
        _like(x_t),
        _like(x_t, x0_dtype) if with_x0 else x_t.new_empty(0, dtype=x0_dtype),
        x_t.new_empty(0) if model_dtype is None else _like(x_t, model_dtype),
    )


def _step(x_t, output, x0_previous, table, step, noise, seed, sample_id, step_id, stream, with_x0, model_dtype):
    x, x0, x_model = _step_empty(
        x_t, output, x0_previous, table, step, noise, seed, sample_id, step_id, stream, with_x0, model_dtype
    )
    z = _noise(noise, seed, sample_id, step_id, stream)
    backend.kernel("reverse_step", x_t.device, *_dtypes(x_t, output, x0_previous, noise, x_model))(
        *(dense(x_t), dense(output), None if x0_previous is None else dense(x0_previous)),
        *(_coefficients(table, x_t, output), step, z),
        *(x, x0 if with_x0 else None, None if model_dtype is None else x_model),
    )
    return x, x0, x_model


def _step_setup(ctx, inputs, output):
    x_t, model_output, x0_previous, table, step, *noise = inputs[:9]
    ctx.save_for_backward(x_t, model_output, table, step, *noise)
    ctx.stream = inputs[9]
    ctx.previous_dtype = None if x0_previous is None else x0_previous.dtype
    ctx.with_x0, ctx.model_dtype = inputs[10], inputs[11]
    ctx.set_materialize_grads(False)


def _step_backward(ctx, grad_x, grad_x0, grad_model):
    x_t, output, table, step, *noise = ctx.saved_tensors
    dtype, channels = reference.working_dtype(x_t, output), x_t.shape[1]
    a_x, a_out, b_x, b_x0, b_previous, sigma, clip, spread = reference.row_of(table, step).to(dtype).unbind()
    zeros = x_t.new_zeros((), dtype=dtype)
    grad = zeros if grad_x is None else grad_x.to(dtype)
    if ctx.model_dtype is not None and grad_model is not None:
        grad = grad + grad_model.to(dtype)
    through_x0 = grad * b_x0
    if ctx.with_x0 and grad_x0 is not None:
        through_x0 = through_x0 + grad_x0
    unclipped = (a_x * x_t.to(dtype) + a_out * output[:, :channels].to(dtype)).abs() <= clip
    through_x0 = torch.where(unclipped, through_x0, zeros)
    grad_x_t = (grad * b_x + through_x0 * a_x).to(x_t.dtype)
    grad_previous = None
    if ctx.previous_dtype is not None:
        grad_previous = (grad * b_previous).to(ctx.previous_dtype).expand_as(x_t)
    grad_output = through_x0 * a_out
    if output.shape[1] > channels:
        z = reference.draw(_noise(*noise, ctx.stream), x_t, dtype)
        deviation = sigma * torch.exp(spread * output[:, channels:].to(dtype))
        # As in the forward, a step without noise ignores what is in it, and one without spread what is in v.
        grad_v = torch.where((sigma == 0) | (spread == 0), zeros, grad * spread * deviation * z)
        grad_output = torch.cat([grad_output, grad_v], 1)
    return grad_x_t, grad_output.to(output.dtype), grad_previous, *[None] * 9


_register(
    f"reverse_step(Tensor x_t, Tensor output, Tensor? x0_previous, Tensor table, Tensor step, {_NOISE}, bool with_x0, "
    "ScalarType? model_dtype) -> (Tensor, Tensor, Tensor)",
    _step,
    _step_empty,
)
_differentiable("reverse_step", _step_setup, _step_backward)


# --- reverse_step_: the same kernels with x and x0 as inputs and outputs both. An element is read before it is written,
# once, and by the same thread: that is all that a kernel of reverse_step has to promise for this.


def _step_in_place(x, output, x0, x_model, table, step, noise, seed, sample_id, step_id, stream):
    z = _noise(noise, seed, sample_id, step_id, stream)
    backend.kernel("reverse_step", x.device, *_dtypes(x, output, x0, noise, x_model))(
        *(x, dense(output), x0, _coefficients(table, x, output), step, z),
        *(x, x0, x_model),
    )


_register(
    f"reverse_step_(Tensor(a!) x, Tensor output, Tensor(b!)? x0, Tensor(c!)? x_model, Tensor table, Tensor step, "
    f"{_NOISE}) -> ()",
    _step_in_place,
    lambda *_: None,
)


# --- winograd: a 3x3 convolution of CPU images, by filters that were transformed before; without a gradient


def _winograd_empty(x, filters, bias, out_channels):
    shape = (x.shape[0], out_channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _winograd(x, filters, bias, out_channels):
    from ddpm_fast.ops import native  # which imports this module

    return native.winograd(x, filters, bias, out_channels)


_register("winograd(Tensor x, Tensor filters, Tensor? bias, SymInt out_channels) -> Tensor", _winograd, _winograd_empty)


# --- group_norm: of CPU images, with what is done around a norm in a U-Net. The statistics are kept for the backward


def _norm_empty(x, weight, bias, scale, shift, added, groups, eps, silu):
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, x.new_empty(x.shape[0], groups, 2, dtype=torch.float64)


def _norm(x, weight, bias, scale, shift, added, groups, eps, silu):
    from ddpm_fast.ops import native

    x = x.contiguous(memory_format=torch.channels_last)
    return native.group_norm(x, weight, bias, scale, shift, added, groups, eps, silu)


def _norm_backward_empty(grad, x, weight, bias, scale, shift, added, statistics, silu):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, x.new_empty(3, *x.shape[:2], dtype=torch.float64)


def _norm_backward_run(grad, x, weight, bias, scale, shift, added, statistics, silu):
    from ddpm_fast.ops import native

    grad, x = (image.contiguous(memory_format=torch.channels_last) for image in (grad, x))
    return native.group_norm_backward(grad, x, weight, bias, scale, shift, added, statistics, silu)


def _norm_setup(ctx, inputs, output):
    *tensors, _groups, _eps, ctx.silu = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    x, weight, bias, scale, shift, added, statistics = ctx.saved_tensors
    dx, sums = torch.ops.ddpm_fast.group_norm_backward(grad, x, weight, bias, scale, shift, added, statistics, ctx.silu)
    sum_g, sum_gn, sum_dx = sums
    by_sample = sums[:2] if scale is None else sums[:2] * (1 + scale.double())
    grad_bias, grad_weight = by_sample.sum(1)
    grad_scale = None if scale is None else weight * sum_gn + bias * sum_g
    grad_shift = None if shift is None else sum_g
    grad_added = None if added is None else sum_dx
    return dx, grad_weight, grad_bias, grad_scale, grad_shift, grad_added, None, None, None


def _norm_second_backward(ctx, *grads):
    raise RuntimeError("the CPU's group norm has no second derivative: run the model within use_backend('reference')")


_NORM = "Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor? added"
_register(f"group_norm(Tensor x, {_NORM}, int groups, float eps, bool silu) -> (Tensor, Tensor)", _norm, _norm_empty)
_register(
    f"group_norm_backward(Tensor grad, Tensor x, {_NORM}, Tensor statistics, bool silu) -> (Tensor, Tensor)",
    _norm_backward_run,
    _norm_backward_empty,
)
_differentiable("group_norm", _norm_setup, _norm_backward)
_differentiable("group_norm_backward", lambda ctx, inputs, output: None, _norm_second_backward)
