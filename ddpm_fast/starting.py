"""Ctrl-C while a command of this package starts: it ends at once, without a traceback.

Importing torch takes seconds, and `python -m ddpm_fast.X` does it before any code of the command runs. So the package
imports this module first. A program that merely imports the package keeps Python's own behaviour.
"""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # the status that a shell reports after Ctrl-C


def _end(_number: int, _frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


def starts_a_command() -> bool:
    """Whether this process is `python -m ddpm_fast` or `python -m ddpm_fast.X`, and still looks for that module.

    While it does, Python's documentation says, the first argument is "-m".
    """
    after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
    return sys.argv[:1] == ["-m"] and after[:1] != [] and after[0].partition(".")[0] == "ddpm_fast"


def begin() -> None:
    """The imports of a command begin: until `started`, Ctrl-C ends the process at once."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def started() -> None:
    """The command runs: from here on Ctrl-C raises KeyboardInterrupt again, so that files are tidied up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if starts_a_command():
    begin()
