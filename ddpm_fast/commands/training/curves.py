"""The curves of a run for TensorBoard, in the folder curves/."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from ddpm_fast.loops.metrics import Look

NAME = "curves"


class Curves:
    """The curves of one run.

    Attributes:
        name: What they are called where they cannot be written.
    """

    def __init__(self, folder: Path, step: int):
        """Nothing is written yet.

        Args:
            folder: The run's.
            step: The training step that the run goes on from.
        """
        self._folder, self._reached = folder / NAME, step
        self._writer: SummaryWriter | None = None
        self.name = f"the curves in {self._folder}"

    def look(self, look: Look, rate: float, waiting: float) -> None:
        """Add a point to each curve. Raises OSError if it cannot be written."""
        for tag, value in points(look, rate, waiting).items():
            self._open().add_scalar(tag, value, look.step)
        self._reached = look.step

    def quality(self, record: dict[str, Any]) -> None:
        """Add what was measured of the averaged weights. Raises OSError if it cannot be written."""
        for tag, value in quality_points(record).items():
            self._open().add_scalar(tag, value, record["step"])

    def grid(self, grid: np.ndarray, step: int) -> None:
        """Add a grid of samples, uint8 [H, W, C]. Raises OSError if it cannot be written."""
        self._open().add_image("samples", grid, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left. Raises OSError if it cannot be written."""
        if self._writer is not None:
            self._open().close()

    def _open(self) -> SummaryWriter:
        """What writes, and the folder, which may have been deleted. After a failure it is a new one."""
        writer, self._writer = self._writer, None
        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer = writer or SummaryWriter(self._folder, purge_step=self._reached + 1)
        return self._writer


def points(look: Look, rate: float, waiting: float) -> dict[str, float]:
    """The curves that a look adds a point to, and its height."""
    found = {"loss": look.loss}
    for number, quarter in enumerate(look.quarters or ()):
        if math.isfinite(quarter):  # no t of it was drawn
            found[f"loss by quarter of t/q{number}"] = quarter
    found["gradient norm"] = look.norm
    if look.skipped:
        found["training steps skipped"] = look.skipped
    return found | {"images a second": rate, "share of the time waiting for images": waiting}


def quality_points(record: dict[str, Any]) -> dict[str, float]:
    """The curves that an evaluation adds a point to, and its height."""
    found = {}
    if "kid" in record:
        found["quality/kernel distance"] = record["kid"]["value"]
        found["quality/Frechet distance"] = record["fid"]["value"]
        found |= {f"quality/{name}": value for name, value in record["pr"].items()}
    found |= {f"memorisation/{name}": value for name, value in record.get("memorisation", {}).items()}
    if "held_out" in record:
        found["held-out loss"] = record["held_out"]["loss"]
        for number, quarter in enumerate(record["held_out"]["quarters"]):
            if quarter is not None:
                found[f"held-out loss by quarter of t/q{number}"] = quarter
    return found
