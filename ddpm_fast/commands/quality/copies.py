"""The test for copies on a card: whether samples are nearer to the training images than held-out images are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddpm_fast.metrics import Memorisation, memorisation, nearest
from ddpm_fast.metrics.memorisation import COPY_QUANTILE
from ddpm_fast.pictures.copies import draw_distances
from ddpm_fast.pictures.page import HtmlPage


@dataclass(frozen=True)
class Copies:
    """What the test found.

    Attributes:
        found: Of the samples.
        yardstick: float [h], the distance of each held-out image from its nearest training image.
    """

    found: Memorisation
    yardstick: Tensor

    @classmethod
    def of(cls, fake: Tensor, training: Tensor, held_out: Tensor) -> Copies:
        """Of the features of samples, training images and held-out images, [n, d] each. Raises InputError."""
        return cls(memorisation(fake, training, held_out), nearest(held_out, training).distances[:, 0])

    def report(self) -> dict[str, Any]:
        """In JSON's types."""
        found = self.found
        return {
            "copies": found.copies,
            "copies_of_held_out": float((self.yardstick < found.threshold).double().mean()),
            "threshold": found.threshold,
            "nearer": found.nearer,
            "z": found.z,
            "median_distance": float(found.distances.median()),
            "median_distance_of_held_out": float(self.yardstick.median()),
            "held_out": len(self.yardstick),
        }

    def add_to(self, page: HtmlPage) -> None:
        """Add a section."""
        report = self.report()
        page.section("Copies of training images")
        page.text(
            "Each sample's distance from its nearest training image, beside that of images which the model was not "
            f"trained on. A sample counts as a copy if it is nearer than all but {COPY_QUANTILE:.0%} of the held-out "
            "images are."
        )
        page.table(
            ["", "samples", "held-out images"],
            [
                ["images", f"{len(self.found.distances):,}", f"{report['held_out']:,}"],
                ["copies", f"{report['copies']:.2%}", f"{report['copies_of_held_out']:.2%}"],
                ["median distance", f"{report['median_distance']:.4g}", f"{report['median_distance_of_held_out']:.4g}"],
            ],
        )
        page.text(
            f"A sample is nearer than a held-out image with probability {report['nearer']:.3f}: 0.5 would be as new, 1 "
            f"all copies (Mann and Whitney's z is {report['z']:.2f}; Meehan et al. 2020)."
        )
        figure = draw_distances(self.found.distances.numpy(), self.yardstick.numpy(), self.found.threshold)
        page.figure(figure, "The distances of samples and of held-out images from the nearest training image")
