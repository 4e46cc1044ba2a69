"""A drawing that can be watched: it runs in a thread of its own, and what it has come to is given out as it goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.commands.demo.limits import LONGEST_SECONDS
from ddpm_fast.commands.drawing import Drawable
from ddpm_fast.errors import InputError
from ddpm_fast.loops.options import Step

VIEWS = {"x0": "the image as predicted (x\u2080)", "x_t": "the chain's state (x\u209c)"}
FRAME_SECONDS = 0.12  # at least between two frames: a browser and a slow line follow eight in a second


class Frame(NamedTuple):
    """What a drawing has come to.

    Attributes:
        images: fp32 [n, C, H, W] on the CPU, about in [-1, 1]; an image that was not begun is 0, which is grey.
        done: How many sampling steps are done, of all batches.
        total: How many there are.
        t: The timestep of the last one; -1 before the first and after the last.
        seconds: How long it has been drawing.
        finished: Whether these are the finished images.
        stopped: Why the drawing ended before they were, or the empty string.
    """

    images: Tensor
    done: int
    total: int
    t: int
    seconds: float
    finished: bool = False
    stopped: str = ""


class _Stopped(Exception):
    """The drawing is to end."""


class Watched:
    """A drawing, its thread and its newest frame.

    Make one, give its on_step to the options of what is drawn, and call frames().
    """

    def __init__(self, n: int, shape: tuple[int, ...], view: str, stop: threading.Event):
        """What is watched.

        Args:
            n: The number of images.
            shape: The shape of one of them.
            view: What is shown of a step, one of VIEWS.
            stop: Set by whoever wants the drawing to end.
        """
        self._view, self._stop = view, stop
        self._images = torch.zeros((n, *shape))
        self._done, self._total, self._rows, self._batch = 0, 1, 1, max(n, 1)
        self._changed = threading.Condition()
        self._newest: Frame | None = None
        self._over = False
        self._error: BaseException | None = None
        self._began = self._shown = 0.0

    def on_step(self, step: Step) -> None:
        """Take note of a sampling step, and of its images if the last frame is old enough."""
        self._done = step.first // self._batch * self._rows + step.index + 1
        now = time.monotonic()
        seen = step.x if self._view == "x_t" else step.x0
        # Without an x_0 it is a jump of inpainting, which only adds noise.
        if seen is None or (now - self._shown < FRAME_SECONDS and self._done < self._total):
            return
        self._shown = now
        self._images[step.first : step.first + len(seen)] = seen.float().cpu()  # a copy for the CPU waits for the GPU
        self._put(step.t)

    def frames(self, drawable: Drawable, batch_size: int) -> Iterator[Frame]:
        """Draw, and give out the newest frame whenever there is one. The last one is finished, or says why not.

        Args:
            drawable: What is drawn, with on_step among its options.
            batch_size: How many images it draws at a time.

        Raises:
            Exception: What the drawing raises.
        """
        self._rows, self._batch = drawable.rows, batch_size
        self._total = drawable.rows * -(-drawable.n // batch_size)
        self._began = time.monotonic()
        if self._stop.is_set():  # while it waited
            yield Frame(self._images, 0, self._total, -1, 0.0, stopped="stopped")
            return
        thread = threading.Thread(target=self._run, args=(drawable,), daemon=True)
        thread.start()
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._newest is not None or self._over)
                    frame, self._newest = self._newest, None
                if frame is None:
                    break
                yield frame
            if self._error is not None:
                raise self._error
        finally:
            # If nobody reads any more, nothing is to be drawn any more.
            self._stop.set()
            thread.join()

    def _run(self, drawable: Drawable) -> None:
        try:
            for part, x in drawable.batches(self._check):
                self._images[part] = x.float().cpu()
            self._put(-1, finished=True)
        except _Stopped as reason:
            self._put(-1, stopped=str(reason))
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _check(self) -> None:
        """Called before each step."""
        if self._stop.is_set():
            raise _Stopped("stopped")
        if time.monotonic() - self._began > LONGEST_SECONDS:
            raise _Stopped(
                f"stopped after {LONGEST_SECONDS // 60} minutes, which is the most that one drawing may take"
            )

    def _put(self, t: int, finished: bool = False, stopped: str = "") -> None:
        seconds = time.monotonic() - self._began
        frame = Frame(self._images.clone(), self._done, self._total, t, seconds, finished, stopped)
        with self._changed:
            self._newest = frame
            self._changed.notify_all()


def check_view(view: object) -> str:
    """One of VIEWS. Raises InputError for anything else."""
    if view not in VIEWS:
        raise InputError(f"the view is {view!r:.100}; expected one of {', '.join(VIEWS)}")
    return str(view)
