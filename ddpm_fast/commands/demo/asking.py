"""What a visitor asks for when something is drawn: read from the page's fields, checked, and turned into options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ddpm_fast.commands.demo.limits import BATCH_ELEMENTS, MOST_IMAGES, MOST_STEPS, choice, number, text, whole
from ddpm_fast.commands.labels import Turns, check_null_class, parse_labels
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.loops.options import SamplingOptions, Step
from ddpm_fast.samplers import SAMPLERS

LARGEST_SEED = 2**53 - 1  # the largest whole number that a browser sends as it is
STRONGEST_GUIDANCE = 20.0


@dataclass(frozen=True)
class Ask:
    """What is drawn, and how. Make one with Ask.of.

    Attributes:
        model: The name of a model that the page offers.
        labels: As the option --labels of the command: the empty text is every class in turn, or in an edit none.
        sampler: One of SAMPLERS.
        steps: How many sampling steps.
        eta: Of the sampler ddim; None for the others.
        guidance: The scale of the guidance; None for none.
        seed: Of the noise.
        n: How many images.
    """

    model: str
    labels: str
    sampler: str
    steps: int
    eta: float | None
    guidance: float | None
    seed: int
    n: int

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Ask:
        """What the fields of the page say, each named as the attribute.

        Raises:
            InputError: For whatever is none of the choices, no number, or out of range.
        """
        sampler = choice("The sampler", values["sampler"], list(SAMPLERS))
        guidance = number("Guidance", values["guidance"], 0, STRONGEST_GUIDANCE)
        return cls(
            model=text("The model", values["model"]),
            labels=text("Labels", values["labels"]),
            sampler=sampler,
            steps=whole("The number of steps", values["steps"], 1, MOST_STEPS),
            eta=number("eta", values["eta"], 0, 1) if sampler == "ddim" else None,
            guidance=None if guidance == 1 else guidance,
            seed=whole("The seed", values["seed"], 0, LARGEST_SEED),
            n=whole("The number of images", values["n"], 1, MOST_IMAGES),
        )

    def classes(self, loaded: LoadedModel, is_edit: bool = False) -> Turns | None:
        """The class of each image, or None for none.

        Args:
            loaded: The model.
            is_edit: Whether a picture is edited: then no text means no classes, and not every class in turn.

        Raises:
            InputError: For labels, or a lack of them, that the model was not trained for.
        """
        given = self.labels or ("none" if is_edit and loaded.classes else None)
        classes = parse_labels(given, self.n, loaded.classes, loaded.label_names)
        if self.guidance is not None:
            check_null_class(loaded, "guidance leads away from the null class")
        if classes is None:
            check_null_class(loaded, "without labels the null class is used")
        return classes

    def options(
        self, loaded: LoadedModel, classes: Turns | None, on_step: Callable[[Step], None] | None = None
    ) -> SamplingOptions:
        """The options of sampling and editing. Raises InputError where they do."""
        return SamplingOptions(
            sampler=self.sampler,
            steps=self.steps,
            eta=self.eta,
            guidance=self.guidance,
            seed=self.seed,
            labels=None if classes is None else classes.tensor(),
            batch_size=batch_size(loaded, self.n),
            on_step=on_step,
        )


def batch_size(loaded: LoadedModel, n: int) -> int:
    """How many of n images are drawn at a time: all of them, unless they are large."""
    channels, height, width = loaded.shape
    return max(1, min(n, BATCH_ELEMENTS // (channels * height * width)))
