"""The fused ops: what each does, its checks, and nothing of how. Use them inside any training or sampling loop.

Images are [N, C, ...] with any number of trailing dimensions. Storage is uint8 (x0 only: pixels 0..255 mean -1..1),
fp32, bf16 or fp16; arithmetic is fp32, rounded once. float64 runs on the `reference` backend, in float64. Contiguous
and channels_last tensors are read in place; any other strides are copied first. `noise` is a tensor shaped like x0, or
a NoiseKey, in which case it is drawn on the way and never stored. Everything the kernels index with (tables, t,
step, seed) lives on the images' device, so that no call waits for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.noise import MAX_ELEMENTS, NoiseKey
from ddpm_fast.ops import registry  # defines torch.ops.ddpm_fast.*
from ddpm_fast.ops.dispatch import active_backend, backend_status, cannot_run_on, use_backend

__all__ = [
    "ReverseStep",
    "VlbTerms",
    "active_backend",
    "backend_status",
    "cannot_run_on",
    "diffusion_loss",
    "hybrid_loss",
    "normal",
    "q_sample",
    "reverse_step",
    "reverse_step_",
    "use_backend",
    "vlb_terms",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ops = torch.ops.ddpm_fast


class ReverseStep(NamedTuple):
    """What a sampler's step gives: the next state, and where asked for the predicted x0 and the network's copy."""

    x: Tensor
    x0: Tensor | None
    x_model: Tensor | None


class VlbTerms(NamedTuple):
    """The variational bound's term at each sample's t, [N] each."""

    bits_per_dim: Tensor
    mse_x0: Tensor


def normal(
    key: NoiseKey,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Standard normals [N, *shape] of the samples that `key` names, the same numbers on every device and backend.

    Raises InputError for a shape that is negative or beyond 2^34 elements a sample, or a dtype that is no float.
    """
    if dtype not in FLOATS:
        raise InputError(f"normal: dtype is {dtype}; expected one of {', '.join(map(str, FLOATS))}")
    if any(size < 0 for size in shape):
        raise InputError(f"normal: shape {tuple(shape)} has a negative size")
    full = (key.sample_id.shape[0], *shape)
    channels_last = memory_format in (torch.channels_last, torch.channels_last_3d)
    if channels_last and len(full) not in (4, 5):
        raise InputError(f"normal: channels_last needs samples of shape [C, H, W] or [C, D, H, W], not {tuple(shape)}")
    _check_elements("normal", full)
    return _ops.normal(key.seed, key.sample_id, key.step, key.stream, list(full), dtype, channels_last)


def q_sample(
    x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey, dtype: torch.dtype | None = None
) -> Tensor:
    """x_t = table[t, 0] x0 + table[t, 1] eps: the forward process in closed form (Ho et al. 2020, eq. 4).

    x0: [N, C, ...] uint8 or float. t: int64 [N]. table: fp32 [T, 2], Schedule.q_sample_table(). noise: eps like x0,
    or a NoiseKey. dtype of the result: x0's, or fp32 for uint8. Differentiable in x0 and in a given noise.
    Raises InputError for shapes, dtypes or devices that do not fit, and on the CPU for t outside 0..T-1.
    """
    _check_image("q_sample", "x0", x0, (*FLOATS, torch.uint8))
    _check_steps("q_sample", x0, t, table, columns=2)
    dtype = dtype or (torch.float32 if x0.dtype == torch.uint8 else x0.dtype)
    if dtype not in FLOATS:
        raise InputError(f"q_sample: dtype is {dtype}; expected one of {', '.join(map(str, FLOATS))}")
    return _ops.q_sample(x0, t, table, *_noise_arguments("q_sample", noise, x0), dtype)


def diffusion_loss(output: Tensor, x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey) -> Tensor:
    """The regression loss of each sample: weight_t * mean((output - target)^2), fp32 [N] (Ho et al. 2020, eq. 14).

    The target is linear in x0 and the noise, which covers every prediction: table [T, 3] (Objective.loss_table) holds
    target = table[t, 0] x0 + table[t, 1] eps and weight = table[t, 2]. output: float [N, C, ...], the network's;
    x0, t, noise as for q_sample. One pass computes the loss and keeps output - target, in output's dtype, for the
    gradient with respect to output; x0 and noise get none. float64 output: float64 loss.
    Raises InputError for shapes, dtypes or devices that do not fit, and on the CPU for t outside 0..T-1.
    """
    _check_loss("diffusion_loss", output, x0, t, table, columns=3)
    _check_like("diffusion_loss", "x0", x0, "output", output)
    with_residual = output.requires_grad and torch.is_grad_enabled()
    loss, _ = _ops.diffusion_loss(output, x0, t, table, *_noise_arguments("diffusion_loss", noise, x0), with_residual)
    return loss


def hybrid_loss(output: Tensor, x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey) -> Tensor:
    """L_hybrid of each sample for a learned variance, fp32 [N] (Nichol & Dhariwal 2021, eq. 16).

    The regression loss of diffusion_loss plus a multiple of the variational bound's term at t in bits/dim, whose
    gradient reaches the variance alone. output: float [N, 2C, ...], the prediction and then v, which sets the variance;
    x0 [N, C, ...], t, noise as for q_sample; table: fp32 [T, 11], Objective.hybrid_table. One pass computes the loss
    and keeps what its gradient with respect to output needs, in output's dtype; x0 and noise get none.
    Raises InputError for shapes, dtypes or devices that do not fit, and on the CPU for t outside 0..T-1.
    """
    _check_loss("hybrid_loss", output, x0, t, table, columns=11)
    _check_groups("hybrid_loss", output, x0, (2,))
    with_gradient = output.requires_grad and torch.is_grad_enabled()
    loss, *_ = _ops.hybrid_loss(output, x0, t, table, *_noise_arguments("hybrid_loss", noise, x0), with_gradient)
    return loss


def vlb_terms(output: Tensor, x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey) -> VlbTerms:
    """The variational bound's term at each sample's t in bits/dim (Ho et al. 2020, eq. 5 and 13), fp32 [N]: the KL
    divergence of the posterior from the model's step, or at t = 0 the negative log likelihood of x_0 given x_1.

    output: float [N, C, ...], or [N, 2C, ...] with a learned variance; x0, t, noise as for q_sample; table: fp32
    [T, 9], Objective.bound_table. mse_x0 is the mean squared error of the predicted x_0 (clipped as the table says);
    that of eps is SNR_t times it. bits_per_dim is differentiable in output (in one pass too), mse_x0 is not.
    Raises InputError for shapes, dtypes or devices that do not fit, and on the CPU for t outside 0..T-1.
    """
    _check_loss("vlb_terms", output, x0, t, table, columns=9)
    _check_groups("vlb_terms", output, x0, (1, 2))
    with_gradient = output.requires_grad and torch.is_grad_enabled()
    bits, mse_x0, *_ = _ops.vlb_terms(output, x0, t, table, *_noise_arguments("vlb_terms", noise, x0), with_gradient)
    return VlbTerms(bits, mse_x0.detach())


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

    x_t: float [N, C, ...]. output: the same shape, out; or [N, 2C, ...], out and then v, which sets a learned variance.
    table: fp32 [S, 8] with columns a_x, a_out, b_x, b_x0, b_previous, sigma, clip (x0 is held to [-clip, clip];
    infinity for no clipping), spread (0: v is not read; it must be 0 where there is no v). step: int64 scalar tensor.
    noise: z, or a NoiseKey; a row whose sigma is 0 draws none. x is in x_t's dtype; model_dtype asks for a second copy
    of it in the dtype the network reads, return_x0 for x0 in fp32. Differentiable in x_t, output and x0_previous.
    Raises InputError for shapes, dtypes or devices that do not fit, and on the CPU for a step outside the table.
    """
    _check_reverse_step("reverse_step", "x_t", x_t, output, table, step)
    if x0_previous is not None:
        _check_image("reverse_step", "x0_previous", x0_previous, FLOATS)
        _check_like("reverse_step", "x0_previous", x0_previous, "x_t", x_t)
    if model_dtype is not None and model_dtype not in FLOATS:
        raise InputError(f"reverse_step: model_dtype is {model_dtype}; expected one of {', '.join(map(str, FLOATS))}")
    x, x0, x_model = _ops.reverse_step(
        *(x_t, output, x0_previous, table, step),
        *_noise_arguments("reverse_step", noise, x_t),
        *(return_x0, model_dtype),
    )
    return ReverseStep(x, x0 if return_x0 else None, x_model if model_dtype is not None else None)


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
    """reverse_step in place, for loops whose tensors stay where they are, as in a CUDA graph: x becomes the next state.

    x0: fp32 (float64 with x), x0_previous on the way in and the predicted x_0 on the way out; None if the table never
    looks back. x_model: any float, gets the copy that the network reads. Both are shaped like x. All else as for
    reverse_step; the output may be x itself. There is no gradient.
    Raises InputError where reverse_step does, for an x, x0 or x_model that is neither contiguous nor channels_last, and
    where a gradient would be lost.
    """
    _check_reverse_step("reverse_step_", "x", x, output, table, step)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor, dtypes in (("x", x, FLOATS), ("x0", x0, (wide,)), ("x_model", x_model, FLOATS)):
        if tensor is None:
            continue
        _check_image("reverse_step_", name, tensor, dtypes)
        _check_like("reverse_step_", name, tensor, "x", x)
        if registry.dense(tensor) is not tensor:
            raise InputError(
                f"reverse_step_: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected a "
                "contiguous or channels_last tensor, which it can write to: make it so once, beforehand"
            )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, output, x0, x_model)):
        raise InputError("reverse_step_ has no gradient: use reverse_step, or torch.no_grad()")
    _ops.reverse_step_(x, output, x0, x_model, table, step, *_noise_arguments("reverse_step_", noise, x))


def _check_image(op: str, name: str, image: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if image.dtype not in dtypes:
        raise InputError(f"{op}: {name} is {image.dtype}; expected one of {', '.join(map(str, dtypes))}")
    if image.ndim < 2:
        raise InputError(f"{op}: {name} has shape {tuple(image.shape)}; expected [N, C, ...]")
    _check_elements(op, image.shape)


def _check_reverse_step(op: str, name: str, x: Tensor, output: Tensor, table: Tensor, step: Tensor) -> None:
    _check_image(op, name, x, FLOATS)
    _check_image(op, "output", output, FLOATS)
    _check_groups(op, output, x, (1, 2), name)
    _check_table(op, table, 8, x.device)
    if step.dtype != torch.int64 or step.ndim != 0 or step.device != x.device:
        raise InputError(
            f"{op}: step is {step.dtype} of shape {tuple(step.shape)} on {step.device}; "
            f"expected an int64 scalar tensor on {x.device}"
        )


def _check_loss(op: str, output: Tensor, x0: Tensor, t: Tensor, table: Tensor, columns: int) -> None:
    _check_image(op, "output", output, FLOATS)
    _check_image(op, "x0", x0, (*FLOATS, torch.uint8))
    _check_steps(op, output, t, table, columns)
    if output[0:1].numel() == 0 and output.shape[0] > 0:
        raise InputError(f"{op}: samples of shape {tuple(output.shape[1:])} have no elements to average over")


def _check_groups(op: str, output: Tensor, image: Tensor, allowed: tuple[int, ...], name: str = "x0") -> None:
    """Raises InputError unless output has the image's shape, or with 2 allowed twice its channels, on its device."""
    shapes = [(image.shape[0], groups * image.shape[1], *image.shape[2:]) for groups in allowed]
    if tuple(output.shape) not in shapes:
        raise InputError(
            f"{op}: output has shape {tuple(output.shape)} and {name} {tuple(image.shape)}; expected an output of "
            f"{' or '.join(map(str, shapes))} (twice the channels: the prediction, then what sets a learned variance)"
        )
    if output.device != image.device:
        raise InputError(f"{op}: output is on {output.device} and {name} on {image.device}; they must share one")


def _check_elements(op: str, shape: tuple[int, ...]) -> None:
    elements = 1
    for size in shape[1:]:
        elements *= size
    if elements > MAX_ELEMENTS:
        raise InputError(f"{op}: a sample of {elements} elements; the noise's counter reaches {MAX_ELEMENTS}")


def _check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise InputError(
            f"{op}: {name} has shape {tuple(tensor.shape)} and {other_name} {tuple(other.shape)}; they must be equal"
        )
    if tensor.device != other.device:
        raise InputError(f"{op}: {name} is on {tensor.device} and {other_name} on {other.device}; they must share one")


def _check_table(op: str, table: Tensor, columns: int, device: torch.device) -> None:
    if table.ndim != 2 or table.shape[1] != columns or table.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"{op}: table is {table.dtype} of shape {tuple(table.shape)}; expected float32 [rows, {columns}]"
        )
    if table.device != device:
        raise InputError(f"{op}: table is on {table.device} and the images on {device}; move it there once, beforehand")


def _check_steps(op: str, image: Tensor, t: Tensor, table: Tensor, columns: int) -> None:
    _check_table(op, table, columns, image.device)
    if t.dtype != torch.int64 or t.shape != image.shape[:1]:
        raise InputError(
            f"{op}: t is {t.dtype} of shape {tuple(t.shape)}; expected int64 [{image.shape[0]}], one a sample"
        )
    if t.device != image.device:
        raise InputError(f"{op}: t is on {t.device} and the images on {image.device}; they must share one")


def _noise_arguments(op: str, noise: Tensor | NoiseKey, image: Tensor) -> tuple:
    """(noise, seed, sample_id, step, stream) as the registered ops take them."""
    if isinstance(noise, NoiseKey):
        if noise.sample_id.shape[0] != image.shape[0]:
            raise InputError(
                f"{op}: the NoiseKey names {noise.sample_id.shape[0]} samples and the batch has {image.shape[0]}"
            )
        if noise.seed.device != image.device:
            raise InputError(f"{op}: the NoiseKey is on {noise.seed.device} and the images on {image.device}")
        return None, noise.seed, noise.sample_id, noise.step, noise.stream
    if not isinstance(noise, Tensor):
        raise InputError(f"{op}: noise is a {type(noise).__name__}; expected a tensor or a NoiseKey")
    _check_image(op, "noise", noise, FLOATS)
    _check_like(op, "noise", noise, "the image", image)
    return noise, None, None, None, 0
