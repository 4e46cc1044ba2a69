"""image_to_image: noise an image part of the way and sample from there.

SDEdit: Meng et al. 2021, "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ddpm_fast import ops
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.loops.editing.start import levels_of, prepared_for, row_at, tail
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import EditingKeywords, SamplingOptions, check_keywords
from ddpm_fast.loops.prepared import Prepared
from ddpm_fast.noise import NoiseKey


def image_to_image(
    model: Callable[..., Any],
    diffusion: GaussianDiffusion,
    images: Tensor,
    strength: float = 0.5,
    **options: Unpack[EditingKeywords],
) -> Tensor:
    """Images like the given ones: noised, and denoised from there (SDEdit: Meng et al. 2021).

    Args:
        model: As in sample().
        diffusion: As in sample().
        images: float [N, C, ...] about in [-1, 1], or uint8.
        strength: How much noise to add, in (0, 1]: a small strength keeps the image, and 1 starts from pure noise,
            which is sample(). Of `steps` sampler rows about strength * steps are run, from the one whose timestep is
            nearest to strength * T.
        **options: See SamplingOptions.

    Returns:
        fp32, shaped like images.
    """
    check_keywords(options, EditingKeywords)
    wanted = SamplingOptions(**options)
    return prepare_image_to_image(Network.of(model), diffusion, images, strength, wanted).draw()


def prepare_image_to_image(
    network: Network, diffusion: GaussianDiffusion, images: Tensor, strength: float, options: SamplingOptions
) -> Prepared:
    """What image_to_image draws, ready to be drawn. Raises InputError where it does."""
    x0, prepared = prepared_for(network, diffusion, images, options)
    row = row_at(prepared, strength)
    if strength == 1:
        return prepared
    level = levels_of(prepared)[row : row + 1].to(x0.device, torch.float32)

    def start(key: NoiseKey, part: slice) -> tuple[Tensor, None]:
        return ops.q_sample(x0[part], torch.zeros_like(key.sample_id), level, key), None

    return replace(prepared, table=tail(prepared.table, row), start=start)
