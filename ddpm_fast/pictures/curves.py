"""The curve of a training: its loss over the training steps."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ddpm_fast.pictures.canvas import BLUE, WIDTH, look


def draw_loss(steps: Sequence[int], losses: Sequence[float]) -> Figure:
    """The loss over the training steps, both as they were logged. The loss is drawn logarithmically."""
    with look():
        figure = Figure((WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, losses, color=BLUE, linewidth=1)
        axes.set(title="Loss of the training", xlabel="training step", ylabel="mean loss", yscale="log")
        return figure
