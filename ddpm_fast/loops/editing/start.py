"""Where an edit starts: its images, checked and on the device, and the part of the sampler's table that is run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.loops.prepared import Prepared, Start
from ddpm_fast.loops.sampling import prepare
from ddpm_fast.ops.tensors import widen
from ddpm_fast.samplers import SamplerTable


def prepared_for(
    network: Network, diffusion: GaussianDiffusion, images: Tensor, options: SamplingOptions, n: int | None = None
) -> tuple[Tensor, Prepared]:
    """The images in fp32 on the model's device, and n images (None: as many) prepared to be drawn from pure noise."""
    if not isinstance(images, Tensor) or not (images.is_floating_point() or images.dtype == torch.uint8):
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"the images are {found}; expected a tensor of floats about in [-1, 1], or uint8 in 0..255")
    shape = tuple(images.shape[1:])
    if not shape:
        raise InputError(f"the images are {list(images.shape)}; expected [N, C, ...]")
    if misfit := network.misfit(shape):
        raise InputError(f"the images are {list(images.shape)}, but {misfit}")
    if not images.isfinite().all():
        raise InputError("the images have NaN or infinite values; expected floats about in [-1, 1]")
    prepared = prepare(network, diffusion, len(images) if n is None else n, replace(options, shape=shape))
    return widen(images.to(network.device), torch.float32), prepared


def given(x: Tensor) -> Start:
    """A start from given states, [n, ...]."""
    return lambda key, part: (x[part], None)


def levels_of(prepared: Prepared) -> Tensor:
    """float64 [S + 1, 2]: (sqrt(alpha_bar), sqrt(1 - alpha_bar)) of the state before each row of the table, and after
    the last row, where the state is the image."""
    schedule = prepared.diffusion.schedule
    levels = schedule.q_sample_table()[torch.searchsorted(schedule.timesteps, prepared.table.timesteps)]
    return torch.cat([levels, levels.new_tensor([[1.0, 0.0]])])


def row_at(prepared: Prepared, strength: float) -> int:
    """The row of the table whose t is nearest to strength * T. Raises InputError for a strength outside (0, 1]."""
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}; expected a number in (0, 1]: small keeps the image, 1 is pure noise")
    last = strength * (int(prepared.diffusion.schedule.timesteps[-1]) + 1) - 1
    return int((prepared.table.timesteps - last).abs().argmin())


def without_past(row: Tensor) -> Tensor:
    """A row of coefficients for a state without an x0_previous: x_0 replaces it, which leaves the first-order step (Lu
    et al. 2022, alg. 2)."""
    row = row.clone()
    row[3] += row[4]
    row[4] = 0.0
    return row


def tail(table: SamplerTable, row: int) -> SamplerTable:
    """The table from `row` on."""
    coefficients = table.coefficients[row:].clone()
    coefficients[0] = without_past(coefficients[0])
    return SamplerTable(coefficients, table.timesteps[row:])
