"""interpolate: from one image to another, in the noised or in the latent space.

Ho et al. 2020, sec. 4.3; Song et al. 2020, "Denoising Diffusion Implicit Models", sec. 5.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ddpm_fast import ops
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops.editing.latents import encode_table
from ddpm_fast.loops.editing.start import given, levels_of, prepared_for, row_at, tail
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import EditingKeywords, SamplingOptions, check_keywords
from ddpm_fast.loops.prepared import Prepared, gather
from ddpm_fast.loops.sampling import prepare
from ddpm_fast.noise import NoiseKey, Stream


def interpolate(
    model: Callable[..., Any],
    diffusion: GaussianDiffusion,
    a: Tensor,
    b: Tensor,
    n: int,
    *,
    strength: float | None = None,
    **options: Unpack[EditingKeywords],
) -> Tensor:
    """n images that lead from a to b, both ends included: encoded, mixed in equal steps, decoded.

    With sampler="ddim" (eta 0) the ends are encoded by DDIM and mixed along a great circle (Song et al. 2020, sec.
    5.3). With any other sampler both are noised with the same noise, mixed linearly, and denoised with the same noise
    (Ho et al. 2020, sec. 4.3). All images draw the noise of first_sample_id.

    Args:
        model: As in sample().
        diffusion: As in sample().
        a: The image at the beginning, [C, ...].
        b: The image at the end, of the same shape and dtype.
        n: How many images, at least 2.
        strength: How far the ends are encoded, in (0, 1]. None is 1 for DDIM and 0.5 otherwise. More gives smoother
            transitions, less stays nearer to a and b.
        **options: See SamplingOptions. labels are one class, or one for each of the n images, of which the first and
            the last are those of a and b.

    Returns:
        fp32 [n, *a.shape].
    """
    check_keywords(options, EditingKeywords)
    wanted = SamplingOptions(**options)
    return prepare_interpolate(Network.of(model), diffusion, a, b, n, wanted, strength=strength).draw()


def prepare_interpolate(
    network: Network,
    diffusion: GaussianDiffusion,
    a: Tensor,
    b: Tensor,
    n: int,
    options: SamplingOptions,
    *,
    strength: float | None = None,
) -> Prepared | LatentInterpolation:
    """What interpolate draws, ready to be drawn. Raises InputError where it does."""
    if n < 2:
        raise InputError(f"n is {n}; expected at least 2 images: the two ends, and those between them")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise InputError(
            f"a is {a.dtype} {list(a.shape)} and b {b.dtype} {list(b.shape)}; expected two images of one shape and "
            "dtype, [C, H, W]"
        )
    ends, prepared = prepared_for(network, diffusion, torch.stack([a, b]), options, n)
    by_ddim = options.sampler == "ddim" and not options.eta
    strength = (1.0 if by_ddim else 0.5) if strength is None else strength
    row = row_at(prepared, strength)
    if strength == 1 and not by_ddim:
        raise InputError("strength is 1: nothing of a and b would be left in the noise; give less than 1, such as 0.5")
    path = replace(prepared, table=tail(prepared.table, row), same_noise=True)
    weights = torch.linspace(0, 1, n, device=ends.device).view(-1, *[1] * a.ndim)
    if by_ddim:
        return LatentInterpolation(_encoding_of_ends(ends, path), path, weights)
    level = levels_of(prepared)[[row, row]].to(ends.device, torch.float32)
    key = replace(prepared.key, sample_id=prepared.key.sample_id[:1].repeat(2), stream=Stream.INITIAL)

    def start(_: NoiseKey, part: slice) -> tuple[Tensor, None]:
        first, last = ops.q_sample(ends, torch.zeros_like(key.sample_id), level, key).split(1)
        return torch.lerp(first, last, weights)[part], None

    return replace(path, start=start)


@dataclass(frozen=True, eq=False)
class LatentInterpolation:
    """An interpolation between two latents, ready to be drawn.

    Attributes:
        encoding: What encodes the two ends.
        path: What decodes the mixed latents.
        weights: float [n, 1, ...] from 0 to 1, the share of the second end.
    """

    encoding: Prepared
    path: Prepared
    weights: Tensor

    @property
    def rows(self) -> int:
        """How many rows each batch runs through that on_step is called for: those of the decoding."""
        return self.path.rows

    @property
    def n(self) -> int:
        """How many images there are."""
        return self.path.n

    def draw(self) -> Tensor:
        """Encode the ends, mix their latents, and decode them."""
        return gather(self.batches(), self.path)

    def batches(
        self, check: Callable[[], object] | None = None, wanted: Callable[[slice], bool] | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The same batch by batch; see Prepared.batches."""
        first, last = gather(self.encoding.batches(check), self.encoding).split(1)
        yield from replace(self.path, start=given(_slerp(first, last, self.weights))).batches(check, wanted)


def _encoding_of_ends(ends: Tensor, path: Prepared) -> Prepared:
    """DDIM's encoding of both ends of an interpolation, up to the first row of its path. No guidance: see encode."""
    options = SamplingOptions(
        sampler="ddim",
        steps=path.options.steps,
        spacing=path.options.spacing,
        labels=None if path.labels is None else path.labels[[0, -1]],
        condition=path.condition if path.condition is None or len(path.condition) == 1 else path.condition[[0, -1]],
        shape=path.shape,
        cuda_graph=path.options.cuda_graph,
    )
    encoding = replace(prepare(path.network, path.diffusion, 2, options), start=given(ends))
    return replace(encoding, table=encode_table(path.diffusion, path.table, path.options.clip))


def _slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """From a to b along the great circle through both (Shoemake 1985). A Gaussian's points keep their norm that way; on
    a straight line the ones in the middle would be too short."""
    angle = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1).arccos()
    sine = angle.sin()
    # For parallel or opposite vectors the great circle is undefined, so interpolate linearly.
    is_straight = sine < 1e-4
    share_a, share_b = (torch.where(is_straight, w, (w * angle).sin() / sine) for w in (1 - weight, weight))
    return share_a * a + share_b * b
