"""encode and decode: an image to the latent that DDIM draws it from, and back.

Song et al. 2020, "Denoising Diffusion Implicit Models", sec. 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.loops.editing.start import given, prepared_for
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import DecodingKeywords, EncodingKeywords, SamplingOptions, check_keywords
from ddpm_fast.loops.prepared import Prepared, gather
from ddpm_fast.respacing import TimestepSpec
from ddpm_fast.samplers import SamplerTable, ddim_encode_table


def encode(
    model: Callable[..., Any],
    diffusion: GaussianDiffusion,
    images: Tensor,
    steps: TimestepSpec | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    **options: Unpack[EncodingKeywords],
) -> Tensor:
    """The latents x_T that decode turns back into the images: DDIM's steps, backwards (Song et al. 2020, sec. 4.3).

    Nothing is random. The round trip is exact in the limit of many steps; docs/sampling.md has its error. Decode with
    the same steps, spacing, labels and clip, or change only the labels to redraw the image as another class.

    Args:
        model: As in sample().
        diffusion: As in sample().
        images: float [N, C, ...] about in [-1, 1], or uint8.
        steps: See SamplingOptions.
        labels: See SamplingOptions.
        **options: spacing, clip, condition, batch_size, cuda_graph and compile; see SamplingOptions.

    Returns:
        fp32, shaped like images.
    """
    check_keywords(options, EncodingKeywords)
    wanted = SamplingOptions(sampler="ddim", steps=steps, labels=labels, **options)
    return prepare_encode(Network.of(model), diffusion, images, wanted).draw()


def prepare_encode(
    network: Network, diffusion: GaussianDiffusion, images: Tensor, options: SamplingOptions
) -> Prepared:
    """What encode draws, ready to be drawn. Raises InputError where it does."""
    x0, prepared = prepared_for(network, diffusion, images, options)
    table = encode_table(diffusion, prepared.table, options.clip)
    return replace(prepared, table=table, start=given(x0))


def decode(
    model: Callable[..., Any],
    diffusion: GaussianDiffusion,
    latents: Tensor,
    steps: TimestepSpec | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    **options: Unpack[DecodingKeywords],
) -> Tensor:
    """The images that DDIM (eta 0) draws from the given x_T, which is the way back from encode.

    Args:
        model: As in sample().
        diffusion: As in sample().
        latents: float [N, C, ...], the x_T.
        steps: See SamplingOptions.
        labels: See SamplingOptions.
        **options: See SamplingOptions.

    Returns:
        fp32, shaped like latents.
    """
    check_keywords(options, DecodingKeywords)
    wanted = SamplingOptions(sampler="ddim", eta=0.0, steps=steps, labels=labels, **options)
    return prepare_decode(Network.of(model), diffusion, latents, wanted).draw()


def prepare_decode(
    network: Network, diffusion: GaussianDiffusion, latents: Tensor, options: SamplingOptions
) -> Prepared:
    """What decode draws, ready to be drawn. Raises InputError where it does."""
    x, prepared = prepared_for(network, diffusion, latents, options)
    return replace(prepared, start=given(x))


@dataclass(frozen=True, eq=False)
class RoundTrip:
    """Images to their latents and back, ready to be drawn.

    Attributes:
        encoding: What encodes the images.
        decoding: What decodes their latents.
    """

    encoding: Prepared
    decoding: Prepared

    @property
    def rows(self) -> int:
        """How many rows each batch runs through that on_step is called for: those of the decoding."""
        return self.decoding.rows

    @property
    def n(self) -> int:
        """How many images there are."""
        return self.decoding.n

    def draw(self) -> Tensor:
        """Encode the images and decode their latents."""
        return gather(self.batches(), self.decoding)

    def batches(
        self, check: Callable[[], object] | None = None, wanted: Callable[[slice], bool] | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The same batch by batch, after all images were encoded; see Prepared.batches."""
        latents = gather(self.encoding.batches(check, wanted), self.encoding)
        yield from replace(self.decoding, start=given(latents)).batches(check, wanted)


def prepare_round_trip(
    network: Network, diffusion: GaussianDiffusion, images: Tensor, options: SamplingOptions
) -> RoundTrip:
    """encode and decode, ready to be drawn. Of the options only steps, spacing, clip, labels, condition, batch_size,
    on_step (for the decoding) and cuda_graph count. Raises InputError where encode does."""
    decoding = SamplingOptions(
        sampler="ddim",
        steps=options.steps,
        spacing=options.spacing,
        clip=options.clip,
        labels=options.labels,
        condition=options.condition,
        batch_size=options.batch_size,
        on_step=options.on_step,
        cuda_graph=options.cuda_graph,
    )
    return RoundTrip(
        prepare_encode(network, diffusion, images, replace(decoding, on_step=None)),
        prepare_decode(network, diffusion, images, decoding),
    )


def encode_table(diffusion: GaussianDiffusion, table: SamplerTable, clip: bool) -> SamplerTable:
    """DDIM's steps backwards, from the image to x_t at the first row of a sampler's table."""
    visited = torch.searchsorted(diffusion.schedule.timesteps, table.timesteps.flip(0)).tolist()
    return ddim_encode_table(diffusion.respace(visited), clip=clip)
