"""Editing images with a diffusion model: every function here runs the sampling loop on a table of its own.

- image_to_image: noise an image part of the way and sample from there: SDEdit (Meng et al. 2021, "SDEdit: Guided Image
  Synthesis and Editing with Stochastic Differential Equations").
- inpaint: RePaint (Lugmayr et al. 2022, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", alg. 1).
- interpolate: between two images, in the noised or in the latent space (Ho et al. 2020, sec. 4.3; Song et al. 2020,
  "Denoising Diffusion Implicit Models", sec. 5.3).
- encode, decode: an image to the latent that DDIM draws it from, and back (Song et al. 2020, sec. 4.3).

Images are float [N, C, ...], about in [-1, 1], or uint8; results are fp32 on the model's device. Image i draws the
noise of sample id first_sample_id + i, so no result depends on the batch size. **options are fields of SamplingOptions.
Whatever is wrong with the arguments raises InputError before anything is drawn.

Each edit has two parts: a prepare_ function decides and checks everything, and what it returns draws the images. The
sample command keeps the two apart; the public functions do one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ddpm_fast import ops
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import DecodingKeywords, EditingKeywords, EncodingKeywords, SamplingOptions, check_keywords
from ddpm_fast.loops.sampling import Prepared, Start, gather, prepare
from ddpm_fast.loops.state import Paste
from ddpm_fast.noise import NoiseKey, Stream
from ddpm_fast.ops.tensors import widen
from ddpm_fast.respacing import TimestepSpec
from ddpm_fast.samplers import SamplerTable, ddim_encode_table

# Image to image


def image_to_image(
    model: Callable[..., Any],
    diffusion: GaussianDiffusion,
    images: Tensor,
    strength: float = 0.5,
    **options: Unpack[EditingKeywords],
) -> Tensor:
    """Images like the given ones: noised, and denoised from there (SDEdit: Meng et al. 2021).

    Args:
        model, diffusion: As in sample().
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
    x0, prepared = _prepare(network, diffusion, images, options)
    row = _row_at(prepared, strength)
    if strength == 1:
        return prepared
    level = _levels(prepared)[row : row + 1].to(x0.device, torch.float32)

    def start(key: NoiseKey, part: slice) -> tuple[Tensor, None]:
        return ops.q_sample(x0[part], torch.zeros_like(key.sample_id), level, key), None

    return replace(prepared, table=_tail(prepared.table, row), start=start)


# Inpainting


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
        model, diffusion: As in sample().
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
    x0, prepared = _prepare(network, diffusion, images, options)
    keep = _check_mask(mask, x0).to(x0.device)
    table, levels, pasted = _resampled(prepared.table, _levels(prepared), resamplings, jump_length)
    levels = levels.to(x0.device, torch.float32)
    noise = prepared.noise

    def start(key: NoiseKey, part: slice) -> tuple[Tensor, Paste]:
        return noise(key, part)[0], Paste(x0[part], keep[part], levels, pasted)

    return replace(prepared, table=table, start=start)


# Interpolation


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
        model, diffusion: As in sample().
        a, b: Two images of one shape and dtype, [C, ...].
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
    ends, prepared = _prepare(network, diffusion, torch.stack([a, b]), options, n)
    by_ddim = options.sampler == "ddim" and not options.eta
    strength = (1.0 if by_ddim else 0.5) if strength is None else strength
    row = _row_at(prepared, strength)
    if strength == 1 and not by_ddim:
        raise InputError("strength is 1: nothing of a and b would be left in the noise; give less than 1, such as 0.5")
    path = replace(prepared, table=_tail(prepared.table, row), same_noise=True)
    weights = torch.linspace(0, 1, n, device=ends.device).view(-1, *[1] * a.ndim)
    if by_ddim:
        return LatentInterpolation(_encoding_of_ends(ends, path), path, weights)
    level = _levels(prepared)[[row, row]].to(ends.device, torch.float32)
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
        yield from replace(self.path, start=_given(_slerp(first, last, self.weights))).batches(check, wanted)


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
    encoding = replace(prepare(path.network, path.diffusion, 2, options), start=_given(ends))
    return replace(encoding, table=_encode_table(path.diffusion, path.table, path.options.clip))


# Latents


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
        model, diffusion: As in sample().
        images: float [N, C, ...] about in [-1, 1], or uint8.
        steps, labels: See SamplingOptions.
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
    x0, prepared = _prepare(network, diffusion, images, options)
    table = _encode_table(diffusion, prepared.table, options.clip)
    return replace(prepared, table=table, start=_given(x0))


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
        model, diffusion: As in sample().
        latents: float [N, C, ...], the x_T.
        steps, labels: See SamplingOptions.
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
    x, prepared = _prepare(network, diffusion, latents, options)
    return replace(prepared, start=_given(x))


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
        yield from replace(self.decoding, start=_given(latents)).batches(check, wanted)


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


# What they share


def _prepare(
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


def _given(x: Tensor) -> Start:
    """A start from given states, [n, ...]."""
    return lambda key, part: (x[part], None)


def _levels(prepared: Prepared) -> Tensor:
    """float64 [S + 1, 2]: (sqrt(alpha_bar), sqrt(1 - alpha_bar)) of the state before each row of the table, and after
    the last row, where the state is the image."""
    schedule = prepared.diffusion.schedule
    levels = schedule.q_sample_table()[torch.searchsorted(schedule.timesteps, prepared.table.timesteps)]
    return torch.cat([levels, levels.new_tensor([[1.0, 0.0]])])


def _row_at(prepared: Prepared, strength: float) -> int:
    """The row of the table whose t is nearest to strength * T. Raises InputError for a strength outside (0, 1]."""
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}; expected a number in (0, 1]: small keeps the image, 1 is pure noise")
    last = strength * (int(prepared.diffusion.schedule.timesteps[-1]) + 1) - 1
    return int((prepared.table.timesteps - last).abs().argmin())


def _first(row: Tensor) -> Tensor:
    """A row of coefficients for a state without an x0_previous: x_0 replaces it, which leaves the first-order step (Lu
    et al. 2022, alg. 2)."""
    row = row.clone()
    row[3] += row[4]
    row[4] = 0.0
    return row


def _tail(table: SamplerTable, row: int) -> SamplerTable:
    """The table from `row` on."""
    coefficients = table.coefficients[row:].clone()
    coefficients[0] = _first(coefficients[0])
    return SamplerTable(coefficients, table.timesteps[row:])


def _resampled(
    table: SamplerTable, levels: Tensor, resamplings: int, jump_length: int
) -> tuple[SamplerTable, Tensor, list[bool]]:
    """RePaint's table over the rows of a sampler's table. Every stretch of jump_length rows, counted from the end, is
    run `resamplings` times. Between two times one row, a jump, noises its end back to its start: x ~ q(x_t | x_t') [Ho
    et al. 2020, eq. 2, over several timesteps].

    Args:
        table: The sampler's table, of S rows.
        levels: float64 [S + 1, 2], see _levels.
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
        add(table.coefficients[i] if has_past else _first(table.coefficients[i]), i, levels[i + 1], True)
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


def _encode_table(diffusion: GaussianDiffusion, table: SamplerTable, clip: bool) -> SamplerTable:
    """DDIM's steps backwards, from the image to x_t at the first row of a sampler's table."""
    visited = torch.searchsorted(diffusion.schedule.timesteps, table.timesteps.flip(0)).tolist()
    return ddim_encode_table(diffusion.respace(visited), clip=clip)


def _slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """From a to b along the great circle through both (Shoemake 1985). A Gaussian's points keep their norm that way; on
    a straight line the ones in the middle would be too short."""
    angle = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1).arccos()
    sine = angle.sin()
    # For parallel or opposite vectors the great circle is undefined, so interpolate linearly.
    is_straight = sine < 1e-4
    share_a, share_b = (torch.where(is_straight, w, (w * angle).sin() / sine) for w in (1 - weight, weight))
    return share_a * a + share_b * b
