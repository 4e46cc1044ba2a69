"""The small figures of the page. Each is one panel: panels stand side by side on a wide screen, and below each other on
a telephone."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddpm_fast.commands.demo.runs import Curve
from ddpm_fast.commands.demo.schedules import log_snr
from ddpm_fast.errors import printable
from ddpm_fast.pictures.canvas import BLUE, DASHES, figure_png, look, name_lines, without_math
from ddpm_fast.pictures.figures import SCHEDULE_COLOURS
from ddpm_fast.schedule import Schedule

_SIZE = (4.6, 3.0)  # inches
_DPI = 110
_drawing = threading.Lock()  # canvas.look() sets settings of matplotlib that all threads share


def draw_alpha_bar(schedules: Sequence[Schedule], t: int) -> bytes:
    """alpha_bar over the timesteps, with a mark at t, as a PNG."""
    with _drawing, look():
        figure, axes = _panel(r"Share of the image that is left: $\bar\alpha_t$")
        _draw_lines(axes, schedules, [schedule.alphas_cumprod.numpy() for schedule in schedules], t)
        return figure_png(name_lines(figure))


def draw_log_snr(schedules: Sequence[Schedule], t: int) -> bytes:
    """log10 of the signal-to-noise ratio over the timesteps, with a mark at t, as a PNG."""
    with _drawing, look():
        figure, axes = _panel(r"Signal to noise: $\log_{10}(\bar\alpha_t / (1 - \bar\alpha_t))$")
        _draw_lines(axes, schedules, [log_snr(schedule) for schedule in schedules], t)
        return figure_png(name_lines(figure))


def draw_curve(name: str, curve: Curve) -> bytes:
    """A curve of a training over its steps, as a PNG. Losses and norms that span a power of ten are on a log axis."""
    steps, values = curve
    with _drawing, look():
        figure, axes = _panel(without_math(printable(name.replace("_", " "))))
        axes.plot(steps, values, color=BLUE, linewidth=1, marker="o" if len(steps) < 10 else None, markersize=3)
        is_log = ("loss" in name or "norm" in name) and 0 < 10 * min(values) < max(values)
        axes.set(xlabel="training step", yscale="log" if is_log else "linear")
        return figure_png(figure)


def _panel(title: str) -> tuple[Figure, Axes]:
    figure = Figure(_SIZE, dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _draw_lines(axes: Axes, schedules: Sequence[Schedule], tables: Sequence[np.ndarray], t: int) -> None:
    for schedule, table in zip(schedules, tables, strict=True):
        kind = schedule.source["kind"]
        axes.plot(table, color=SCHEDULE_COLOURS.get(kind, "black"), label=kind)
        if np.isfinite(table[t]):
            axes.plot([t], [table[t]], "o", color=SCHEDULE_COLOURS.get(kind, "black"), label="_")
    axes.axvline(t, color="0.5", linestyle=DASHES, linewidth=1, label="_")
    axes.set(xlabel="timestep t", xlim=(0, len(tables[0]) - 1))
