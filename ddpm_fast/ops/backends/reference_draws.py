"""A training step's draws in plain torch, and the losses that importance sampling remembers: the reference's part for
ops/drawing.py. The integers and the weights are the same bits as the kernels'.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ddpm_fast.noise import Stream, random_words, uniform_integers
from ddpm_fast.ops.tensors import Draw, Drawn, check_rows


def draw_timesteps(draw: Draw, drawn: Drawn) -> None:
    T = draw.num_timesteps
    t = _importance(draw) if draw.cumulative is not None else uniform_integers(draw.key, T)
    if draw.parts and draw.cumulative is None:
        # floor((T i + T u) / n) = floor((T i + floor(T u)) / n), since n is an integer: no rounding anywhere.
        t = (T * (draw.key.sample_id % draw.parts) + t) // draw.parts
    drawn.t.copy_(t)
    drawn.weights.copy_(
        torch.ones_like(t, dtype=torch.float32) if draw.probabilities is None else 1 / (T * draw.probabilities[t])
    )
    if draw.network_timesteps is not None:
        drawn.network_t.copy_(draw.network_timesteps[t])
    if draw.labels is not None and drawn.labels is not None:
        dice = uniform_integers(replace(draw.key, stream=Stream.LABEL), 2**24)
        drawn.labels.copy_(draw.labels.masked_fill(dice < draw.dropped, draw.null_label))


def _importance(draw: Draw) -> Tensor:
    """The inverse of the cumulative probability at a uniform number of 53 bits, or of 24 in float32."""
    assert draw.cumulative is not None
    words = random_words(draw.key, 1)[:, 0]
    u = (words[:, 0] << 21 | words[:, 1] >> 11).to(draw.cumulative.dtype) * 2.0**-53  # [0, 1), or 1 in float32
    t = torch.searchsorted(draw.cumulative, u * draw.cumulative[-1], right=True)
    return t.clamp(max=draw.num_timesteps - 1)  # the product may round up to the sum itself


def record_losses(history: Tensor, counts: Tensor, t: Tensor, losses: Tensor) -> None:
    check_rows("record_losses", "t", history, t)
    (T, slots), n = history.shape, len(t)
    # What must not be recorded goes to a row T that is cut off again, since masking would wait for the device.
    t, order = torch.where(losses.isfinite() & (t >= 0) & (t < T), t, T).sort(stable=True)
    number = torch.zeros(T + 1, dtype=torch.int64, device=t.device).scatter_add_(0, t, torch.ones_like(t))
    rank = torch.arange(n, device=t.device) - torch.searchsorted(t, t)  # among the losses of the same t
    slot = (torch.cat([counts, counts.new_zeros(1)])[t] + rank) % slots
    overwritten = rank < number[t] - slots
    cell = torch.where(overwritten | (t == T), T * slots, t * slots + slot)
    cells = torch.cat([history.flatten(), history.new_zeros(1)]).scatter_(0, cell, losses[order])
    history.copy_(cells[:-1].view(T, slots))
    counts += number[:T]


OPS = {"draw_timesteps": draw_timesteps, "record_losses": record_losses}
