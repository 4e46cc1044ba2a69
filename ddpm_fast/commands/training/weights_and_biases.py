"""`--log wandb`: a run at Weights & Biases (pip install 'ddpm-fast[wandb]').

Its library keeps the run's files in the folder wandb/ of the training run, and sends them unless WANDB_MODE=offline.
Nothing is asked for at the terminal. A training run that is resumed goes on with the same run there.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ddpm_fast.commands.training.curves import points, quality_points
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.atomic import atomic_path
from ddpm_fast.loops.metrics import Look

NAME = "wandb.json"  # says which run there belongs to the training run
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LOCAL = ("offline", "disabled", "dryrun")  # modes that need no account
_LONGEST = 1000  # bytes of the file


def library() -> ModuleType:
    """The library. Raises InputError if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            f"--log wandb needs its library ({printable(str(error)):.200}): pip install 'ddpm-fast[wandb]', or leave "
            "wandb out of --log"
        ) from error
    return wandb


class WandbRun:
    """A run at Weights & Biases.

    Attributes:
        name: What it is called where it cannot be written.
    """

    name = "the run at Weights & Biases"

    def __init__(self, folder: Path, arguments: dict[str, Any], resumes: bool):
        """Start the run there, or go on with it.

        Args:
            folder: The training run's.
            arguments: The command's.
            resumes: Whether the training run goes on from a state.

        Raises:
            InputError: If the library is missing, nobody is logged in, or the run cannot be started.
        """
        self._wandb = wandb = library()
        _check_login(wandb)
        identity = (_known_id(folder) if resumes else None) or secrets.token_hex(4)
        try:
            self._run = wandb.init(
                dir=str(folder),
                id=identity,
                resume="allow",
                name=folder.resolve().name,
                project=wandb.setup().settings.project or "ddpm_fast",
                config=arguments,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # of the library, or of what it talks to
            raise InputError(
                f"the run at Weights & Biases could not be started ({printable(str(error)):.300}): set "
                "WANDB_MODE=offline and send it later with `wandb sync`, or leave wandb out of --log"
            ) from error
        # Training steps of a resumed run may come again, which the library's own count does not allow.
        self._run.define_metric("training step")
        self._run.define_metric("*", step_metric="training step")
        with atomic_path(folder / NAME, durable=False) as temporary:
            temporary.write_text(json.dumps({"id": identity}) + "\n", encoding="utf-8")

    @property
    def place(self) -> str:
        """Where the run can be looked at: an address, or a folder."""
        return str(self._run.url or self._run.dir)

    def look(self, look: Look, rate: float, waiting: float) -> None:
        """Add a point to each curve. Raises OSError if it cannot be written."""
        self._log(lambda: {"training step": look.step, **points(look, rate, waiting)})

    def quality(self, record: dict[str, Any]) -> None:
        """Add what was measured of the averaged weights. Raises OSError if it cannot be written."""
        self._log(lambda: {"training step": record["step"], **quality_points(record)})

    def grid(self, grid: np.ndarray, step: int) -> None:
        """Add a grid of samples, uint8 [H, W, C]. Raises OSError if it cannot be written."""
        self._log(lambda: {"training step": step, "samples": self._wandb.Image(grid.squeeze())})

    def close(self) -> None:
        """Send what is left. Raises OSError if it cannot be written."""
        _as_os_error(self._run.finish)

    def _log(self, values: Callable[[], dict[str, Any]]) -> None:
        _as_os_error(lambda: self._run.log(values()))


def _as_os_error(act: Callable[[], object]) -> None:
    """Do something with the library, whose errors must not end a training."""
    try:
        act()
    except Exception as error:
        raise OSError(printable(str(error))[:300] or type(error).__name__) from error


def _check_login(wandb: Any) -> None:
    """Raises InputError where the library would ask for a key at the terminal."""
    if wandb.setup().settings.mode in _LOCAL:
        return
    try:
        logged_in = wandb.login(prompt=False)
    except Exception as error:
        raise InputError(
            f"Weights & Biases cannot be used ({printable(str(error)):.300}): run `wandb login` again, or set "
            "WANDB_MODE=offline"
        ) from error
    if not logged_in:
        raise InputError(
            "--log wandb: nobody is logged in at Weights & Biases: run `wandb login` or set WANDB_API_KEY, or set "
            "WANDB_MODE=offline and send the run later with `wandb sync`"
        )


def _known_id(folder: Path) -> str | None:
    """The run that belongs to a training run; None if that is not known."""
    try:
        with open(folder / NAME, "rb") as file:
            said = json.loads(file.read(_LONGEST))
    except (OSError, ValueError, RecursionError):
        return None
    identity = said.get("id") if isinstance(said, dict) else None
    return identity if isinstance(identity, str) and _ID.fullmatch(identity) else None
