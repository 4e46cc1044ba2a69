"""What a training run keeps of its evaluations: a line for each, and the model of the best one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddpm_fast.commands.training.resuming import set_aside
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.files.atomic import atomic_path
from ddpm_fast.loops.training import Trainer

BEST_NAME = "best.safetensors"
LINES_NAME = "quality.jsonl"
ASIDE = "measured-otherwise"


class BestModel:
    """The best model of a run so far, in its folder.

    The averaged weights of the step with the smallest value are kept, as `model.safetensors` keeps those of the last
    one; the file's config["training"]["quality"] says what was measured of them. The value is the kernel distance,
    because it has no bias: with so few samples the Frechet distance is one by a multiple of itself. Where nothing is
    drawn, it is the held-out loss.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], warn: Callable[[str], object]):
        """Look for the best model so far when the first one is offered.

        Args:
            folder: The run's.
            settings: How values are measured. Those of other settings are not compared.
            warn: Prints a warning.
        """
        self._path, self._settings, self._warn = folder / BEST_NAME, json.loads(json.dumps(settings)), warn

    def offer(self, trainer: Trainer, record: dict[str, Any], value: float) -> bool:
        """Keep the model if it is the best so far.

        Args:
            trainer: What has trained it.
            record: What was measured of it.
            value: The smaller, the better.

        Returns:
            Whether it is the best so far.

        Raises:
            InputError: If it cannot be written; the one before stays.
        """
        before = self._value_of_former(trainer.step)
        if not math.isfinite(value) or (before is not None and before <= value):
            return False
        config = trainer.model_config()
        config["training"]["quality"] = {**record, "best_by": value, "settings": self._settings}
        checkpoint.save_model(self._path, trainer.ema.state_dict(), config)
        return True

    def _value_of_former(self, step: int) -> float | None:
        """That of the model which is there. One that cannot be compared with is put aside."""
        if not self._path.exists():
            return None
        said: Any = None
        with suppress(InputError):
            said = checkpoint.read_model(self._path)[1]["training"].get("quality")
        if isinstance(said, dict) and said.get("settings") == self._settings:
            value, reached = said.get("best_by"), said.get("step")
            if isinstance(value, float) and math.isfinite(value) and isinstance(reached, int):
                return value
        name = set_aside(self._path, ASIDE).name
        self._warn(
            f"{BEST_NAME} is of an evaluation with other options, of another run, or damaged, so that it cannot be "
            f"compared with step {step}. It is kept as {name}"
        )
        return None


def add_line(folder: Path, record: dict[str, Any]) -> None:
    """Add an evaluation to the run's lines. Those of later steps, which the run was taken back from, go.

    Raises:
        InputError: If they cannot be written.
    """
    path, kept = folder / LINES_NAME, []
    with suppress(OSError, UnicodeDecodeError):  # there are none yet, or they are no text
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _is_before(line, record["step"])]
    with atomic_path(path, durable=False) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in [*kept, json.dumps(record)]), encoding="utf-8")


def _is_before(line: str, step: int) -> bool:
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return isinstance(found, int) and found < step
