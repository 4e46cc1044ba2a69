"""The figure of the test for copies: how far samples are from the training images, and how far held-out images are."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddpm_fast.pictures.canvas import BLUE, DASHES, VERMILION, WIDTH, look, name_lines


def draw_distances(samples: np.ndarray, held_out: np.ndarray, threshold: float) -> Figure:
    """The share of the samples, and of the held-out images, that are nearer to a training image than a distance.

    If the line of the samples lies to the left, they are nearer to the training images than new images are.

    Args:
        samples: The distance of each sample from its nearest training image, [n].
        held_out: That of each held-out image, [h].
        threshold: The distance below which a sample counts as a copy.
    """
    with look():
        figure = Figure((WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        _draw_share(axes, held_out, VERMILION, "held-out images")
        _draw_share(axes, samples, BLUE, "samples")
        axes.axvline(threshold, color="0.5", linestyle=DASHES, linewidth=1, label="copies are nearer than this")
        axes.set(
            title="Distance from the nearest training image",
            xlabel="distance of the features",
            ylabel="share that is nearer",
            ylim=(0, 1),
            xlim=(0, None),
        )
        return name_lines(figure)


def _draw_share(axes: Axes, distances: np.ndarray, colour: str, label: str) -> None:
    """Draw the share of the distances up to each, as steps."""
    ordered = np.sort(distances)
    shares = np.arange(len(ordered) + 1) / max(1, len(ordered))
    axes.plot(np.concatenate([ordered[:1], ordered]), shares, color=colour, label=label, drawstyle="steps-post")
