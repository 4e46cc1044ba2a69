"""The ops in plain torch, on any device: the oracle that every kernel is tested against, and the fallback.

Arithmetic is fp32 (float64 where an image is float64), operation for operation as in csrc/*.h, so that in fp32 the
results are the same bits as the kernels'. The exceptions are exp, log and tanh, which are torch's own here, and the
network's ops.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.backends import reference_draws, reference_network
from ddpm_fast.ops.tensors import (
    FLOATS,
    ReverseStep,
    VlbTerms,
    check_rows,
    draw,
    per_sample,
    row_of,
    widen,
    working_dtype,
)
from ddpm_fast.wide import wide

DTYPES = (*FLOATS, torch.uint8)  # uint8 as x0 alone
unavailable = ""


def refusal(device: torch.device) -> str:
    """Plain torch runs on every device."""
    return ""


def normal(key: NoiseKey, out: Tensor) -> None:
    if not out.numel():
        return
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


class BoundTerm(NamedTuple):
    """The bound's term at one t per element, in nats, and its derivatives by the error of x_0 and by log Sigma."""

    nats: Tensor
    by_error: Tensor
    by_log_variance: Tensor


def kl_term(pull: Tensor, error: Tensor, d: Tensor) -> BoundTerm:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) [H eq. 5], for log variances that differ by d: see csrc/bound.h."""
    shrink = torch.exp(-d)
    # e^-d - 1 + d. Near 0 by its series: late in the chain d is about 1e-3, and the sum would lose all but its first
    # digits in fp32. At 0.03 both are good to 4e-6 in fp32 and 1e-13 in float64.
    series = d * d * (0.5 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720 - d / 5040)))))
    spread = torch.where(d.abs() < 0.03, series, torch.expm1(-d) + d)
    square = (pull * error) ** 2 * shrink
    return BoundTerm(0.5 * (spread + square), pull * pull * error * shrink, 0.5 * (d - spread - square))


def paper_decoder_term(x0: Tensor, error: Tensor, log_variance: Tensor) -> BoundTerm:
    """-log p(x_0 | x_1) [H eq. 13]: what a normal of mean x_0 + error puts on the bin of width 2/255 around x_0, the
    first and last being open; by the tanh approximation of OpenAI's code, with its floor of 1e-12."""
    # Held as in csrc/functions.h, and in exact_decoder_term too: at such variances the term itself is what diverges.
    inverse, scale = torch.exp((-0.5 * log_variance).clamp(-60, 60)), math.sqrt(2 / math.pi)
    first, last = x0 < -0.999, x0 > 0.999
    cdf, slope, edge = [], [], []
    for shift, beyond in ((1 / 255, last), (-1 / 255, first)):
        u = (inverse * (-error + shift)).clamp(-32, 32)
        tanh = torch.tanh(scale * (u + 0.044715 * (u * u * u)))
        density = 0.5 * scale * (1.0 - tanh * tanh) * (1.0 + 3 * 0.044715 * u * u)
        outermost = torch.full_like(u, float(shift > 0))
        cdf.append(torch.where(beyond, outermost, 0.5 * (1.0 + tanh)))
        slope.append(density.masked_fill(beyond, 0.0))
        edge.append(u)
    probability = cdf[0] - cdf[1]
    held = probability.clamp(min=1e-12)
    weight = torch.where(probability < 1e-12, torch.zeros_like(held), 1.0 / held)
    return BoundTerm(
        -torch.log(held),
        inverse * (slope[0] - slope[1]) * weight,
        0.5 * (edge[0] * slope[0] - edge[1] * slope[1]) * weight,
    )


def exact_decoder_term(x0: Tensor, error: Tensor, log_variance: Tensor) -> BoundTerm:
    """The same by the normal's CDF. In float64: the bins of a narrow normal are differences of nearly equal logarithms,
    of which fp32 would keep three digits."""
    dtype = error.dtype
    x0, error, log_variance = (tensor.to(wide(error.device)) for tensor in (x0, error, log_variance))
    inverse, log_root = torch.exp((-0.5 * log_variance).clamp(-87, 88)), 0.5 * math.log(2 * math.pi)
    first, last = x0 < -0.999, x0 > 0.999
    # By symmetry the bin lies above the mean: log(Q(a) - Q(b)), with Q the upper tail.
    middle, half = inverse * error.abs(), inverse / 255
    a, b = middle - half, middle + half
    log_a, log_b = torch.special.log_ndtr(-a), torch.special.log_ndtr(-b)
    log_bin = log_a + torch.log(-torch.expm1(log_b - log_a))
    density_a, density_b = (torch.exp(-0.5 * u * u - log_root - log_bin) for u in (a, b))
    bin_by_error = inverse * torch.sign(error) * (density_b - density_a)
    bin_by_scale = b * density_b - a * density_a  # by log(1/deviation)
    # The open bins: the CDF at y.
    y = inverse * (torch.where(first, -error, error) + 1 / 255)
    log_open = torch.special.log_ndtr(y)
    density = torch.exp(-0.5 * y * y - log_root - log_open)
    open_by_error = torch.where(first, -inverse, inverse) * density
    is_open = first | last
    nats = -torch.where(is_open, log_open, log_bin)
    by_error = -torch.where(is_open, open_by_error, bin_by_error)
    by_log_variance = 0.5 * torch.where(is_open, y * density, bin_by_scale)
    return BoundTerm(nats.to(dtype), by_error.to(dtype), by_log_variance.to(dtype))


class _Bound(NamedTuple):
    """The parts of hybrid_loss and vlb_terms, per element but for the last two, which are [N]."""

    residual: Tensor
    error: Tensor  # predicted x_0 - x_0, clipped
    stopped: Tensor  # whether it was
    term: BoundTerm
    slope: Tensor  # of the log variance in v
    error_scale: Tensor  # what by_error is divided by to be about 1


def _bound(output: Tensor, x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey) -> _Bound:
    dtype = working_dtype(output, x0)
    channels = x0.shape[1]
    rows = table[t].to(dtype)
    c_x0, c_noise, a_out, pull, log_beta, delta, slope, kind, clip = (
        per_sample(column, x0) for column in rows[:, :9].unbind(1)
    )
    pixels = widen(x0, dtype)
    residual = output[:, :channels].to(dtype) - (c_x0 * pixels + c_noise * draw(noise, x0, dtype))
    error = a_out * residual
    stopped = (pixels + error).abs() > clip
    error = torch.where(stopped, torch.sign(pixels + error) * clip - pixels, error)
    learned = output.shape[1] > channels
    d = delta + slope * output[:, channels:].to(dtype) if learned else delta.expand_as(pixels)
    kinds = [
        kl_term(pull, error, d),
        paper_decoder_term(pixels, error, log_beta + d),
        exact_decoder_term(pixels, error, log_beta + d),
    ]
    parts = [torch.where(kind == 0, k, torch.where(kind == 1, p, e)) for k, p, e in zip(*kinds, strict=True)]
    term = BoundTerm._make(parts)
    error_scale = torch.where(kind == 0, pull * pull, torch.exp(-(log_beta + delta)))
    return _Bound(residual, error, stopped, term, rows[:, 6], error_scale.flatten())


def _store_gradient(gradient: Tensor, by_output: Tensor, by_v: Tensor) -> None:
    """Stores what a loss's backward scales: by_output, and after it by_v if the output has a second group of
    channels."""
    parts = [by_output, by_v] if gradient.shape[1] > by_output.shape[1] else [by_output]
    joined = torch.cat(parts, 1)
    # fp16 ends at 65504; an untrained network's derivative may not.
    gradient.copy_(joined.clamp(-65504, 65504) if gradient.dtype == torch.float16 else joined)


def hybrid_loss(
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | NoiseKey,
    gradient: Tensor | None,
    loss: Tensor,
    factors: Tensor,
) -> None:
    check_rows("hybrid_loss", "t", table, t)
    made = _bound(output, x0, t, table, noise)
    mse_weight, vlb_weight = table[t, 9:].to(loss.dtype).unbind(1)
    elements = max(1, math.prod(x0.shape[1:]))
    bits = made.term.nats.flatten(1).mean(1) / math.log(2)
    loss.copy_(mse_weight * made.residual.flatten(1).square().mean(1) + vlb_weight * bits)
    factors[:, 0] = 2 * mse_weight / elements
    factors[:, 1] = vlb_weight * made.slope / (elements * math.log(2))
    if gradient is not None:
        _store_gradient(gradient, made.residual, made.term.by_log_variance)


def vlb_terms(
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | NoiseKey,
    gradient: Tensor | None,
    terms: VlbTerms,
    factors: Tensor,
) -> None:
    check_rows("vlb_terms", "t", table, t)
    made = _bound(output, x0, t, table, noise)
    per_element = 1 / (max(1, math.prod(x0.shape[1:])) * math.log(2))
    terms.bits_per_dim.copy_(made.term.nats.flatten(1).mean(1) / math.log(2))
    terms.mse_x0.copy_(made.error.flatten(1).square().mean(1))
    factors[:, 0] = table[t, 2].to(factors.dtype) * made.error_scale * per_element
    if factors.shape[1] == 2:
        factors[:, 1] = made.slope * per_element
    if gradient is not None:
        by_output = made.term.by_error / per_sample(made.error_scale, x0)
        _store_gradient(gradient, by_output.masked_fill(made.stopped, 0.0), made.term.by_log_variance)


def loss_backward(stored: Tensor, scale: Tensor, grad: Tensor) -> None:
    scale = scale.repeat_interleave(stored.shape[1] // scale.shape[1], dim=1)
    grad.copy_(stored.to(working_dtype(stored)) * scale.view(*scale.shape, *[1] * (stored.ndim - 2)))


def reverse_step(
    x_t: Tensor,
    output: Tensor,
    x0_previous: Tensor | None,
    table: Tensor,
    step: Tensor,
    noise: Tensor | NoiseKey,
    results: ReverseStep,
) -> None:
    dtype = working_dtype(x_t, output)
    check_rows("reverse_step", "step", table, step)
    a_x, a_out, b_x, b_x0, b_previous, sigma, clip, spread = row_of(table, step).to(dtype).unbind()
    x, channels = x_t.to(dtype), x_t.shape[1]
    x0 = torch.clamp(a_x * x + a_out * output[:, :channels].to(dtype), -clip, clip)
    following = b_x * x + b_x0 * x0
    if x0_previous is not None:
        following = following + b_previous * x0_previous.to(dtype)
    deviation = sigma
    if output.shape[1] > channels:
        v = output[:, channels:].to(dtype)
        deviation = torch.where(spread == 0, sigma, sigma * torch.exp(spread * v))
    # A step without noise ignores what is in it, without asking the device whether it is one.
    following = torch.where(sigma == 0, following, following + deviation * draw(noise, x_t, dtype))
    results.x.copy_(following)
    if results.x0 is not None:
        results.x0.copy_(x0)
    if results.x_model is not None:
        results.x_model.copy_(following)


# --- the network's ops


OPS = {
    "normal": normal,
    "q_sample": q_sample,
    "diffusion_loss": diffusion_loss,
    "hybrid_loss": hybrid_loss,
    "vlb_terms": vlb_terms,
    "loss_backward": loss_backward,
    "reverse_step": reverse_step,
    "group_norm": reference_network.group_norm,
    "group_norm_backward": reference_network.group_norm_backward,
    "group_norm_parameters": reference_network.group_norm_parameters,
    "add_bias": reference_network.add_bias,
    "channel_sums": reference_network.channel_sums,
    "dropout": reference_network.dropout,
    "winograd": reference_network.winograd,
    "winograd_filters": reference_network.winograd_filters,
    "winograd_weight_gradient": reference_network.winograd_weight_gradient,
    **reference_draws.OPS,
}
