"""How `python -m ddpm_fast.sample` edits a picture: reading it, checking the options of each edit, and preparing it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.commands.drawing import Drawable
from ddpm_fast.commands.labels import Turns
from ddpm_fast.data import Selection, load_dataset, read_picture
from ddpm_fast.errors import InputError
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.loops import editing
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.values import ValueRange

MODES = {  # the number of images if --n is not given; None: one for each picture
    "image-to-image": 16,
    "inpainting": 16,
    "interpolation": 10,
    "round trip": None,
}


@dataclass(frozen=True)
class Edit:
    """The command's editing options, as they were given.

    Raises:
        InputError: For options that do not belong together.
    """

    init_image: Path
    strength: float | None = None
    mask: Path | None = None
    resamplings: int | None = None
    jump_length: int | None = None
    interpolate_with: Path | None = None
    round_trip: bool = False

    @classmethod
    def of(
        cls,
        init_image: Path | None,
        *,
        strength: float | None = None,
        mask: Path | None = None,
        resamplings: int | None = None,
        jump_length: int | None = None,
        interpolate_with: Path | None = None,
        round_trip: bool = False,
    ) -> Edit | None:
        """The edit that the options ask for, or None without any of them."""
        if init_image is not None:
            return cls(init_image, strength, mask, resamplings, jump_length, interpolate_with, round_trip)
        options = {
            "strength": strength,
            "mask": mask,
            "resamplings": resamplings,
            "jump_length": jump_length,
            "interpolate_with": interpolate_with,
            "round_trip": round_trip,
        }
        given = [name for name, value in options.items() if value not in (None, False)]
        if given:
            raise InputError(f"{_flag(given[0])} is for editing a picture: give the picture with --init-image")
        return None

    def __post_init__(self) -> None:
        modes = [name for name in ("mask", "interpolate_with", "round_trip") if getattr(self, name)]
        if len(modes) > 1:
            raise InputError(f"{' and '.join(map(_flag, modes))} are different edits: choose one of them")
        if self.mask is None and (self.resamplings is not None or self.jump_length is not None):
            name = "resamplings" if self.resamplings is not None else "jump_length"
            raise InputError(f"{_flag(name)} is for inpainting: give the mask with --mask, or leave it out")
        if self.strength is not None and self.mode in ("inpainting", "round trip"):
            raise InputError(
                f"--strength is for image-to-image and interpolation, not for {self.mode}: leave --strength out"
            )

    @property
    def mode(self) -> str:
        """One of MODES."""
        if self.mask is not None:
            return "inpainting"
        if self.interpolate_with is not None:
            return "interpolation"
        return "round trip" if self.round_trip else "image-to-image"

    @property
    def continuable(self) -> bool:
        """Whether an image depends on its sample id alone, so that --first-sample-id draws further ones."""
        return self.mode in ("image-to-image", "inpainting")

    def settings(self, pictures: Tensor, n: int) -> dict[str, Any]:
        """All of the edit that an image depends on besides its sample id, as JSON's types.

        Args:
            pictures: read_images(init_image).
            n: The number of images.
        """
        return {
            "edit": self.mode,
            "pictures": hashlib.sha256(pictures.numpy().tobytes()).hexdigest(),
            "strength": self.strength,
            "mask": None if self.mask is None else hashlib.sha256(self.mask.read_bytes()).hexdigest(),
            "resamplings": self.resamplings,
            "jump_length": self.jump_length,
            "other": None
            if self.interpolate_with is None
            else hashlib.sha256(self.interpolate_with.read_bytes()).hexdigest(),
            "n": None if self.continuable else n,
        }

    @property
    def default_sampler(self) -> str:
        """The sampler if --sampler is not given."""
        return "ddim" if self.round_trip else "ddpm"

    def default_count(self, pictures: Tensor) -> int:
        """The number of images if --n is not given."""
        return MODES[self.mode] or len(pictures)

    def check_others(self, sampler: str | None, guidance: float | None, n: int | None, labels: Turns | None) -> None:
        """Raises InputError for options of plain sampling that this edit cannot have."""
        if self.mode == "interpolation" and labels is not None and len(labels.distinct) > 1:
            raise InputError(
                "--labels: an interpolation has one class for all images, or none: give one class, or none"
            )
        if not self.round_trip:
            return
        if sampler not in (None, "ddim"):
            raise InputError(f"--round-trip works with the sampler ddim alone, not with {sampler}: leave --sampler out")
        if guidance is not None:
            raise InputError("--round-trip reverses the unguided model: leave --guidance out")
        if n is not None:
            raise InputError("--round-trip uses each picture of --init-image once: leave --n out")

    def prepare(self, loaded: LoadedModel, pictures: Tensor, n: int, options: SamplingOptions) -> Drawable:
        """The n edited images, ready to be drawn. pictures: read_images(init_image). Raises InputError."""
        network, diffusion = Network.of(loaded.model), loaded.diffusion
        # By sample id, so that a set of images can be continued. A round trip and an interpolation start at the first.
        ids = [options.first_sample_id + i for i in range(n)]
        images = pictures[[i % len(pictures) for i in (ids if self.continuable else range(n))]]
        if self.mask is not None:
            mask = _read_mask(self.mask, loaded, pictures)
            return editing.prepare_inpaint(
                network,
                diffusion,
                images,
                mask[[i % len(mask) for i in ids]],
                options,
                resamplings=5 if self.resamplings is None else self.resamplings,
                jump_length=5 if self.jump_length is None else self.jump_length,
            )
        if self.interpolate_with is not None:
            other = _read_other(self.interpolate_with, loaded, pictures)
            return editing.prepare_interpolate(network, diffusion, images[0], other, n, options, strength=self.strength)
        if self.round_trip:
            return editing.prepare_round_trip(network, diffusion, images, options)
        strength = 0.5 if self.strength is None else self.strength
        return editing.prepare_image_to_image(network, diffusion, images, strength, options)


def read_images(
    path: Path, loaded: LoadedModel, option: str, channels: int | None = None, beside: Tensor | None = None
) -> Tensor:
    """The picture in a file of any image format, or the images of an .npz or .npy.

    Args:
        path: The file.
        loaded: The model that the images must fit.
        option: The command's option that named the file, for error messages.
        channels: How many channels to read; None for the model's.
        beside: The pictures of --init-image, whose size these must have; None where these are the ones.

    Returns:
        uint8 [K, C, H, W]; of a model of float data, what is not a mask is float32 in [-1, 1].

    Raises:
        InputError: For a file that is missing or unreadable, for images of a size that the model cannot draw, and for
            colour where grey is expected.
    """
    if channels is None and os.path.isfile(path) and loaded.value_range is not None:
        images = _read_values(path, loaded, loaded.value_range, option)
        _check_size(images, path, loaded, option, beside)
        return images
    images = read_bytes(path, option)
    _check_size(images, path, loaded, option, beside)
    return with_channels(images, loaded.shape[0] if channels is None else channels, path, option)


def read_bytes(path: Path, option: str) -> Tensor:
    """The picture in a file of any image format, or the images of an .npz or .npy: uint8 [K, C, H, W].

    Raises:
        InputError: For a file that is missing, unreadable or of floats.
    """
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise InputError(f"{option}: there is no file {path}; give a picture, or an .npz with `images`")
    if path.suffix.lower() not in (".npz", ".npy"):
        return read_picture(path, option)[None]
    try:
        images = load_dataset(path).images
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    if images.dtype != torch.uint8:
        raise InputError(f"{option}: {path} has floats; expected 8-bit images, as the model was trained on")
    return images


def with_channels(images: Tensor, channels: int, path: Path, option: str) -> Tensor:
    """Grey images and colour images as those of so many channels.

    Args:
        images: uint8 [K, C, H, W].
        channels: How many channels are expected.
        path: The file, for messages.
        option: The command's option that named it.

    Raises:
        InputError: If they are colour where grey is expected, or something else.
    """
    if images.shape[1] == 3 and channels == 1 and (images == images[:, :1]).all():
        images = images[:, :1]  # grey, saved as colour
    if images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    if images.shape[1] != channels:
        kinds = {1: "grey", 3: "RGB"}
        found, expected = (kinds.get(c, f"{c} channels") for c in (images.shape[1], channels))
        raise InputError(f"{option}: {path} is {found}; expected {expected}: convert it first")
    return images


def _check_size(images: Tensor, path: Path, loaded: LoadedModel, option: str, beside: Tensor | None) -> None:
    """Raises InputError for images of a size that the model cannot draw, or that others do not have."""
    height, width = images.shape[2:]
    found = f"{option}: {path} has a height of {height} and a width of {width} pixels"
    if beside is not None and images.shape[2:] != beside.shape[2:]:
        raise InputError(
            f"{found}, and --init-image {beside.shape[2]} and {beside.shape[3]}: crop or scale them to one size first"
        )
    if misfit := Network.of(loaded.model).misfit((loaded.shape[0], height, width)):
        raise InputError(f"{found}, but {misfit}: crop or scale it first")


def _read_values(path: Path, loaded: LoadedModel, value_range: ValueRange, option: str) -> Tensor:
    """The float images of an .npz or .npy, laid out as those that the model was trained on: [K, C, H, W] in [-1, 1]."""
    channels = loaded.shape[0]
    if path.suffix.lower() not in (".npz", ".npy"):
        raise InputError(f"{option}: this model was trained on floats: give an .npz or .npy of them, not {path}")
    try:
        dataset = load_dataset(path, selection=Selection(layout=value_range.layout, value_range=value_range.ends))
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    if dataset.shape[0] != channels:
        found = "x".join(map(str, dataset.shape))
        raise InputError(
            f"{option}: {path} has images of {found}; expected {channels} channels, as the model was trained on"
        )
    return dataset.batch(torch.arange(len(dataset)))[0]


def _read_other(path: Path, loaded: LoadedModel, pictures: Tensor) -> Tensor:
    """The second picture of an interpolation."""
    other = read_images(path, loaded, "--interpolate-with", beside=pictures)
    if len(pictures) + len(other) > 2:
        raise InputError(
            "--interpolate-with leads from one picture to one other, but --init-image holds "
            f"{len(pictures)} and --interpolate-with {len(other)}: give files of one picture each"
        )
    return other[0]


def _read_mask(path: Path, loaded: LoadedModel, pictures: Tensor) -> Tensor:
    """The mask of an inpainting: bool [K, 1, H, W]."""
    mask = read_images(path, loaded, "--mask", channels=1, beside=pictures)
    wrong = int(((mask != 0) & (mask != 255)).sum())
    if wrong:
        raise InputError(
            f"--mask: {wrong} of the {mask.numel()} pixels of {path} are neither white (kept) nor black "
            "(drawn): save the mask in these two colours only, without smoothed edges, and not as JPEG"
        )
    return mask == 255


def round_trip_error(images: Tensor, pictures: Tensor) -> str:
    """A sentence that says how far images in [-1, 1] are from pictures, which are uint8, or floats in [-1, 1]."""
    expected = pictures.double() / 127.5 - 1 if pictures.dtype == torch.uint8 else pictures.double()
    mse = (images.double() - expected).square().mean().item()
    decibels = f"{10 * torch.log10(torch.tensor(4 / mse)).item():.1f} dB" if mse else "infinite"
    return f"Round trip: mean squared error {mse:.3g} (of values in [-1, 1]), PSNR {decibels}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
