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
sample command keeps the two apart; the public functions do one after the other. start.py has what they share.
"""

from ddpm_fast.loops.editing.inpainting import inpaint, prepare_inpaint
from ddpm_fast.loops.editing.interpolation import LatentInterpolation, interpolate, prepare_interpolate
from ddpm_fast.loops.editing.latents import (
    RoundTrip,
    decode,
    encode,
    prepare_decode,
    prepare_encode,
    prepare_round_trip,
)
from ddpm_fast.loops.editing.sdedit import image_to_image, prepare_image_to_image

__all__ = [
    "LatentInterpolation",
    "RoundTrip",
    "decode",
    "encode",
    "image_to_image",
    "inpaint",
    "interpolate",
    "prepare_decode",
    "prepare_encode",
    "prepare_image_to_image",
    "prepare_inpaint",
    "prepare_interpolate",
    "prepare_round_trip",
]
