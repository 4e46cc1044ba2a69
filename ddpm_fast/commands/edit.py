"""What `python -m ddpm_fast.sample` does to a picture: reads it, checks the options that belong to each way of editing,
and calls editing.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.data import read_picture
from ddpm_fast.data.arrays import read_arrays
from ddpm_fast.errors import InputError
from ddpm_fast.files.checkpoint import LoadedModel
from ddpm_fast.loops import editing

MODES = {  # the number of images if --n is not given; None: as many as there are pictures
    "image-to-image": 16,
    "inpainting": 16,
    "interpolation": 10,
    "round trip": None,
}


@dataclass(frozen=True)
class Edit:
    """The command's editing options, as given. Raises InputError for options that do not belong together."""

    init_image: Path
    strength: float | None = None
    mask: Path | None = None
    resamplings: int | None = None
    jump_length: int | None = None
    interpolate_with: Path | None = None
    round_trip: bool = False

    @classmethod
    def of(cls, init_image: Path | None, **options: Any) -> Edit | None:
        """The edit that the options ask for, or None without any of them."""
        if init_image is not None:
            return cls(init_image, **options)
        given = [name for name, value in options.items() if value not in (None, False)]
        if given:
            raise InputError(f"{_flag(given[0])} is for editing a picture: give the picture with --init-image")
        return None

    def __post_init__(self):
        modes = [name for name in ("mask", "interpolate_with", "round_trip") if getattr(self, name)]
        if len(modes) > 1:
            raise InputError(f"{' and '.join(map(_flag, modes))} are different edits: choose one")
        if self.mask is None and (self.resamplings is not None or self.jump_length is not None):
            name = "resamplings" if self.resamplings is not None else "jump_length"
            raise InputError(f"{_flag(name)} is for inpainting: give the mask with --mask, or leave it out")
        if self.strength is not None and self.mode in ("inpainting", "round trip"):
            raise InputError(
                f"--strength is for image-to-image and interpolation; {self.mode} goes all the way: leave it out"
            )

    @property
    def mode(self) -> str:
        """One of MODES."""
        if self.mask is not None:
            return "inpainting"
        if self.interpolate_with is not None:
            return "interpolation"
        return "round trip" if self.round_trip else "image-to-image"

    def check_others(self, sampler: str | None, guidance: float | None, n: int | None, labels: list | None) -> None:
        """Raises InputError for options of plain sampling that this edit cannot have."""
        if self.mode == "interpolation" and labels is not None and len(set(labels)) > 1:
            raise InputError("--labels: an interpolation is of one class, or of none: give one, or none")
        if not self.round_trip:
            return
        if sampler not in (None, "ddim"):
            raise InputError(f"--round-trip is DDIM's, not {sampler}'s: leave --sampler out")
        if guidance is not None:
            raise InputError("--round-trip undoes what the unguided model does: leave --guidance out")
        if n is not None:
            raise InputError("--round-trip takes each picture of --init-image once: leave --n out")

    def run(self, loaded: LoadedModel, pictures: Tensor, n: int, options: dict[str, Any]) -> Tensor:
        """The n edited images. pictures: read_images(init_image). options: those of sample()."""
        model, diffusion = loaded.model, loaded.diffusion
        images = pictures[torch.arange(n) % len(pictures)]
        given = {} if self.strength is None else {"strength": self.strength}
        if self.mode == "inpainting":
            mask = self._read_mask(loaded)
            names = [name for name in ("resamplings", "jump_length") if getattr(self, name) is not None]
            given = {name: getattr(self, name) for name in names}
            return editing.inpaint(model, diffusion, images, mask[torch.arange(n) % len(mask)], **given, **options)
        if self.mode == "interpolation":
            other = read_images(self.interpolate_with, loaded, "--interpolate-with")
            if len(pictures) + len(other) > 2:
                raise InputError(
                    f"--interpolate-with goes from one picture to one other; --init-image holds {len(pictures)} and it "
                    f"{len(other)}: give files of one each"
                )
            return editing.interpolate(model, diffusion, images[0], other[0], n, **given, **options)
        if self.mode == "round trip":
            kept = {name: options[name] for name in ("steps", "labels", "spacing", "batch_size", "cuda_graph")}
            latents = editing.encode(model, diffusion, images, **kept)
            return editing.decode(model, diffusion, latents, **kept, on_step=options["on_step"])
        return editing.image_to_image(model, diffusion, images, **given, **options)

    def _read_mask(self, loaded: LoadedModel) -> Tensor:
        mask = read_images(self.mask, loaded, "--mask", channels=1)
        wrong = int(((mask != 0) & (mask != 255)).sum())
        if wrong:
            raise InputError(
                f"--mask: {wrong} of the {mask.numel()} pixels of {self.mask} are neither white (kept) nor black "
                "(drawn): save it with these two alone, without smoothed edges, and not as JPEG"
            )
        return mask == 255


def read_images(path: Path, loaded: LoadedModel, option: str, channels: int | None = None) -> Tensor:
    """The picture of any image format at `path`, or the images of an .npz or .npy: uint8 [K, C, H, W].

    channels: None for the model's. Raises InputError naming the command's option for a file that is not there or not
    readable, another size than the model's, and colour where there is none.
    """
    config = loaded.model.config
    channels = config.in_channels if channels is None else channels
    if not path.is_file():
        raise InputError(f"{option}: there is no file {path}; give a picture, or an .npz with `images`")
    if path.suffix.lower() in (".npz", ".npy"):
        try:
            images = torch.from_numpy(read_arrays(path, None, None, None).images)
        except InputError as error:
            raise InputError(f"{option}: {error}") from error
    else:
        images = read_picture(path, option)[None]
    height, width = images.shape[2:]
    if (height, width) != (config.image_size, config.image_size):
        raise InputError(
            f"{option}: {path} is {width}x{height} pixels, and this model draws {config.image_size}x"
            f"{config.image_size}: crop or scale it to that size first"
        )
    if images.shape[1] == 3 and channels == 1 and (images == images[:, :1]).all():
        images = images[:, :1]  # grey, saved as colour
    if images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    if images.shape[1] != channels:
        kinds = {1: "grey", 3: "RGB"}
        found, expected = (kinds.get(c, f"{c} channels") for c in (images.shape[1], channels))
        raise InputError(f"{option}: {path} is {found}; expected {expected}: convert it first")
    return images


def round_trip_error(images: Tensor, pictures: Tensor) -> str:
    """How far images in [-1, 1] are from uint8 pictures, in words."""
    mse = (images.double() - (pictures.double() / 127.5 - 1)).square().mean().item()
    decibels = f"{10 * torch.log10(torch.tensor(4 / mse)).item():.1f} dB" if mse else "infinite"
    return f"Round trip: mean squared error {mse:.3g} (of values in [-1, 1]), PSNR {decibels}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
