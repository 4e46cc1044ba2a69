"""inpaint: images that keep their known pixels and are drawn elsewhere.

RePaint: Lugmayr et al. 2022, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", alg. 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.loops.editing.start import levels_of, prepared_for, without_past
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import EditingKeywords, SamplingOptions, check_keywords
from ddpm_fast.loops.prepared import Prepared
from ddpm_fast.loops.state import Paste
from ddpm_fast.noise import NoiseKey
from ddpm_fast.samplers import SamplerTable


def inpaint(
    model: Callable[..., Any],
    diffusion: GaussianDiffusion,
    images: Tensor,
    mask: Tensor,
    *,
    resamplings: int = 5,
    jump_length: int = 5,
    **options: Unpack[EditingKeywords],
) -> Tensor:
    """Images that keep the known pixels exactly and are drawn elsewhere (RePaint: Lugmayr et al. 2022, alg. 1).

    After every row the known pixels, noised to its level, replace the drawn ones. To make the drawn pixels consistent
    with the known ones, every stretch of jump_length rows is run `resamplings` times: after each time but the last,
    noise is added to get from its end back to its start. So the network is called about steps * resamplings times.

    Args:
        model: As in sample().
        diffusion: As in sample().
        images: float [N, C, ...] about in [-1, 1], or uint8.
        mask: bool or 0/1, 1 (True) where a pixel is known: [H, W], [1, H, W], [N, 1, H, W] or like the images.
        resamplings: How often each stretch is run. 1 only pastes the known pixels.
        jump_length: How many rows a stretch has.
        **options: See SamplingOptions.

    Returns:
        fp32, shaped like images.
    """
    check_keywords(options, EditingKeywords)
    prepared = prepare_inpaint(
        Network.of(model),
        diffusion,
        images,
        mask,
        SamplingOptions(**options),
        resamplings=resamplings,
        jump_length=jump_length,
    )
    return prepared.draw()


def prepare_inpaint(
    network: Network,
    diffusion: GaussianDiffusion,
    images: Tensor,
    mask: Tensor,
    options: SamplingOptions,
    *,
    resamplings: int = 5,
    jump_length: int = 5,
) -> Prepared:
    """What inpaint draws, ready to be drawn. Raises InputError where it does."""
    x0, prepared = prepared_for(network, diffusion, images, options)
    keep = _check_mask(mask, x0).to(x0.device)
    table, levels, pasted = _resampled(prepared.table, levels_of(prepared), resamplings, jump_length)
    levels = levels.to(x0.device, torch.float32)
    noise = prepared.noise

    def start(key: NoiseKey, part: slice) -> tuple[Tensor, Paste]:
        return noise(key, part)[0], Paste(x0[part], keep[part], levels, pasted)

    return replace(prepared, table=table, start=start)


def _resampled(
    table: SamplerTable, levels: Tensor, resamplings: int, jump_length: int
) -> tuple[SamplerTable, Tensor, list[bool]]:
    """RePaint's table over the rows of a sampler's table. Every stretch of jump_length rows, counted from the end, is
    run `resamplings` times. Between two times one row, a jump, noises its end back to its start: x ~ q(x_t | x_t') [Ho
    et al. 2020, eq. 2, over several timesteps].

    Args:
        table: The sampler's table, of S rows.
        levels: float64 [S + 1, 2], see levels_of.
        resamplings, jump_length: See inpaint.

    Returns:
        The table, of S' rows; float64 [S', 2], the levels after its rows; and for each row, whether known pixels are
        pasted after it: not after a jump.
    """
    steps = len(table.timesteps)
    resamplings = check_integer("resamplings", resamplings, 1)
    jump_length = check_integer("jump_length", jump_length, 1)
    if resamplings > 1 and jump_length >= steps:
        raise InputError(
            f"jump_length is {jump_length}, but there are {steps} steps: give a jump_length below {steps}, more steps, "
            "or resamplings=1"
        )
    # From the state before row `end` back to the one before row end - jump_length; never from the finished image.
    jumps = {end: resamplings - 1 for end in range(steps - 1, jump_length - 1, -jump_length)}
    rows: list[Tensor] = []
    timesteps: list[Tensor] = []
    after: list[Tensor] = []
    pasted: list[bool] = []

    def add(row: Tensor, i: int, level: Tensor, pastes: bool) -> None:
        rows.append(row)
        timesteps.append(table.timesteps[i])
        after.append(level)
        pasted.append(pastes)

    i = 0
    while i < steps:
        has_past = bool(pasted) and pasted[-1]
        add(table.coefficients[i] if has_past else without_past(table.coefficients[i]), i, levels[i + 1], True)
        i += 1
        if jumps.get(i, 0):
            jumps[i] -= 1
            back = i - jump_length
            add(_jump(levels[i], levels[back]), back, levels[back], False)
            i = back
    return SamplerTable(torch.stack(rows), torch.stack(timesteps)), torch.stack(after), pasted


def _jump(low: Tensor, high: Tensor) -> Tensor:
    """A row that noises the state from one level to a higher one, without the network: float64 [8]."""
    kept = (high[0] / low[0]).square()
    row = torch.zeros(8, dtype=torch.float64)
    row[2], row[5], row[6] = kept.sqrt(), (1 - kept).sqrt(), torch.inf
    return row


def _check_mask(mask: Tensor, images: Tensor) -> Tensor:
    """The mask as bool, shaped like the images. Raises InputError for another shape, and values other than 0 and 1."""
    n, pixels = images.shape[0], tuple(images.shape[2:])
    shapes = [tuple(images.shape)]
    if pixels:
        shapes = [pixels, (1, *pixels), (n, 1, *pixels), *shapes]
    if not isinstance(mask, Tensor) or tuple(mask.shape) not in shapes:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"the mask is {found}; expected a tensor of shape {' or '.join(str(list(s)) for s in shapes)}")
    wrong = (mask != 0) & (mask != 1)
    if wrong.any():
        raise InputError(
            f"{int(wrong.sum())} of the mask's {mask.numel()} values are neither 0 nor 1, the first "
            f"{mask[wrong][0].item():.4g}; expected 1 (True) where a pixel is known and 0 where it is to be drawn"
        )
    return mask.bool().expand(images.shape)
