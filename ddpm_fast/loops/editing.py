"""Editing images with a diffusion model: every function here runs the sampling loop on a plan of its own.

- image_to_image: noise an image part of the way and sample from there: SDEdit (Meng et al. 2021, "SDEdit: Guided Image
  Synthesis and Editing with Stochastic Differential Equations").
- inpaint: RePaint (Lugmayr et al. 2022, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", alg. 1).
- interpolate: between two images, in the noised or in the latent space (Ho et al. 2020, sec. 4.3; Song et al. 2020,
  "Denoising Diffusion Implicit Models", sec. 5.3).
- encode, decode: an image to the latent that DDIM draws it from, and back (Song et al. 2020, sec. 4.3).

Images are float [N, C, ...], about in [-1, 1], or uint8; results are fp32 on the model's device. Image i draws the
noise of sample id first_sample_id + i, so that no result depends on the batch size. **options are sample()'s keyword
arguments: sampler, steps, guidance, labels, seed, first_sample_id, batch_size, on_step, cuda_graph and so on. Whatever
is wrong with the arguments raises InputError before anything is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast import ops
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops.sampling import Paste, Run
from ddpm_fast.nn import UNet
from ddpm_fast.noise import NoiseKey, Stream
from ddpm_fast.ops.tensors import widen
from ddpm_fast.samplers import SamplerTable, ddim_encode_table


def image_to_image(
    model: nn.Module, diffusion: GaussianDiffusion, images: Tensor, strength: float = 0.5, **options: Any
) -> Tensor:
    """Images like the given ones: noised to the row of the plan whose t is nearest to strength * T, and denoised from
    there. strength in (0, 1]: small keeps the image, 1 starts from pure noise and is sample(). Of `steps` rows about
    strength * steps are run. SDEdit (Meng et al. 2021). Shaped like images.
    """
    x0, run = _prepare(model, diffusion, images, options)
    row = _row_at(run, strength)
    if strength == 1:
        return run.draw(run.noise)
    level = _levels(run)[row : row + 1].to(run.device, torch.float32)

    def start(key: NoiseKey, part: slice) -> tuple[Tensor, None]:
        return ops.q_sample(x0[part], torch.zeros_like(key.sample_id), level, key), None

    return run.draw(start, _tail(run.table, row))


def inpaint(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    images: Tensor,
    mask: Tensor,
    *,
    resamplings: int = 5,
    jump_length: int = 5,
    **options: Any,
) -> Tensor:
    """Images that keep the known pixels exactly and are drawn elsewhere (RePaint: Lugmayr et al. 2022, alg. 1).

    mask: bool or 0/1, 1 (True) where a pixel is known: [H, W], [1, H, W], [N, 1, H, W] or like the images. After every
    step the known pixels, noised to its level, replace the drawn ones. So that the two come to agree, every stretch of
    jump_length steps is run `resamplings` times, each time but the first from its end noised back to its start: the
    network is called about steps * resamplings times. resamplings = 1 pastes alone. Shaped like images.
    """
    x0, run = _prepare(model, diffusion, images, options)
    keep = _check_mask(mask, x0).to(run.device)
    plan, levels, pasted = _resampled(run.table, _levels(run), resamplings, jump_length)
    levels = levels.to(run.device, torch.float32)

    def start(key: NoiseKey, part: slice) -> tuple[Tensor, Paste]:
        return run.noise(key, part)[0], Paste(x0[part], keep[part], levels, pasted)

    return run.draw(start, plan)


def interpolate(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    a: Tensor,
    b: Tensor,
    n: int,
    *,
    strength: float | None = None,
    **options: Any,
) -> Tensor:
    """n images on the way from a to b, the ends included: encoded, mixed in equal steps, decoded. [n, *a.shape].

    a, b: [C, ...]. With sampler="ddim" (eta 0) the ends are encoded by DDIM and mixed on the sphere (Song et al. 2020,
    sec. 5.3); with any other sampler both are noised with the same noise, mixed linearly, and denoised with the same
    noise (Ho et al. 2020, sec. 4.3). strength in (0, 1] is how far they are encoded (None: 1 and 0.5): more gives
    smoother ways, less stays nearer to a and b. labels: one class, or one each of the n; the first and the last are a's
    and b's. All images draw the noise of first_sample_id.
    """
    if n < 2:
        raise InputError(f"n is {n}; expected at least 2 images: the two ends, and those between them")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise InputError(
            f"a is {a.dtype} {list(a.shape)} and b {b.dtype} {list(b.shape)}; expected two images of one shape and "
            "dtype, [C, H, W]"
        )
    ends, run = _prepare(model, diffusion, torch.stack([a, b]), options, n)
    inverted = options.get("sampler") == "ddim" and not options.get("eta")
    strength = (1.0 if inverted else 0.5) if strength is None else strength
    row = _row_at(run, strength)
    if strength == 1 and not inverted:
        raise InputError("strength is 1: nothing of a and b would be left in the noise; give less than 1, such as 0.5")
    weight = torch.linspace(0, 1, n, device=run.device).view(-1, *[1] * a.ndim)
    table = _tail(run.table, row)
    if inverted:
        labels = None if run.labels is None else run.labels[[0, -1]]
        two = Run(model, diffusion, 2, labels=labels, shape=run.shape, cuda_graph=run.cuda_graph)
        mixed = _slerp(*_encode(two, ends, table, options.get("clip", True)).split(1), weight)
    else:
        level = _levels(run)[[row, row]].to(run.device, torch.float32)
        key = replace(run.key, sample_id=run.key.sample_id[:1].repeat(2), stream=Stream.INITIAL)
        mixed = torch.lerp(*ops.q_sample(ends, torch.zeros_like(key.sample_id), level, key).split(1), weight)
    return run.draw(lambda key, part: (mixed[part], None), table, same_noise=True)


def encode(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    images: Tensor,
    steps: int | str | Sequence[int] | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    *,
    spacing: str = "even",
    clip: bool = True,
    batch_size: int | None = None,
    cuda_graph: bool | None = None,
) -> Tensor:
    """The latents x_T that decode turns back into the images: DDIM's steps, backwards (Song et al. 2020, sec. 4.3).

    Nothing is random. The way back is exact in the limit of many steps; docs/sampling.md has its error. Decode with the
    same steps, spacing, labels and clip, or change the labels alone to redraw the image as another class. cuda_graph:
    as in sample(). fp32, shaped like images.
    """
    options = {"sampler": "ddim", "steps": steps, "spacing": spacing, "labels": labels, "batch_size": batch_size}
    options["cuda_graph"] = cuda_graph
    x0, run = _prepare(model, diffusion, images, options)
    return _encode(run, x0, run.table, clip)


def decode(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    latents: Tensor,
    steps: int | str | Sequence[int] | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The images that DDIM (eta 0) draws from the given x_T: encode's way back. Shaped like latents, fp32."""
    options = dict(sampler="ddim", eta=0.0, steps=steps, labels=labels, **options)
    x, run = _prepare(model, diffusion, latents, options)
    return run.draw(lambda key, part: (x[part], None))


def _prepare(
    model: nn.Module, diffusion: GaussianDiffusion, images: Tensor, options: dict[str, Any], n: int | None = None
) -> tuple[Tensor, Run]:
    """The images in fp32 on the model's device, and the run that edits them into n (None: as many) others."""
    if not isinstance(images, Tensor) or not (images.is_floating_point() or images.dtype == torch.uint8):
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"the images are {found}; expected a tensor of floats about in [-1, 1], or uint8 in 0..255")
    shape = tuple(images.shape[1:])
    if isinstance(model, UNet):
        own = (model.config.in_channels, model.config.image_size, model.config.image_size)
        if shape != own:
            raise InputError(
                f"the images are {list(images.shape)}; this U-Net edits [N, {', '.join(map(str, own))}]: resize them, "
                "or change their channels"
            )
    elif not shape:
        raise InputError(f"the images are {list(images.shape)}; expected [N, C, ...]")
    if not images.isfinite().all():
        raise InputError("the images have NaN or infinite values; expected floats about in [-1, 1]")
    run = Run(model, diffusion, len(images) if n is None else n, shape=shape, **options)
    return widen(images.to(run.device), torch.float32), run


def _levels(run: Run) -> Tensor:
    """float64 [S + 1, 2]: (sqrt(alpha_bar), sqrt(1 - alpha_bar)) of the state before each row of the run's table, and
    after the last, where it is the image."""
    schedule = run.diffusion.schedule
    levels = schedule.q_sample_table()[torch.searchsorted(schedule.timesteps, run.table.timesteps)]
    return torch.cat([levels, levels.new_tensor([[1.0, 0.0]])])


def _row_at(run: Run, strength: float) -> int:
    """The row of the run's table whose t is nearest to strength * T. Raises InputError for strength outside (0, 1]."""
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}; expected a number in (0, 1]: small keeps the image, 1 is pure noise")
    last = strength * (int(run.diffusion.schedule.timesteps[-1]) + 1) - 1
    return int((run.table.timesteps - last).abs().argmin())


def _first(row: Tensor) -> Tensor:
    """A row of coefficients for a state without a past: x_0 stands in for x0_previous, which leaves the first-order
    step (Lu et al. 2022, alg. 2)."""
    row = row.clone()
    row[3] += row[4]
    row[4] = 0.0
    return row


def _tail(table: SamplerTable, row: int) -> SamplerTable:
    """The plan from `row` on."""
    coefficients = table.coefficients[row:].clone()
    coefficients[0] = _first(coefficients[0])
    return SamplerTable(coefficients, table.timesteps[row:])


def _resampled(
    table: SamplerTable, levels: Tensor, resamplings: int, jump_length: int
) -> tuple[SamplerTable, Tensor, list[bool]]:
    """RePaint's plan over the rows of a table: every stretch of jump_length rows, counted from the end, runs
    `resamplings` times; in between, one row noises its end back to its start: x ~ q(x_t | x_t') [Ho et al. 2020, eq. 2,
    over several steps].

    Returns the plan, float64 [S', 2] the levels after its rows, and whether a row is a step (and not a jump).
    """
    steps = len(table.timesteps)
    if not all(isinstance(count, int) and count >= 1 for count in (resamplings, jump_length)):
        raise InputError(f"resamplings is {resamplings} and jump_length {jump_length}; expected ints of at least 1")
    if resamplings > 1 and jump_length >= steps:
        raise InputError(
            f"jump_length is {jump_length}, but the plan has {steps} steps: give a jump_length below {steps}, more "
            "steps, or resamplings=1"
        )
    # From the state before row `end` back to the one before row end - jump_length; never from the finished image.
    jumps = {end: resamplings - 1 for end in range(steps - 1, jump_length - 1, -jump_length)}
    rows, timesteps, after, is_step = [], [], [], []

    def add(row: Tensor, i: int, level: Tensor, step: bool) -> None:
        rows.append(row)
        timesteps.append(table.timesteps[i])
        after.append(level)
        is_step.append(step)

    i = 0
    while i < steps:
        has_past = is_step and is_step[-1]
        add(table.coefficients[i] if has_past else _first(table.coefficients[i]), i, levels[i + 1], True)
        i += 1
        if jumps.get(i, 0):
            jumps[i] -= 1
            kept = (levels[i - jump_length, 0] / levels[i, 0]).square()
            jump = torch.zeros_like(rows[-1])
            jump[2], jump[5], jump[6] = kept.sqrt(), (1 - kept).sqrt(), torch.inf
            i -= jump_length
            add(jump, i, levels[i], False)
    return SamplerTable(torch.stack(rows), torch.stack(timesteps)), torch.stack(after), is_step


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


def _encode(run: Run, x0: Tensor, table: SamplerTable, clip: bool) -> Tensor:
    """x_t at the first row of a sampler's table, by DDIM's steps backwards from the images."""
    schedule = run.diffusion.schedule
    chain = run.diffusion.respace(torch.searchsorted(schedule.timesteps, table.timesteps.flip(0)).tolist())
    return run.draw(lambda key, part: (x0[part], None), ddim_encode_table(chain, clip=clip))


def _slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """From a to b along the circle through both (Shoemake 1985): a Gaussian's points keep their norm, which a straight
    line through the middle does not."""
    angle = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1).arccos()
    sine = angle.sin()
    # Of one direction, or of two opposite ones, the circle is not determined: straight on.
    straight = sine < 1e-4
    parts = [torch.where(straight, w, (w * angle).sin() / sine) for w in (1 - weight, weight)]
    return parts[0] * a + parts[1] * b
