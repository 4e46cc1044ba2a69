"""One step of any sampler: `reverse_step`, and in place `reverse_step_`."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.checks import (
    check_dtype,
    check_groups,
    check_image,
    check_like,
    check_noise,
    check_table,
    check_tensors,
)
from ddpm_fast.ops.declare import Gradient, declare, kernel_for
from ddpm_fast.ops.direct import on_cpu
from ddpm_fast.ops.tensors import (
    FLOATS,
    ReverseStep,
    coefficients,
    dense,
    dense_noise,
    draw,
    like,
    pack_noise,
    row_of,
    working_dtype,
)


def _check_step(
    op: str, name: str, x: Tensor, output: Tensor, table: Tensor, step: Tensor, noise: Tensor | NoiseKey
) -> None:
    check_image(op, name, x)
    check_image(op, "output", output)
    check_groups(op, output, x, (1, 2), name)
    check_table(op, table, 8, x.device)
    if step.dtype != torch.int64 or step.ndim != 0 or step.device != x.device:
        raise InputError(
            f"{op}: step is {step.dtype} of shape {tuple(step.shape)} on {step.device}; "
            f"expected an int64 scalar tensor on {x.device}"
        )
    check_noise(op, noise, x)


# --- reverse_step: x0 and x_model are empty where they are not wanted


def reverse_step(
    x_t: Tensor,
    output: Tensor,
    table: Tensor,
    step: Tensor,
    noise: Tensor | NoiseKey,
    *,
    x0_previous: Tensor | None = None,
    return_x0: bool = False,
    model_dtype: torch.dtype | None = None,
) -> ReverseStep:
    """One step of any sampler (Ho et al. 2020, alg. 2, and its successors), by row `step` of its table.

        x0 = clip(a_x x_t + a_out out);   x = b_x x_t + b_x0 x0 + b_previous x0_previous + sigma e^(spread v) z

    Differentiable in x_t, output and x0_previous.

    Args:
        x_t: float [N, C, ...], the state.
        output: [N, C, ...], the network's `out`; or [N, 2C, ...], `out` and then v, which sets a learned variance.
        table: fp32 [S, 8] with columns a_x, a_out, b_x, b_x0, b_previous, sigma, clip (x0 is held to [-clip, clip];
            infinity for no clipping), spread (0: v is not read; it must be 0 where there is no v).
        step: int64 scalar tensor, the row.
        noise: z, shaped like x_t, or a NoiseKey of N samples. A row whose sigma is 0 draws none.
        x0_previous: float [N, C, ...], the x0 of the step before, for rows that look back.
        return_x0: asks for x0.
        model_dtype: asks for a second copy of x in the dtype that the network reads.

    Returns:
        x in x_t's dtype; x0 in fp32 (float64 for a float64 x_t) or None; the copy or None.

    Raises:
        InputError: shapes, dtypes or devices do not fit; on the CPU also for a step outside the table.
    """
    if (direct := on_cpu()) is not None:
        done = direct.reverse_step(x_t, output, x0_previous, table, step, noise, return_x0, model_dtype)
        if done is not None:
            return ReverseStep(*done)
    if not all(isinstance(given, Tensor) for given in (x_t, output, table, step)):
        check_tensors("reverse_step", x_t=x_t, output=output, table=table, step=step)
    if x0_previous is not None and not isinstance(x0_previous, Tensor):
        check_tensors("reverse_step", x0_previous=x0_previous)
    x, x0, x_model = _call_reverse_step(x_t, output, x0_previous, table, step, noise, return_x0, model_dtype)
    return ReverseStep(x, x0 if return_x0 else None, x_model if model_dtype is not None else None)


def _reverse_step_empty(x_t, output, x0_previous, table, step, noise, with_x0, model_dtype):
    _check_step("reverse_step", "x_t", x_t, output, table, step, noise)
    if x0_previous is not None:
        check_image("reverse_step", "x0_previous", x0_previous)
        check_like("reverse_step", "x0_previous", x0_previous, "x_t", x_t)
    if model_dtype is not None:
        check_dtype("reverse_step", "model_dtype", model_dtype)
    x0_dtype = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    return (
        like(x_t),
        like(x_t, x0_dtype) if with_x0 else x_t.new_empty(0, dtype=x0_dtype),
        x_t.new_empty(0) if model_dtype is None else like(x_t, model_dtype),
    )


def _reverse_step(x_t, output, x0_previous, table, step, noise, with_x0, model_dtype):
    x, x0, x_model = _reverse_step_empty(x_t, output, x0_previous, table, step, noise, with_x0, model_dtype)
    run = kernel_for("reverse_step", x_t, output, x0_previous, noise, x_model)
    run(
        dense(x_t),
        dense(output),
        None if x0_previous is None else dense(x0_previous),
        coefficients(table, x_t, output),
        step,
        dense_noise(noise),
        ReverseStep(x, x0 if with_x0 else None, None if model_dtype is None else x_model),
    )
    return x, x0, x_model


def _reverse_step_save(ctx, inputs, outputs):
    *noise, ctx.stream = inputs.noise_parts
    ctx.save_for_backward(inputs.x_t, inputs.output, inputs.table, inputs.step, *noise)
    ctx.previous_dtype = None if inputs.x0_previous is None else inputs.x0_previous.dtype
    ctx.with_x0, ctx.model_dtype = inputs.with_x0, inputs.model_dtype
    ctx.set_materialize_grads(False)


def _reverse_step_backward(ctx, grad_x, grad_x0, grad_model):
    x_t, output, table, step, *noise = ctx.saved_tensors
    dtype, channels = working_dtype(x_t, output), x_t.shape[1]
    a_x, a_out, b_x, b_x0, b_previous, sigma, clip, spread = row_of(table, step).to(dtype).unbind()
    zeros = x_t.new_zeros((), dtype=dtype)
    grad = zeros if grad_x is None else grad_x.to(dtype)
    if ctx.model_dtype is not None and grad_model is not None:
        grad = grad + grad_model.to(dtype)
    through_x0 = grad * b_x0
    if ctx.with_x0 and grad_x0 is not None:
        through_x0 = through_x0 + grad_x0
    unclipped = (a_x * x_t.to(dtype) + a_out * output[:, :channels].to(dtype)).abs() <= clip
    through_x0 = torch.where(unclipped, through_x0, zeros)
    grad_previous = None
    if ctx.previous_dtype is not None:
        grad_previous = (grad * b_previous).to(ctx.previous_dtype).expand_as(x_t)
    grad_output = through_x0 * a_out
    if output.shape[1] > channels:
        z = draw(pack_noise(*noise, ctx.stream), x_t, dtype)
        deviation = sigma * torch.exp(spread * output[:, channels:].to(dtype))
        # As in the forward, a step without noise ignores what is in it, and one without spread what is in v.
        grad_v = torch.where((sigma == 0) | (spread == 0), zeros, grad * spread * deviation * z)
        grad_output = torch.cat([grad_output, grad_v], 1)
    return {
        "x_t": (grad * b_x + through_x0 * a_x).to(x_t.dtype),
        "output": grad_output.to(output.dtype),
        "x0_previous": grad_previous,
    }


_call_reverse_step = declare(
    "reverse_step(Tensor x_t, Tensor output, Tensor? x0_previous, Tensor table, Tensor step, NOISE, bool with_x0, "
    "ScalarType? model_dtype) -> (Tensor, Tensor, Tensor)",
    run=_reverse_step,
    shapes=_reverse_step_empty,
    gradient=Gradient(("x_t", "output", "x0_previous"), _reverse_step_save, _reverse_step_backward),
)


# --- reverse_step_: the same kernels with x and x0 as inputs and outputs both. An element is read before it is written,
# once, and by the same thread: that is all that a kernel of reverse_step has to promise for this.


def reverse_step_(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    step: Tensor,
    noise: Tensor | NoiseKey,
    *,
    x0: Tensor | None = None,
    x_model: Tensor | None = None,
) -> None:
    """reverse_step in place: x becomes the next state.

    For loops whose tensors stay where they are, as in a CUDA graph. There is no gradient. Arguments that are not listed
    are those of reverse_step.

    Args:
        x: float [N, C, ...], contiguous or channels_last; read and written.
        output: as for reverse_step; it may be x itself.
        x0: fp32 (float64 with a float64 x), shaped like x: x0_previous on the way in and the predicted x_0 on the way
            out. None if the table never looks back.
        x_model: any float, shaped like x: gets the copy that the network reads.

    Raises:
        InputError: where reverse_step raises it; for an x, x0 or x_model that is neither contiguous nor channels_last;
            and where a gradient would be lost.
    """
    if (direct := on_cpu()) is not None and direct.reverse_step_(x, output, x0, x_model, table, step, noise):
        _tell_of_writes(x, x0, x_model)
        return
    if not all(isinstance(given, Tensor) for given in (x, output, table, step)):
        check_tensors("reverse_step_", x=x, output=output, table=table, step=step)
    given = [x, output, *(tensor for tensor in (x0, x_model) if tensor is not None)]
    if not all(isinstance(tensor, Tensor) for tensor in given):
        check_tensors("reverse_step_", **{k: v for k, v in (("x0", x0), ("x_model", x_model)) if v is not None})
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        raise InputError("reverse_step_ has no gradient: use reverse_step, or torch.no_grad()")
    _call_reverse_step_in_place(x, output, x0, x_model, table, step, noise)


def _tell_of_writes(*written: Tensor | None) -> None:
    """torch does not see the kernels' writes. A backward that saved one of the tensors before has to."""
    torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])


def _check_reverse_step_in_place(x, output, x0, x_model, table, step, noise):
    _check_step("reverse_step_", "x", x, output, table, step, noise)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor, dtypes in (("x", x, FLOATS), ("x0", x0, (wide,)), ("x_model", x_model, FLOATS)):
        if tensor is None:
            continue
        check_dtype("reverse_step_", name, tensor.dtype, dtypes)
        check_like("reverse_step_", name, tensor, "x", x)
        if dense(tensor) is not tensor:
            raise InputError(
                f"reverse_step_: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected a "
                "contiguous or channels_last tensor, which it can write to: make it so once, beforehand"
            )


def _check_apart(written: dict[str, Tensor | None], read: dict[str, Tensor]) -> None:
    """No tensor that is written shares memory with another one, except that the output may be x itself.

    All are dense: what is read is as the kernels read it.
    """
    known: list[tuple[str, Tensor, int, int]] = []
    for name, tensor in (written | read).items():
        if tensor is None:
            continue
        start = tensor.data_ptr()
        end = start + tensor.nbytes
        for other, memory, first, last in known:
            if start < last and first < end and not (name == "output" and other == "x" and _is_same(tensor, memory)):
                raise InputError(
                    f"reverse_step_: {name} shares memory with {other}, which is written to: give it memory of its own "
                    "(only the output may be x itself)"
                )
        if name in written:
            known.append((name, tensor, start, end))


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that share memory have each element in the same place."""
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def _reverse_step_in_place(x, output, x0, x_model, table, step, noise):
    _check_reverse_step_in_place(x, output, x0, x_model, table, step, noise)
    output, table, noise = dense(output), coefficients(table, x, output), dense_noise(noise)
    if isinstance(noise, NoiseKey):
        noises = {"seed": noise.seed, "sample_id": noise.sample_id, "step_id": noise.step}
    else:
        noises = {"noise": noise}
    _check_apart({"x": x, "x0": x0, "x_model": x_model}, {"output": output, "table": table, "step": step, **noises})
    run = kernel_for("reverse_step", x, output, x0, noise, x_model)
    run(x, output, x0, table, step, noise, ReverseStep(x, x0, x_model))
    _tell_of_writes(x, x0, x_model)


_call_reverse_step_in_place = declare(
    "reverse_step_(Tensor(a!) x, Tensor output, Tensor(b!)? x0, Tensor(c!)? x_model, Tensor table, Tensor step, NOISE) "
    "-> ()",
    run=_reverse_step_in_place,
    shapes=_check_reverse_step_in_place,
)
