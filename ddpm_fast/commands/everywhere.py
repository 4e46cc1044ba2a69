"""What several ranks draw into one folder, counted by the one that shows the progress bar of all."""

from __future__ import annotations

import time
from collections.abc import Callable

from ddpm_fast.commands.ranks import Ranks
from ddpm_fast.pictures.folder import SampleFolder

# The folder is listed once a second, and where that is slow for no more than this share of the time.
_PAUSE, _SHARE = 1.0, 0.02
# Seconds without a new image after which the other ranks are not waited for: this, and three times what a batch takes.
PATIENCE, _BATCHES = 60.0, 3
# Seconds for a batch of which nothing is known, because this rank had none to draw.
_UNKNOWN = 300.0
_LOOK = 0.2  # seconds between two looks at the signals while waiting


class Everywhere:
    """The images that all ranks draw together.

    Attributes:
        ranks: This process, and how many there are.
        n: How many images were missing at the beginning.
    """

    def __init__(self, folder: SampleFolder, n: int, ranks: Ranks):
        """Begin to count. n: how many images the folder is to have."""
        self.ranks, self.n = ranks, n - folder.finished
        self._folder, self._before, self._finished = folder, folder.finished, 0
        self._next_look = self._last_change = time.monotonic()

    def finished(self, now: bool = False) -> int:
        """How many images were finished since the beginning. now: whether to look, however short ago the last look."""
        started = time.monotonic()
        if now or started >= self._next_look:
            finished = max(0, self._folder.count() - self._before)
            ended = time.monotonic()
            self._next_look = ended + max(_PAUSE, (ended - started) / _SHARE)
            if finished != self._finished:
                self._finished, self._last_change = finished, ended
        return self._finished

    def wait(self, check: Callable[[], object], show: Callable[[], object], slowest: float) -> None:
        """Wait until all images are there, or nobody seems to draw any.

        Args:
            check: Called again and again. What it raises ends the waiting.
            show: Called after it.
            slowest: How many seconds a batch takes; 0 if that is not known.
        """
        patience = PATIENCE + _BATCHES * (slowest or _UNKNOWN)
        self.finished(now=True)
        while self._finished < self.n and time.monotonic() - self._last_change < patience:
            check()
            show()
            time.sleep(_LOOK)
            self.finished()
