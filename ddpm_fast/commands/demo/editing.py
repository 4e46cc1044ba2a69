"""The edits of the page: what a visitor asks for, and the package's own loops (loops/editing/) ready to draw it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ddpm_fast.commands.demo.asking import Ask
from ddpm_fast.commands.demo.limits import MOST_RESAMPLINGS, MOST_STEPS, number, whole
from ddpm_fast.commands.drawing import Drawable
from ddpm_fast.errors import InputError
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.loops import editing
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import Step

KINDS = ("image to image", "inpainting", "interpolation")


@dataclass(frozen=True)
class Edit:
    """An edit, with its pictures as the model takes them.

    Attributes:
        kind: One of KINDS.
        picture: uint8 [C, H, W], the first or only picture.
        mask: Inpainting: bool [H, W], True where a pixel is kept.
        other: Interpolation: uint8 [C, H, W], the second picture.
        strength: Image to image and interpolation: how much noise is added, up to 1.
        resamplings: Inpainting: how often each stretch of steps is run.
        jump_length: Inpainting: how many steps a stretch has.
    """

    kind: str
    picture: Tensor
    mask: Tensor | None = None
    other: Tensor | None = None
    strength: float = 0.5
    resamplings: int = 5
    jump_length: int = 5

    @classmethod
    def of(
        cls, kind: str, values: Mapping[str, object], picture: Tensor, mask: Tensor | None, other: Tensor | None
    ) -> Edit:
        """The edit that the fields of the page ask for.

        Args:
            kind: One of KINDS.
            values: The fields, each named as the attribute.
            picture, mask, other: See Edit.

        Raises:
            InputError: For a number that is none or out of range.
        """
        if kind == "inpainting":
            return cls(
                kind,
                picture,
                mask=mask,
                resamplings=whole("Resamplings", values["resamplings"], 1, MOST_RESAMPLINGS),
                jump_length=whole("The length of a stretch", values["jump_length"], 1, MOST_STEPS),
            )
        return cls(kind, picture, other=other, strength=number("The strength", values["strength"], 0.01, 1))

    def prepare(self, ask: Ask, loaded: LoadedModel, on_step: Callable[[Step], None] | None = None) -> Drawable:
        """The edited images, ready to be drawn.

        Raises:
            InputError: Where the edit does, and for an interpolation of several classes.
        """
        classes = ask.classes(loaded, is_edit=True)
        if self.kind == "interpolation" and classes is not None and len(classes.distinct) > 1:
            raise InputError("an interpolation has one class for all images, or none: give one label, or none")
        network, diffusion = Network.of(loaded.model), loaded.diffusion
        options = ask.options(loaded, classes, on_step)
        images = self.picture.expand(ask.n, -1, -1, -1)
        if self.kind == "inpainting":
            assert self.mask is not None
            return editing.prepare_inpaint(
                network,
                diffusion,
                images,
                self.mask,
                options,
                resamplings=self.resamplings,
                jump_length=self.jump_length,
            )
        if self.kind == "interpolation":
            assert self.other is not None
            return editing.prepare_interpolate(
                network, diffusion, self.picture, self.other, ask.n, options, strength=self.strength
            )
        return editing.prepare_image_to_image(network, diffusion, images, self.strength, options)
