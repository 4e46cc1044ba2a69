"""Quality against time as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from ddpm_fast.files.atomic import atomic_path

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"ours": "tab:blue", "theirs": "tab:orange"}
LABELS = {"ours": "ddpm_fast", "theirs": "diffusers' example, its own defaults"}


def draw(found: Mapping[str, Any], path: Path) -> Path:
    """Draw the Frechet distance of a speedrun against minutes and against images. Returns the path."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
    for axes, key, scale in ((panels[0], "seconds", 60.0), (panels[1], "images", 1000.0)):
        for name in COLOURS:
            lines = [line for line in found["runs"] if line["name"] == name and line["average"] == "own"]
            if lines:
                _curve(axes, sorted(lines, key=lambda line: line["images"]), name, key, scale)
        for result in found["results"]:
            axes.axhline(result["goal"], color="0.5", linewidth=1, linestyle=":")
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3, which="both")
    about = found["about"]
    panels[0].set(xlabel="minutes of training", ylabel=f"Frechet distance ({about['features']})")
    panels[1].set(xlabel="thousands of images seen")
    panels[1].legend(fontsize=8.5)
    figure.suptitle(f"{found['subject']}: distance of samples from {about['reference']}")
    with atomic_path(path) as target, target.open("wb") as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
    return path


def _curve(axes: Axes, lines: list[Mapping[str, Any]], name: str, key: str, scale: float) -> None:
    axes.plot(
        [line[key] / scale for line in lines],
        [line["fid"]["value"] for line in lines],
        "o-",
        color=COLOURS[name],
        label=LABELS[name],
        markersize=4,
    )
