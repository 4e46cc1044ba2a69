"""The figure of a sweep over ways of drawing: how good the images are against the steps, the time and the guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ddpm_fast.pictures.canvas import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, WIDTH, look, without_math

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_MARKERS = "osD^vP"
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_RING: dict[str, Any] = {
    "marker": "o",
    "markersize": 10,
    "color": "none",
    "markeredgecolor": "black",
    "linestyle": "none",
}
_ROW = 2.7  # inches
_TOP = 0.9


@dataclass(frozen=True)
class Quantity:
    """What was measured of the images.

    Attributes:
        name: What it is called.
        lower_is_better: Whether a smaller value means better images.
    """

    name: str
    lower_is_better: bool


@dataclass(frozen=True)
class Point:
    """The images that were drawn in one way.

    Attributes:
        series: The line that the point belongs to, such as the sampler.
        calls: How often the network was called for an image, without the calls of the guidance.
        seconds: Seconds for an image.
        guidance: The scale of the guidance; 1 is none.
        values: What was measured, by the quantity's name.
        errors: The standard error or deviation of values that have one.
    """

    series: str
    calls: int
    seconds: float
    guidance: float
    values: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Panel:
    label: str
    where: Callable[[Point], float]
    group: Callable[[Point], float]  # points of one group are alternatives, of which the best is on the line
    logarithmic: bool


def _calls(point: Point) -> float:
    return point.calls


def _guidance(point: Point) -> float:
    return point.guidance


_STEPS = _Panel("sampling steps", _calls, _calls, logarithmic=True)
_SECONDS = _Panel("seconds an image", lambda point: point.seconds, _calls, logarithmic=True)
_GUIDANCE = _Panel("guidance", _guidance, _guidance, logarithmic=False)


def draw_sweep(
    points: Sequence[Point], quantities: Sequence[Quantity], best: Point | None = None, title: str = ""
) -> Figure:
    """Each quantity in a row of panels: against the steps, the seconds an image and the guidance, as far as they vary.

    There is a line for each series. Of the points of a series with the same number of steps, such as those of several
    guidances, the line goes through the best, and the others are faint; in the panel of the guidance that holds for the
    points of the same guidance.

    Args:
        points: At least one.
        quantities: At least one; a point that lacks a quantity is left out of its row.
        best: The point to mark, one of `points`.
        title: What the figure is of.
    """
    panels = [panel for panel in (_STEPS, _SECONDS, _GUIDANCE) if len({panel.where(one) for one in points}) > 1]
    panels = panels or [_SECONDS]
    series = list(dict.fromkeys(point.series for point in points))
    with look():
        height = _TOP + _ROW * len(quantities)
        figure = Figure((WIDTH, height), layout="constrained")
        grid = figure.subplots(len(quantities), len(panels), squeeze=False, sharey="row")
        for row, quantity in zip(grid, quantities, strict=True):
            for axes, panel in zip(row, panels, strict=True):
                for number, name in enumerate(series):
                    own = [one for one in points if one.series == name and quantity.name in one.values]
                    _draw_series(axes, panel, quantity, own, number)
                if best is not None and quantity.name in best.values:
                    _ring(axes, panel.where(best), best.values[quantity.name])
                _finish(axes, panel, [panel.where(one) for one in points])
            row[0].set_ylabel(quantity.name)
            row[0].set_title(f"{quantity.name}: {'lower' if quantity.lower_is_better else 'higher'} is better")
        handles = [Line2D([], [], label=without_math(name), **_style(number)) for number, name in enumerate(series)]
        if best is not None:
            handles.append(Line2D([], [], label="the best of all", **_RING))
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=min(4, len(handles)),
            frameon=False,
            fontsize=9,
            title=without_math(title),
            alignment="left",
        )
        return figure


def _draw_series(axes: Axes, panel: _Panel, quantity: Quantity, points: Sequence[Point], number: int) -> None:
    """Draw the points of one series, and its line."""
    line = _line(panel, quantity, points)
    style = _style(number)
    others = [one for one in points if one not in line]
    axes.plot(
        [panel.where(one) for one in others],
        [one.values[quantity.name] for one in others],
        color=style["color"],
        marker=style["marker"],
        linestyle="none",
        markersize=3.5,
        alpha=0.3,
        label="_others",
    )
    axes.errorbar(
        [panel.where(one) for one in line],
        [one.values[quantity.name] for one in line],
        yerr=[one.errors.get(quantity.name, 0.0) for one in line],
        capsize=2.5,
        elinewidth=1,
        label=without_math(points[0].series) if points else "_none",
        **style,
    )


def _line(panel: _Panel, quantity: Quantity, points: Sequence[Point]) -> list[Point]:
    """The points that the line of a series goes through, from left to right."""

    def cost(point: Point) -> float:
        return point.values[quantity.name] * (1 if quantity.lower_is_better else -1)

    groups = {panel.group(one) for one in points}
    line = [min((one for one in points if panel.group(one) == group), key=cost) for group in groups]
    return sorted(line, key=panel.where)


def _style(number: int) -> dict[str, Any]:
    """How the line of a series is drawn."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4.5,
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
        "linewidth": 1.5,
    }


def _ring(axes: Axes, x: float, y: float) -> None:
    """Mark the best point by a ring."""
    axes.plot(x, y, label="_best", **_RING)


def _finish(axes: Axes, panel: _Panel, places: Sequence[float]) -> None:
    """Label the horizontal axis of a panel."""
    axes.set_xlabel(panel.label)
    if not panel.logarithmic:
        return
    axes.set_xscale("log")
    if panel is _STEPS:
        axes.set_xticks(sorted(set(places)))
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
