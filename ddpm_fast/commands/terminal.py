"""How the commands speak to the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ddpm_fast.errors import printable


class SafeConsole(Console):
    """A console that shows the names of other people's files and classes as they are, and obeys nothing in them."""

    def __init__(self, **options: Any):
        """Of options, see rich.console.Console."""
        # Lines are not broken where a terminal ends: a path or a number that is split cannot be copied.
        super().__init__(highlight=False, soft_wrap=True, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, with control characters as their escapes."""
        super().print(*map(_safe, objects), **options)


def _safe(thing: Any) -> Any:
    return "\n".join(map(printable, thing.split("\n"))) if isinstance(thing, str) else thing


console = SafeConsole()
errors = SafeConsole(stderr=True)
