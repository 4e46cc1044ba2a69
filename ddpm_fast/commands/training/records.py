"""What a training run writes of its course (`--log`), and what it is told at its start: config.yaml and
environment.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddpm_fast import __version__
from ddpm_fast.commands import config
from ddpm_fast.commands.training.curves import Curves
from ddpm_fast.commands.training.recording import Record
from ddpm_fast.commands.training.resuming import MODES, Options
from ddpm_fast.commands.training.table import Table
from ddpm_fast.commands.training.weights_and_biases import WandbRun, library
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path
from ddpm_fast.loops.training import Trainer

ENVIRONMENT = "environment.json"
LOGS = ("tensorboard", "wandb")
_PACKAGES = ("torch", "numpy", "triton", "safetensors", "pillow", "typer", "wandb")
_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DDPM_FAST_CPU_ISA", "PYTORCH_CUDA_ALLOC_CONF", "WANDB_MODE")
_MOST_STARTS = 100  # of which environment.json tells
_LARGEST = 10 << 20  # bytes of an environment.json that is read
_GIT_SECONDS = 5  # after which git is not waited for


def parse_logs(text: str) -> tuple[str, ...]:
    """The names of a text such as "tensorboard,wandb"; none for an empty one.

    Raises:
        InputError: For an unknown name, or a library that is missing.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in LOGS:
            raise InputError(f"--log is {text!r:.200}; expected {' or '.join(LOGS)}, or both with a comma between them")
    if "wandb" in names:
        library()
    return names


def records_of(trainer: Trainer, arguments: dict[str, Any], say: Callable[[str], object]) -> list[Record]:
    """What the course of a run is written to: log.csv always, and what --log asks for.

    Raises:
        InputError: If a run at Weights & Biases cannot be started.
    """
    out, names = Path(arguments["out"]), parse_logs(arguments["log"])
    records: list[Record] = [Table(out, trainer.step)]
    if "tensorboard" in names:
        records.append(Curves(out, trainer.step))
    if "wandb" in names:
        run = WandbRun(out, arguments, trainer.step > 0)
        say(f"Weights & Biases: {run.place}")
        records.append(run)
    return records


def describe_start(trainer: Trainer, options: Options, warn: Callable[[str], object]) -> list[Path]:
    """Write what a run is and where it starts, before its first step: config.yaml and environment.json.

    Args:
        trainer: The run's.
        options: The command's, as they were settled.
        warn: Told of what cannot be written, which does not end the run.

    Returns:
        The files that were not there before.
    """
    out, new = options.out, []
    # A run of another version may have brought options along that this one does not have.
    names = ["out", *(name for name in options.defaults if name not in MODES)]
    settled = {name: options.arguments[name] for name in names}
    for name, write in (
        (config.NAME, lambda path: config.write(path, "ddpm-fast train", settled)),
        (ENVIRONMENT, lambda path: _add_start(path, environment(trainer))),
    ):
        is_new = not (out / name).exists()
        try:
            write(out / name)
        except (InputError, OSError) as error:
            warn(f"{name} is not written, and the training goes on: {error}")
        else:
            new += [out / name] if is_new else []
    return new


def environment(trainer: Trainer) -> dict[str, Any]:
    """In what surroundings a run starts, as JSON's types."""
    versions = {"ddpm_fast": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else None
    return {
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "step": trainer.step,
        "command": sys.orig_argv,
        "folder": os.getcwd(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "gpu": gpu,
        "machine": trainer.machine(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "repository": repository(),
    }


def repository() -> dict[str, Any] | None:
    """The commit of the working folder's git repository, and whether files differ from it; None if there is none."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    """What git says in the working folder; None if it fails, or is missing."""
    # The repository's own settings could name a program for the second one, and the third would write an index.
    command = ["git", "-c", "core.fsmonitor=false", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip()


def _add_start(path: Path, said: dict[str, Any]) -> None:
    """Add a start to those of which a file tells."""
    starts = _starts(path)[-(_MOST_STARTS - 1) :]
    with atomic_path(path, durable=False) as temporary:
        temporary.write_text(json.dumps({"starts": [*starts, said]}, indent=1) + "\n", encoding="utf-8")


def _starts(path: Path) -> list[Any]:
    """The starts of which a file tells; none of one that is missing, damaged or too large."""
    try:
        if path.stat().st_size > _LARGEST:
            return []
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    starts = said.get("starts") if isinstance(said, dict) else None
    return starts if isinstance(starts, list) else []
