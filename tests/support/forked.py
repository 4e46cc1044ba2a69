"""A command in a process that was forked for it: its own output, and the signals of a process that a shell started."""

import os
import signal


def begin(log):
    """Write standard output and standard error to a file from here on, and heed signals as at the start of Python."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
