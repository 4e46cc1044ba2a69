"""`--page` of `python -m ddpm_fast.evaluate fid` and the like: what was measured, as pictures on one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.commands.quality.files import FeaturesAlone
from ddpm_fast.commands.quality.quantities import measured
from ddpm_fast.commands.quality.samples import Images
from ddpm_fast.commands.quality.session import Outcome, Session
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import check_writable
from ddpm_fast.metrics import nearest, sample_densities
from ddpm_fast.pictures.page import HtmlPage

SHOWN = 64  # samples in the grid
_ROWS = 8  # samples beside their nearest images, of each choice
_NEAREST = 5  # images beside each of them
_EXTREMES = 24  # worst and best samples, each
_BALLS = 5  # a ball reaches to this nearest other real image, as for density
_WIDTH = 880  # pixels that a row of images may take
_MOST_COLUMNS = 16


def check_page(path: Path) -> None:
    """Raises InputError for a path (given as --page) that no page could be written to."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--page is {path}; expected a name ending in .html")
    check_writable(path)


def show(session: Session) -> None:
    """Let a session keep what the pictures need. Raises InputError for samples that are features alone."""
    if isinstance(session.stored, FeaturesAlone):
        raise InputError("--page shows pictures, and --samples is a file of features: leave one of them out")
    session.keeps |= {"features"}


@dataclass
class Gallery:
    """Samples and what they look like among real images.

    Attributes:
        outcome: The samples, and the features of them and of the real images.
        real: The real images, or None where only statistics of them are known.
        called: What the real images are called, such as "training images".
        batch_size: How many samples are drawn at a time where they are drawn anew.
    """

    outcome: Outcome
    real: Images | None
    called: str
    batch_size: int

    @classmethod
    def of(cls, session: Session, outcome: Outcome) -> Gallery:
        """That of what a session has measured."""
        reference = session.reference
        called = "training images" if reference is not None and reference.training_set else "reference images"
        return cls(outcome, None if reference is None else reference.images, called, session.request.batch_size)

    def add_to(self, page: HtmlPage) -> None:
        """Add the sections: a grid, the samples beside their nearest real images, and the worst and best of them."""
        count = len(self.outcome.samples)
        self._grid(page, f"The first {min(SHOWN, count)} samples", torch.arange(min(SHOWN, count)))
        fake, real = self._features()
        if fake is None or real is None or self.real is None:
            page.text("The reference is known by its statistics alone, so no real images can be shown.", note=True)
            return
        self._beside_nearest(page, fake, real)
        self._by_density(page, fake, real)

    def _features(self) -> tuple[Tensor | None, Tensor | None]:
        found = self.outcome.real
        return self.outcome.fake.features, None if found is None else found.features

    def _beside_nearest(self, page: HtmlPage, fake: Tensor, real: Tensor) -> None:
        assert self.real is not None
        distances, indices = nearest(fake, real, min(_NEAREST, len(real)))
        closest = distances[:, 0].argsort(stable=True)[:_ROWS]
        page.section(f"Samples beside their nearest {self.called}")
        page.text(
            f"The distance is that of the features. First the samples that are nearest to one of the {self.called}: if "
            "they are copies, it shows here. Then the first samples, as they come."
        )
        for title, chosen in (("nearest", closest), ("as they come", torch.arange(min(_ROWS, len(fake))))):
            samples = self._pictures(chosen)
            rows = [
                (
                    f"{title}: sample {i}",
                    samples[row],
                    _uint8(self.real.take(indices[i])),
                    ", ".join(f"{distance:.3g}" for distance in distances[i].tolist()),
                )
                for row, i in enumerate(chosen.tolist())
            ]
            page.rows_of_images(rows, ("sample", f"nearest {self.called}"))

    def _by_density(self, page: HtmlPage, fake: Tensor, real: Tensor) -> None:
        if len(real) <= _BALLS:
            return
        densities = sample_densities(real, fake, _BALLS)
        # Of those that lie in no ball, the farthest from every real image come first.
        far = nearest(fake, real, 1).distances[:, 0].argsort(descending=True, stable=True)
        order = far[densities[far].argsort(stable=True)]
        outside = float((densities == 0).double().mean())
        page.section("The worst and the best samples by density")
        page.text(
            f"A sample's density says in how many neighbourhoods of {self.called} it lies: in balls that reach from a "
            f"real image to its {_BALLS}th nearest other one. It is divided by {_BALLS}, so that it is about 1 where "
            f"samples are like real images. {outside:.1%} of the samples lie in no such neighbourhood."
        )
        for title, chosen in (("worst", order[:_EXTREMES]), ("best", order.flip(0)[:_EXTREMES])):
            low, high = (float(densities[chosen[i]]) for i in (0, -1))
            self._grid(page, f"The {title}: density {low:.2g} to {high:.2g}", chosen)

    def _grid(self, page: HtmlPage, title: str, chosen: Tensor) -> None:
        pictures = self._pictures(chosen)
        page.text(title)
        page.grid(pictures, _columns(pictures), title)

    def _pictures(self, chosen: Tensor) -> np.ndarray:
        """Samples by number: uint8 [k, H, W, C]."""
        parts = [self.outcome.samples.take(part) for part in chosen.split(self.batch_size)]
        return _uint8(torch.cat(parts))


def add_numbers(page: HtmlPage, report: Mapping[str, Any], errors: Mapping[str, float] | None = None) -> None:
    """Add what was measured, and what it was measured of.

    Args:
        page: The page.
        report: What report.report_of gives.
        errors: Standard errors of quantities that have none in the report, by their names.
    """
    rows = []
    for one in measured([report]):
        error = (errors or {}).get(one.name)
        text = one.text(report) + ("" if error is None or one.error is not None else f" ± {error:.2g}")
        rows.append([one.name, text, "lower" if one.lower_is_better else "higher"])
    page.section("Measured")
    page.table(["", "value", "better"], rows)
    page.facts(facts_of(report))
    bias = (report.get("fid") or {}).get("bias")
    if bias is not None:
        n = report["samples"]["n"]
        page.text(f"A Frechet distance of {n:,} samples is too large by about {bias:.3g}.", note=True)


def facts_of(report: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers of a report are of, in words."""
    samples, reference, features = (report[name] for name in ("samples", "reference", "features"))
    found = {"samples": f"{samples['n']:,} of {samples['name']}{_how(samples)}"}
    if reference is not None:
        count = "statistics" if reference["n"] is None else f"{reference['n']:,} images"
        known = {True: ", the training set", False: ", not the training set", None: ""}[reference["training_set"]]
        found["reference"] = f"{count} of {reference['name']}{known}"
    found["features"] = f"{features['name']}, {features['resizing']}"
    if features["digest"]:
        found["weights of the features"] = f"SHA-256 {features['digest']}"
    found["drawing"] = f"{report['seconds']['drawing']:.1f} s on {report['device']}"
    return found


def _how(samples: Mapping[str, Any]) -> str:
    """How samples were drawn."""
    if samples.get("sampler") is None:
        return ""
    guidance = "" if samples["guidance"] in (None, 1) else f", guidance {samples['guidance']:g}"
    return f": {samples['sampler']}, {samples['network_calls']} steps{guidance}, seed {samples['seed']}"


def _uint8(images: Tensor) -> np.ndarray:
    """uint8 [k, C, H, W] as [k, H, W, C]."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def _columns(pictures: np.ndarray) -> int:
    """How many of such images stand in a row."""
    return int(np.clip(_WIDTH // (2 * (pictures.shape[2] + 2)), 1, min(_MOST_COLUMNS, max(1, len(pictures)))))


def write_page(path: Path, session: Session, outcome: Outcome, report: Mapping[str, Any]) -> None:
    """Write the page of what a session has measured. report: what report.report_of gives."""
    page = HtmlPage(f"Samples of {outcome.samples.name}")
    add_numbers(page, report)
    page.section("Samples")
    Gallery.of(session, outcome).add_to(page)
    page.save(path)
