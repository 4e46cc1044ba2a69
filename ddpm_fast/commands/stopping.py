"""How a long command is stopped: SIGINT (Ctrl-C), SIGTERM and SIGHUP are noted at once and obeyed at the next step.

The first signal says on the terminal that it was heard. Long work calls `Stopping.check()` at each of its steps, which
raises Stopped, so that whoever knows what must be saved can save it. A second Ctrl-C does not wait for that.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

# SIGHUP, which a closing terminal sends, is unknown on Windows.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(Exception):
    """A signal asked the command to stop, and it is at a point where it can."""


class Stopping:
    """Whether a signal has asked the command to stop."""

    def __init__(self, first: str, abort: Callable[[], str]):
        """See stop_signals."""
        self._first, self._abort = first, abort
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self, *_: object) -> None:
        """Raise Stopped if a signal has arrived. It takes any arguments, so that it can be a callback."""
        if self:
            raise Stopped

    def handle(self, number: int, _: FrameType | None) -> None:
        """The signal handler."""
        if self.signal is None:
            self.signal = signal.Signals(number)
            _say(f"{self.signal.name}: {self._first}")
        elif number == signal.SIGINT:
            _say(self._abort())
            raise KeyboardInterrupt


def _say(text: str) -> None:
    """Write a line to standard error. Not by print, which must not be entered again from a signal handler."""
    with contextlib.suppress(OSError):  # the terminal may be gone, as after SIGHUP
        os.write(2, f"\n{text}\n".encode())


@contextlib.contextmanager
def stop_signals(first: str, abort: Callable[[], str]) -> Iterator[Stopping]:
    """Inside, SIGINT, SIGTERM and SIGHUP do not end the process: the Stopping that is yielded tells of them.

    A signal that the process ignores, such as SIGHUP under nohup, stays ignored.

    Args:
        first: What to say at the first signal, such as "saving after this step; Ctrl-C again to abort".
        abort: Called at a second Ctrl-C; gives what to say before KeyboardInterrupt is raised.
    """
    stopping = Stopping(first, abort)
    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stopping.handle) for number in heeded}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
