"""The power-function averages that a training saves, as files in its folder, and averages of any width made of them
(Karras et al. 2024, sec. 3.2; nn/reconstruction.py has the formulas).

Each file is a model by itself: `averages/00001000-0.050.safetensors` is the average of width 0.05 after 1,000 training
steps. It has fp16 weights, as the authors' own files do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint, tensorfile
from ddpm_fast.files.atomic import remove_leftovers
from ddpm_fast.files.fit import check_finite, offenders
from ddpm_fast.files.memory import memory_for
from ddpm_fast.nn.power_average import LEAST_WIDTH, MOST_WIDTH
from ddpm_fast.nn.reconstruction import Profile, Reconstruction, reconstruct

FOLDER = "averages"

_MOST = 4096  # averages of which a sum is made: the equations take 8 bytes for each pair of them
_AT_ONCE = 4  # sums that are made in one pass over the files; each takes 8 bytes for each weight
_NOTHING = 1e-10  # a coefficient of which nothing is seen in a weight


class SavedAverage(NamedTuple):
    """An average that a training has saved.

    Attributes:
        profile: When it was taken, and its width.
        path: The file.
        prefix: What its weights are named with: nothing, or in a training state `average_prefix`.
    """

    profile: Profile
    path: Path
    prefix: str = ""


class Average(NamedTuple):
    """An average that was made of saved ones.

    Attributes:
        profile: What it is an average of.
        state: Its weights, float64 on the CPU.
        config: What its file says about it.
        error: How far its profile is from the one that was wanted, as in Reconstruction.
    """

    profile: Profile
    state: dict[str, Tensor]
    config: dict[str, Any]
    error: float


def average_prefix(width: float) -> str:
    """What the names of the weights of an average begin with in a training state."""
    return f"average.{width:.3f}."


def average_path(run: Path, profile: Profile) -> Path:
    """The path of an average in a run's folder."""
    return run / FOLDER / f"{profile.step:08d}-{profile.width:.3f}.safetensors"


def save_average(run: Path, profile: Profile, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write an average into a run's folder.

    Args:
        run: The folder.
        profile: When it was taken, and its width.
        state: Its weights.
        config: What save_model is given.

    Raises:
        InputError: If the weights are not finite in fp16, or the file cannot be written.
    """
    about = {"width": profile.width, "step": profile.step}
    checkpoint.save_model(average_path(run, profile), state, {**config, "average": about}, torch.float16)


def saved_averages(run: Path) -> list[SavedAverage]:
    """The averages in a run's folder, by step and width.

    Raises:
        InputError: If their folder cannot be looked into.
    """
    folder = run / FOLDER
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be looked into ({error.strerror or error}); make it readable") from error
    matches = [re.fullmatch(r"(\d{8,15})-(0\.\d{3})\.safetensors", name) for name in names]
    found = [SavedAverage(Profile(int(m[1]), float(m[2])), folder / m[0]) for m in matches if m]
    return sorted(saved for saved in found if saved.profile.step and LEAST_WIDTH <= saved.profile.width <= MOST_WIDTH)


def remove_averages_after(run: Path, step: int) -> None:
    """Remove what a run that goes on from `step` had saved after it, and what killed writers have left.

    Raises:
        InputError: If step is 0 and there is something: it is another run's, and nothing is removed.
    """
    later = [saved.path for saved in saved_averages(run) if saved.profile.step > step]
    if later and step == 0:
        raise InputError(
            f"{run / FOLDER} has the averages of another run, with which those of a new one would be mixed: choose "
            "another folder, or move them away"
        )
    for path in later:
        path.unlink(missing_ok=True)
    remove_leftovers(run / FOLDER)


class Plan(NamedTuple):
    """Which sums of saved averages to make.

    Attributes:
        given: What they are made of.
        wanted: What they approximate.
        sums: The coefficients, and how near the sums come.
    """

    given: list[SavedAverage]
    wanted: list[Profile]
    sums: Reconstruction


def plan(run: Path, widths: Sequence[float], step: int | None = None) -> Plan:
    """How to make the averages of these widths, from all that a run has saved up to a training step.

    Args:
        run: The run's folder.
        widths: At least one.
        step: The training step whose averages they are. None: the last one of which there are averages. One between
            those that were saved is possible, but less exact: the next ones are then used too.

    Raises:
        InputError: If the run has no averages, or none up to that step, or so many that the equations are too large.
    """
    given = _given(run, step)
    steps = sorted({saved.profile.step for saved in given})
    if step is None:
        step = steps[-1]
    if not 1 <= step <= steps[-1]:
        raise InputError(f"step is {step}; {run} has averages of steps {steps[0]} to {steps[-1]}: give one of these")
    end = next(saved for saved in steps if saved >= step)
    given = [saved for saved in given if saved.profile.step <= end]
    if len(given) > _MOST:
        raise InputError(f"{run / FOLDER} has {len(given)} averages; expected at most {_MOST}: move every other away")
    wanted = [Profile(step, width) for width in widths]
    return Plan(given, wanted, reconstruct([saved.profile for saved in given], wanted))


def make(plan: Plan, progress: Callable[[int, int], object] = lambda done, total: None) -> Iterator[Average]:
    """The averages of a plan, in its order, each in float64. One file after the other is read for several of them.

    Args:
        plan: What to make.
        progress: Called after each file with the number of files read so far, and of all that are to be read.

    Raises:
        InputError: If a file is missing or damaged, or is another network's, or the memory is too small.
    """
    passes = [range(at, min(at + _AT_ONCE, len(plan.wanted))) for at in range(0, len(plan.wanted), _AT_ONCE)]
    reading = [_used(plan, columns) for columns in passes]
    done, total = 0, sum(len(files) for files in reading)
    for columns, files in zip(passes, reading, strict=True):
        sums: list[dict[str, Tensor]] = [{} for _ in columns]
        config: dict[str, Any] = {}
        for path, rows in files.items():
            tensors, config = _read(path, config)
            for row in rows:
                state = checkpoint.take_prefix(plan.given[row].prefix, tensors)
                _add(path, state, sums, plan.sums.coefficients[row, columns.start : columns.stop])
            done += 1
            progress(done, total)
        for column, state in zip(columns, sums, strict=True):
            profile, error = plan.wanted[column], float(plan.sums.errors[column])
            about = {"width": profile.width, "step": profile.step, "error": error}
            training = {**(config.get("training") or {}), "steps": profile.step}
            yield Average(profile, state, {**config, "training": training, "average": about}, error)


def _given(run: Path, step: int | None) -> list[SavedAverage]:
    """The saved averages, and those of the newest training state if it has gone on since and they are needed."""
    given = saved_averages(run)
    newest = checkpoint.latest_checkpoint(run)
    last = given[-1].profile.step if given else 0
    if newest is not None and checkpoint.step_of(newest) > last and (step is None or step > last):
        meta = checkpoint.read_training(newest)[1]
        widths = (meta.get("training") or {}).get("average_widths") or []
        given += [SavedAverage(Profile(meta["step"], width), newest, average_prefix(width)) for width in widths]
    if not given:
        raise InputError(
            f"{run} has no averages to make others of ({FOLDER}/*.safetensors): a run keeps them from its first step, "
            "if it is started with --average-widths 0.05,0.1"
        )
    return given


def _used(plan: Plan, columns: range) -> dict[Path, list[int]]:
    """The files that are needed for these columns of the coefficients, in the order of their steps, with their rows."""
    files: dict[Path, list[int]] = {}
    for row, saved in enumerate(plan.given):
        if np.abs(plan.sums.coefficients[row, columns.start : columns.stop]).max() > _NOTHING:
            files.setdefault(saved.path, []).append(row)
    return files


def _read(path: Path, before: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what it says of the model. before: The same of the file before it, or nothing.

    Raises:
        InputError: If the file is missing or damaged, or of another network.
    """
    try:
        form, tensors, config = tensorfile.read(path, tensorfile.MODEL, tensorfile.TRAINING)
    except tensorfile.DamagedFile as error:
        raise InputError(f"{error}. If that is impossible, move it away: the others are used without it") from error
    if form == tensorfile.TRAINING:
        config = checkpoint.model_config(config)
    for key in ("unet", "diffusion"):
        if before and config.get(key) != before.get(key):
            raise InputError(f"{path} is of another run than the files before it ({key} differs): move it away")
    return tensors, config


def _add(path: Path, state: Mapping[str, Tensor], sums: list[dict[str, Tensor]], coefficients: np.ndarray) -> None:
    """Add the weights of a file, times its coefficient, to each of the sums, which are empty at first."""
    for total in sums:
        if not total:
            with memory_for(path, 8 * sum(tensor.numel() for tensor in state.values())):
                total.update({n: torch.zeros(t.shape, dtype=torch.float64) for n, t in state.items()})
    expected = {name: list(tensor.shape) for name, tensor in sums[0].items()}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    differ = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if differ or not all(tensor.is_floating_point() for tensor in state.values()):
        differing = offenders("other weights:", sorted(differ)) or ["weights that are no floating numbers"]
        raise InputError(f"{path} is of another run than the files before it ({differing[0]}): move it away")
    check_finite(path, state)
    for total, coefficient in zip(sums, coefficients.tolist(), strict=True):
        # What is nothing is left out of each sum, so that its bits do not depend on which others are made beside it.
        for name, tensor in state.items() if abs(coefficient) > _NOTHING else ():
            total[name].add_(tensor, alpha=coefficient)
