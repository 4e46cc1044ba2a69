"""The ranks of a command of quality/ at work together, until they are done or a signal stops them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import typer

from ddpm_fast.commands.common import console
from ddpm_fast.commands.quality.session import Session
from ddpm_fast.commands.stopping import Stopped, stop_signals
from ddpm_fast.commands.together import joined, share_signal


@contextlib.contextmanager
def running(session: Session, kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Inside, the ranks work together, and a signal ends the command in all of them.

    Args:
        session: What they work on.
        kept: Gives what is said to be kept of the work after a signal; None for that of samples that are drawn.
    """
    first = "stopping after this step; Ctrl-C again to abort" if session.ranks.is_first else ""
    with joined(session.ranks, "evaluate"), stop_signals(first, lambda: "aborted") as stopping:
        session.check = stopping.check
        try:
            yield
        except Stopped:
            share_signal(stopping, console.print)
            said = _kept_samples(session) if kept is None else kept()
            console.print(f"Stopped: {said}.", markup=False)
            raise typer.Exit(stopping.status) from None


def _kept_samples(session: Session) -> str:
    folder = session.request.folder
    if folder is None:
        return "nothing was written; with --keep FOLDER what is drawn is kept"
    return f"what was drawn is in {folder}, and the same command draws the rest"
