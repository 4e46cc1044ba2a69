"""What a place looks like that the course of a training run is written to."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ddpm_fast.loops.metrics import Look


class Record(Protocol):
    """A place that the course of a run is written to. Its methods raise OSError or InputError where that fails."""

    name: str

    def look(self, look: Look, rate: float, waiting: float) -> None:
        """Add metrics, with the images per second and the share of the time that was spent waiting for them."""

    def quality(self, record: dict[str, Any]) -> None:
        """Add an evaluation."""

    def grid(self, grid: np.ndarray, step: int) -> None:
        """Add a grid of samples, uint8 [H, W, C]."""

    def close(self) -> None:
        """Nothing more will be added."""
