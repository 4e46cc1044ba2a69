"""The figure of a sweep over the widths of an average: how good the model is against the width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from ddpm_fast.pictures.canvas import BLUE, DASHES, VERMILION, WIDTH, look, without_math

_HEIGHT = 3.6  # inches


@dataclass(frozen=True)
class Measured:
    """What was measured of the average of one width.

    Attributes:
        width: The width.
        value: What was measured.
        error: Its standard error, or None.
    """

    width: float
    value: float
    error: float | None = None


def draw_widths(
    points: Sequence[Measured], quantity: str, lower_is_better: bool, plain: float | None = None, title: str = ""
) -> Figure:
    """A line through what was measured, with its best point in a ring.

    Args:
        points: At least one.
        quantity: What was measured.
        lower_is_better: Whether a smaller value means a better model.
        plain: The same of the model that the run has written itself, a dashed line; or None.
        title: What the figure is of.
    """
    points = sorted(points, key=lambda point: point.width)
    best = min(points, key=lambda point: point.value if lower_is_better else -point.value)
    with look():
        figure = Figure((WIDTH, _HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.errorbar(
            [point.width for point in points],
            [point.value for point in points],
            yerr=[point.error or 0.0 for point in points],
            color=BLUE,
            marker="o",
            markersize=4.5,
            capsize=2.5,
            elinewidth=1,
            label="average of that width",
        )
        axes.plot(
            best.width,
            best.value,
            marker="o",
            markersize=11,
            color="none",
            markeredgecolor="black",
            label=f"the best: width {best.width:g}",
        )
        if plain is not None:
            axes.axhline(plain, color=VERMILION, linestyle=DASHES, label="the run's own model.safetensors")
        axes.set_xlabel("width of the average, as a share of the training")
        axes.set_ylabel(quantity)
        axes.set_title(
            f"{without_math(title)}{'; ' if title else ''}{'lower' if lower_is_better else 'higher'} is better"
        )
        axes.legend(frameon=False, fontsize=9)
        return figure
