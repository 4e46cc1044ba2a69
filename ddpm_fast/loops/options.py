"""The options of sampling and editing: named, documented and checked in this one place.

sample(), every edit, the commands and the sample grids of training build a SamplingOptions, which checks itself as soon
as it is made. The public functions take its fields as keyword arguments; the typed dictionaries at the end of this file
tell editors and type checkers which ones each function takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from ddpm_fast.errors import InputError, check_integer, check_number
from ddpm_fast.noise import MAX_SAMPLE_ID
from ddpm_fast.respacing import TimestepSpec, check_spacing
from ddpm_fast.samplers import check_sampler


class Step(NamedTuple):
    """What on_step is given after each sampler row of each batch. The tensors are copies, which nothing overwrites.

    Attributes:
        first: The number of the batch's first sample among the n samples, from 0.
        index: The sampler row that was run, from 0.
        t: The timestep of that row, as the network was told it.
        x: The state after the row: fp32 [N, C, ...].
        x0: The x_0 predicted in the row, after clipping or thresholding, shaped like x. None for a row that does not
            call the network (only inpainting has such rows: they add noise).
    """

    first: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which a Step has no use for
    t: int
    x: Tensor
    x0: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)  # no ==: labels may be a tensor, whose comparison is no single answer
class SamplingOptions:
    """How images are drawn. Frozen, and checked when it is made: all that can be checked without knowing the model.

    Attributes:
        sampler: One of ddpm_fast.samplers.SAMPLERS.
        steps: How many timesteps to visit, or which: a number, sections "10,15,20", a stride "ddim50", or a list that
            ends at T-1; see respacing.sampling_timesteps. None for all T. Fewer are faster and coarser.
        spacing: How a number of steps is spaced: "even", or "quadratic", which is denser near the image.
        eta: How much noise "ddim" adds, from 0 (the default) to 1. Only for that sampler.
        clip: Whether the predicted x_0 is clipped to [-1, 1] in every row.
        guidance: The scale w of classifier-free guidance towards the labels. None and 1 are no guidance, 0 ignores the
            labels, and above 1 the network is called on a batch of twice the size. See guidance.py.
        guidance_rescale: How far the guided output is brought back to the standard deviation of the unguided one, from
            0 (not at all) to 1 (fully).
        dynamic_threshold: A quantile in (0, 1] such as 0.995, for large guidance. It replaces the clip.
        null_label: The class that stands for "no class". Only for a network of your own; a UNet knows its null class.
        classifier: A classifier of noised images that guides towards the labels: a Classifier, or any module or
            function of (x, t) that gives logits [N, classes]. See classifier_guidance.py. None for none.
        classifier_scale: The factor of its gradient: at least 0, which is no guidance, and 1 if not given.
        condition: The second image that a network with condition_channels is given, such as the small image that an
            upsampler enlarges: [n or 1, condition_channels, h, w], floats about in [-1, 1] or uint8. It is scaled to
            the samples' size, bilinearly.
        seed: The seed of the noise: an int of up to 64 bits.
        first_sample_id: The sample id of the first image. Image i has the noise of id first_sample_id + i.
        labels: One class for all images, or one for each. None draws unconditionally.
        batch_size: How many images to draw at a time. None for all at once.
        shape: The shape of one sample, (C, ...). A network of your own needs it. A UNet knows the one that it was made
            for, and draws samples of every height and width that its levels halve.
        on_step: Called with a Step after each sampler row of each batch. It does not change the images.
        cuda_graph: Whether the rows are replayed from CUDA graphs, which gives the same images bit for bit. None:
            wherever that is possible (where it is not, the logger "ddpm_fast.graphs" says why). True: where it is not
            possible, raise InputError. False: never.
        compile: Whether the network is called through torch.compile, which gives the same images to rounding. It takes
            up to a minute for the first batch of each size, and needs a C++ compiler, or on a GPU Triton and a C
            compiler.

    Raises:
        InputError: For an unknown sampler or spacing, an eta that does not belong to the sampler, a number outside its
            range, a guidance_rescale without guidance, a seed of more than 64 bits, or a sample id out of range.
    """

    sampler: str = "ddpm"
    steps: TimestepSpec | None = None
    spacing: str = "even"
    eta: float | None = None
    clip: bool = True
    guidance: float | None = None
    guidance_rescale: float = 0.0
    dynamic_threshold: float | None = None
    null_label: int | None = None
    classifier: Callable[..., Any] | None = None
    classifier_scale: float | None = None
    condition: Tensor | None = None
    seed: int = 0
    first_sample_id: int = 0
    labels: int | Sequence[int] | Tensor | None = None
    batch_size: int | None = None
    shape: tuple[int, ...] | None = None
    on_step: Callable[[Step], None] | None = None
    cuda_graph: bool | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.eta)
        check_spacing(self.spacing)
        self._integer("batch_size", 1)
        self._integer("null_label", 0)
        # How many samples follow is not known here.
        self._integer("first_sample_id", 0, MAX_SAMPLE_ID - 1)
        self._integer("seed", -(2**63), 2**64 - 1)
        self._number("dynamic_threshold", lambda v: 0 < v <= 1, "a quantile in (0, 1], such as 0.995, or None")
        self._number("guidance_rescale", lambda v: 0 <= v <= 1, "0 (not at all) to 1 (fully)")
        least = "a finite number of at least 0 (1 is no guidance; 1.5 to 8 are common)"
        self._number("guidance", lambda v: 0 <= v < math.inf, least)
        if self.guidance is None and self.guidance_rescale:
            raise InputError(
                f"guidance_rescale is {self.guidance_rescale} without guidance: give guidance too, or leave "
                "guidance_rescale out"
            )

        self._number("classifier_scale", lambda v: 0 <= v < math.inf, "a finite number of at least 0 (no guidance)")
        if self.classifier is None and self.classifier_scale is not None:
            raise InputError(
                f"classifier_scale is {self.classifier_scale} without a classifier: give classifier too, or leave "
                "classifier_scale out"
            )

    def _integer(self, name: str, low: int, high: int | None = None) -> None:
        """Checks a field that is an integer or None, and keeps it as a Python int."""
        if (value := getattr(self, name)) is not None:
            object.__setattr__(self, name, check_integer(name, value, low, high))

    def _number(self, name: str, is_allowed: Callable[[float], bool], expected: str) -> None:
        """Checks a field that is a real number or None, and keeps it as a Python float."""
        if (value := getattr(self, name)) is not None:
            object.__setattr__(self, name, check_number(name, value, is_allowed, expected))


class EncodingKeywords(TypedDict, total=False):
    """The keyword arguments of encode(): see SamplingOptions."""

    spacing: str
    clip: bool
    condition: Tensor | None
    batch_size: int | None
    cuda_graph: bool | None
    compile: bool


class DecodingKeywords(EncodingKeywords, total=False):
    """The keyword arguments of decode(): see SamplingOptions."""

    guidance: float | None
    guidance_rescale: float
    dynamic_threshold: float | None
    null_label: int | None
    classifier: Callable[..., Any] | None
    classifier_scale: float | None
    seed: int
    first_sample_id: int
    on_step: Callable[[Step], None] | None


class EditingKeywords(DecodingKeywords, total=False):
    """The keyword arguments of image_to_image(), inpaint() and interpolate(): see SamplingOptions."""

    sampler: str
    steps: TimestepSpec | None
    eta: float | None
    labels: int | Sequence[int] | Tensor | None


class SamplingKeywords(EditingKeywords, total=False):
    """The keyword arguments of sample(), which are the fields of SamplingOptions."""

    shape: tuple[int, ...] | None


def check_keywords(given: Mapping[str, object], allowed: Any) -> None:
    """Raises TypeError, as Python does, for keyword arguments that a function with **options does not take.

    Args:
        given: The keyword arguments.
        allowed: The typed dictionary of those that the function takes.
    """
    if unexpected := given.keys() - allowed.__optional_keys__:
        raise TypeError(
            f"unexpected keyword arguments {', '.join(sorted(unexpected))}; expected some of "
            f"{', '.join(sorted(allowed.__optional_keys__))}"
        )
