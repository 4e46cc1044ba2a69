"""Warnings about what is legal and almost always a mistake: training on one noise, and images in another range.

Each is given once in a process. Nothing here waits for a GPU, and nothing is looked at while a compiler traces.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ddpm_fast import compat
from ddpm_fast.noise import NoiseKey

_SAME_NOISE = 100  # losses with a gradient on one noise: it is a loop, and no test or second look at a batch
_KEYS = 1000  # how many keys are counted at a time
_LOOKS = 8  # how many batches are looked at
_LEAST_ELEMENTS = 256  # of a batch that says something of its range


class Notices:
    """What has been seen so far, and whether it has been said."""

    def __init__(self) -> None:
        self._met: dict[tuple[object, ...], int] = {}
        self._noise_was_said = False
        self._looks_left = _LOOKS

    def see_noise(self, noise: Tensor | NoiseKey, stacklevel: int) -> None:
        """Warns where many losses with a gradient have met the noise of one seed, step and first sample.

        Only keys that NoiseKey.of made are counted: they know their numbers as Python integers.
        """
        if self._noise_was_said or torch.compiler.is_compiling():
            return
        if not isinstance(noise, NoiseKey) or noise.made_of is None or noise.step.is_inference():
            return
        # A loop may have advanced a tensor of the key in place.
        changes = compat.changes_of(noise.step), compat.changes_of(noise.seed), compat.changes_of(noise.sample_id)
        met = noise.made_of, noise.stream, changes
        count = self._met[met] = self._met.get(met, 0) + 1
        if count >= _SAME_NOISE and not (noise.step.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._noise_was_said = True
            seed, step, first = noise.made_of
            warnings.warn(
                f"{count} training losses have met the same noise (seed {seed}, step {step}, samples from {first}): a "
                "network trained so learns that one noise by heart. Take a new key for each training step: for key in "
                "NoiseKey.each_step(seed, n), or NoiseKey.of(seed, n, step=i)",
                stacklevel=stacklevel + 1,
            )
        elif len(self._met) > _KEYS:
            self._met.clear()

    def see_images(self, x0: Tensor, stacklevel: int) -> None:
        """Warns where float images do not look as if they lay in [-1, 1]. Only the first few batches are looked at, and
        none on a GPU."""
        if not self._looks_left or torch.compiler.is_compiling():
            return
        if type(x0) is not Tensor or not x0.is_floating_point() or x0.device.type != "cpu":
            return
        if x0.numel() < _LEAST_ELEMENTS:
            return
        self._looks_left -= 1
        try:
            low, high = (float(end) for end in torch.aminmax(x0.detach()))
        except RuntimeError:  # there are no values to be read, as within torch.func.vmap
            return
        if 0 <= low < high <= 1:
            advice = "If the pixels are 0..1, give 2 * x0 - 1, or the uint8 pixels 0..255 as they are"
        elif low < -1.5 or high > 1.5:
            advice = (
                "Scale them, or give the uint8 pixels 0..255 as they are. (Latents may be larger; then sample with "
                "clip=False)"
            )
        else:
            return
        self._looks_left = 0
        warnings.warn(
            f"the images x0 range from {low:.4g} to {high:.4g}; the diffusion expects [-1, 1]. {advice}",
            stacklevel=stacklevel + 1,
        )


notices = Notices()
