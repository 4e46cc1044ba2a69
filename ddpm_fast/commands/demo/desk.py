"""What all visitors of the page share: the models, the device and its queue, the runs, and what stops a drawing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ddpm_fast.commands.demo.drawing import Frame, Watched
from ddpm_fast.commands.demo.models import Models
from ddpm_fast.commands.demo.runs import Runs
from ddpm_fast.commands.demo.turns import Place, Turns
from ddpm_fast.commands.drawing import Drawable
from ddpm_fast.loops.options import Step

Prepare = Callable[[Callable[[Step], None]], Drawable]


@dataclass
class Desk:
    """What all visitors share.

    Attributes:
        models: The models that can be chosen.
        runs: The runs that can be looked at.
        device: Where drawings run.
        device_name: The device as it was asked for, such as "auto".
        turns: Who draws next.
    """

    models: Models
    runs: Runs
    device: torch.device
    device_name: str = "auto"
    turns: Turns = field(default_factory=Turns)
    _stops: dict[str, threading.Event] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(
        self, visitor: str, n: int, shape: tuple[int, ...], batch_size: int, view: str, prepare: Prepare
    ) -> Iterator[int | Frame]:
        """Wait for the device, and draw.

        Args:
            visitor: Who draws; a drawing of the same visitor that goes on is stopped.
            n: The number of images.
            shape: That of one image.
            batch_size: How many are drawn at a time.
            view: What is shown of each step, one of drawing.VIEWS.
            prepare: What makes them ready to be drawn, given what is called after each step. It checks everything,
                before the waiting.

        Yields:
            How many drawings come before this one, as long as there are any; then what it has come to.

        Raises:
            InputError: Where prepare does, and if too many wait already.
        """
        stop = threading.Event()
        with self._lock:
            if (before := self._stops.get(visitor)) is not None:
                before.set()
            self._stops[visitor] = stop
        try:
            watched = Watched(n, shape, view, stop)
            drawable = prepare(watched.on_step)
            with Place(self.turns, stop) as place:
                yield from place.wait()
                yield from watched.frames(drawable, batch_size)
        finally:
            with self._lock:
                if self._stops.get(visitor) is stop:
                    del self._stops[visitor]

    def stop(self, visitor: str) -> bool:
        """End the drawing of a visitor at its next step. Whether there was one."""
        with self._lock:
            stop = self._stops.get(visitor)
        if stop is not None:
            stop.set()
        return stop is not None

    def say_device(self) -> str:
        """A line about the device, and who uses it."""
        return f"Device: {_describe(self.device)}. {_say_busy(self.turns.busy)}"


def say_waiting(ahead: int, device: torch.device) -> str:
    """What somebody who waits is told."""
    others = "one drawing comes" if ahead == 1 else f"{ahead} drawings come"
    return f"The {kind(device)} is in use by another request: {others} before yours"


def kind(device: torch.device) -> str:
    """What people call a device of this type."""
    return "GPU" if device.type in ("cuda", "xpu", "mps") else "CPU"


def _say_busy(busy: int) -> str:
    if not busy:
        return "Nobody uses it now."
    waiting = f", and {busy - 1} wait{'s' if busy == 2 else ''}" if busy > 1 else ""
    return f"1 drawing uses it now{waiting}."


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        threads = torch.get_num_threads()
        return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else str(device)
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    return f"{device} ({name}), {free / 2**30:.1f} of {total / 2**30:.1f} GiB of its memory free"
