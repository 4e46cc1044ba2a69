"""How a long command is stopped: SIGINT (Ctrl-C), SIGTERM and SIGHUP are noted at once and obeyed at the next step.

The first signal says on the terminal that it was heard. Long work calls `Stopping.check()` at each of its steps, which
raises Stopped, so that whoever knows what must be saved can save it. A second Ctrl-C does not wait for that. A command
that was stopped ends with the exit status that shells give a process which a signal ended: 128 + the signal's number.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import typer

# SIGHUP, which a closing terminal sends, is unknown on Windows.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """A signal asked the command to stop, and it is at a point where it can.

    Like KeyboardInterrupt it is no Exception, so that nothing on its way takes it for a failure of its own.
    """


class Stopping:
    """Whether a signal has asked the command to stop.

    Attributes:
        first: What is said at the first signal; the empty string for nothing. It may be changed as the work goes on.
        abort: Gives what is said at a second Ctrl-C. It may be changed as the work goes on.
        at_once: Whether a signal raises Stopped wherever the main thread is; see `anywhere`.
        signal: The first signal that arrived, or None.
    """

    def __init__(self, first: str, abort: Callable[[], str]):
        """See stop_signals."""
        self.first, self.abort = first, abort
        self.at_once = False
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def status(self) -> int:
        """The exit status of a command that the signal stopped; 0 if none has arrived."""
        return 128 + self.signal if self.signal is not None else 0

    def check(self, *_: object) -> None:
        """Raise Stopped if a signal has arrived. It takes any arguments, so that it can be a callback."""
        if self:
            raise Stopped

    def hold(self) -> None:
        """From here on a signal waits for the next check."""
        self.at_once = False

    @contextlib.contextmanager
    def anywhere(self) -> Iterator[None]:
        """Inside, until `hold` is called, a signal raises Stopped wherever the main thread is.

        Only for work that has nothing to save, and that takes no failure for damage: on its way through other
        languages Stopped may become another exception, which becomes Stopped again at the end of the block.
        """
        self.at_once = True
        try:
            self.check()
            yield
        except Exception as error:
            if self and self.at_once:
                raise Stopped from error
            raise
        finally:
            self.hold()

    def handle(self, number: int, _: FrameType | None) -> None:
        """The signal handler."""
        if self.signal is None:
            self.signal = signal.Signals(number)
            if self.first:
                _say(f"{self.signal.name}: {self.first}")
            if self.at_once:
                raise Stopped
        elif number == signal.SIGINT:
            if self.first:
                _say(self.abort())
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
        first: What to say at the first signal, such as "saving after this step; Ctrl-C again to abort"; the empty
            string for a process that says nothing, because another one does.
        abort: Called at a second Ctrl-C; gives what to say before the command ends.

    Raises:
        typer.Exit: At a second Ctrl-C, wherever the command is, by way of a KeyboardInterrupt.
    """
    stopping = Stopping(first, abort)
    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stopping.handle) for number in heeded}
    try:
        yield stopping
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
