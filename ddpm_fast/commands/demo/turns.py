"""Who draws next: drawings share one device, so they take turns in the order in which they were asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from ddpm_fast.commands.demo.limits import MOST_WAITING
from ddpm_fast.errors import InputError


class Turns:
    """The queue of one device. Take a place with `Place`."""

    def __init__(self, most_waiting: int = MOST_WAITING):
        """most_waiting: how many may wait beside the one whose turn it is."""
        self._most = most_waiting + 1
        self._order: list[Place] = []
        self._changed = threading.Condition()

    @property
    def busy(self) -> int:
        """How many draw or wait."""
        return len(self._order)

    def join(self, place: Place) -> None:
        """Put a place at the end. Raises InputError if too many wait already."""
        with self._changed:
            if len(self._order) >= self._most:
                raise InputError(
                    f"the device is in use, and {self._most - 1} others wait for it, which is as many as may: try "
                    "again in a minute"
                )
            self._order.append(place)

    def leave(self, place: Place) -> None:
        """Take a place away, wherever it stands."""
        with self._changed:
            if place in self._order:
                self._order.remove(place)
            self._changed.notify_all()

    def ahead(self, place: Place) -> int:
        """How many come before a place; 0 if it is its turn."""
        with self._changed:
            return self._order.index(place)

    def moved(self, place: Place, ahead: int, seconds: float) -> int:
        """Wait until another number than `ahead` comes before a place, at most so long, and say how many do."""
        with self._changed:
            self._changed.wait_for(lambda: self._order.index(place) != ahead, seconds)
            return self._order.index(place)


class Place:
    """A place in the queue, for a with statement: inside, it is held, and at the end it is left.

    Attributes:
        stop: Set it, and the drawing ends at its next step, or stops waiting.
    """

    def __init__(self, turns: Turns, stop: threading.Event):
        """turns: the queue. stop: see Place."""
        self._turns, self.stop = turns, stop

    def __enter__(self) -> Place:
        self._turns.join(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._turns.leave(self)

    def wait(self, look_seconds: float = 0.2) -> Iterator[int]:
        """Wait until it is this one's turn, or stop is set.

        Args:
            look_seconds: How often to look whether stop is set.

        Yields:
            How many come before it, at first and whenever that changes.
        """
        ahead = self._turns.ahead(self)
        while ahead and not self.stop.is_set():
            yield ahead
            before = ahead
            while ahead == before and not self.stop.is_set():
                ahead = self._turns.moved(self, before, look_seconds)
