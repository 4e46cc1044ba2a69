"""What the command that is running has done, for its --json and for the file of its options: what it wrote, and facts.

A process runs one command, so there is one of these.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from ddpm_fast.commands.config import Config


class Outcome:
    """What has been done so far.

    Attributes:
        config: What --config has given, or None.
        as_json: Whether --json was given.
        is_first: Whether this process speaks for all that work together.
        written: The files and folders that were written.
        facts: What else a program may want to know.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Nothing has been done yet."""
        self.config: Config | None = None
        self.as_json, self.is_first = False, True
        self.written: list[Path] = []
        self.facts: dict[str, Any] = {}
        self._started = time.monotonic()

    def print(self, command: str, status: int) -> None:
        """Print all of it as a line of JSON to standard output."""
        report = {
            "command": command,
            "status": status,
            "seconds": round(time.monotonic() - self._started, 3),
            "written": [str(path) for path in self.written],
            **self.facts,
        }
        sys.stdout.write(json.dumps(_finite(report), default=str) + "\n")
        sys.stdout.flush()


outcome = Outcome()


def note(**facts: Any) -> None:
    """Take note of facts for --json, as JSON's types."""
    outcome.facts |= facts


def _finite(value: Any) -> Any:
    """The value without what JSON does not have: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
