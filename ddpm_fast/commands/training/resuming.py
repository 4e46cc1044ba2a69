"""How `python -m ddpm_fast.train` goes on with a run: from which state, with which options, on which images.

What would change the result is refused or has to be asked for: --change for options, --new-data for images.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.progress import Progress

from ddpm_fast.commands.common import console
from ddpm_fast.commands.selecting import PARTS
from ddpm_fast.commands.sizes import as_argument
from ddpm_fast.commands.training.log import say, warn
from ddpm_fast.data import INDEX_DIGEST, ImageSet, StoredDataset
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.files.atomic import check_writable_folder
from ddpm_fast.files.averages import remove_averages_after
from ddpm_fast.files.lock import FolderLock
from ddpm_fast.loops.distributed import of_first_process
from ddpm_fast.loops.metrics import NonFiniteLoss
from ddpm_fast.loops.snapshot import MODEL_NAME
from ddpm_fast.loops.training import Trainer
from ddpm_fast.loops.training_state import read_state
from ddpm_fast.values import ValueRange

# Options about where the images are and how they are read, which are compared by their digest. The range of values is
# the model's.
_OF_SOURCE = {*PARTS, "layout"}
# Options that may differ between a run and its continuation, because they do not affect the weights, or by no more
# than rounding.
FREE = {
    "data",  # the images may have moved; what they are is compared by their digest
    *_OF_SOURCE,
    "steps",
    "log",
    "log_every",
    "sample_every",
    "save_every",
    "evaluate_every",
    "evaluate_n",
    "evaluate_steps",
    "evaluate_sampler",
    "features",
    "average_every",
    "device",
    "strict",
    "cuda_graph",
    "compile",
    "micro_batch",
    "grad_checkpoint",
}
# What options defaulted to that a run may be too old to know, or to be told, where they are chosen otherwise today.
_FORMER_DEFAULTS = {"timestep_sampling": "uniform", "lr": 2e-4, "warmup": 500}
# Options that say how a command goes on with a run, and not what the run is.
MODES = {"out", "resume", "auto_resume", "change", "new_data", "profile"}
# Options that may differ with --change: how the same network learns the same thing.
CHANGEABLE = {
    "batch_size",
    "beta1",
    "beta2",
    "ema_decay",
    "flip",
    "grad_clip",
    "label_drop",
    "lr",
    "lr_schedule",
    "lr_steps",
    "precision",
    "warmup",
    "weight_decay",
}


_GIVEN = ("COMMANDLINE", "DEFAULT_MAP")  # where click says that a value is from; the second is a file of --config


@dataclass(frozen=True)
class Options:
    """The command's options.

    Attributes:
        arguments: Their values, which become those of the run that is resumed.
        given: The names of those that were given, on the command line or in a file.
        defaults: The default of each that has one. A run that is older than an option was started with it.
    """

    arguments: dict[str, Any]
    given: set[str]
    defaults: dict[str, Any]

    @classmethod
    def of(cls, context: typer.Context, arguments: dict[str, Any]) -> Options:
        """The options of a command that was called."""
        sources = {name: context.get_parameter_source(name) for name in arguments}
        given = {name for name, source in sources.items() if source is not None and source.name in _GIVEN}
        options = [option for option in context.command.params if option.name in arguments and not option.required]
        from_file, context.default_map = context.default_map, None  # what a file gives is no default
        defaults = {option.name or "": option.get_default(context) for option in options}
        context.default_map = from_file
        return cls(arguments, given, defaults)

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.arguments["out"])

    def of_the_first(self) -> Options:
        """Those of the first process, with this one's device, and its path of the images."""
        first = of_first_process(self)
        own = {name: self.arguments[name] for name in ("device", "data")}
        return replace(first, arguments=first.arguments | own)


@dataclass(frozen=True)
class State:
    """A training state to resume from.

    Attributes:
        path: The file.
        meta: What it says about itself.
    """

    path: Path
    meta: dict[str, Any]


@contextmanager
def locked_folder(out: Path) -> Iterator[FolderLock]:
    """Inside, the run's folder exists and no other process trains there. It goes again if nothing came of the run."""
    is_new = not os.path.lexists(out)  # of a name that is too long it says no, and the next line why
    check_writable_folder(out)
    try:
        with FolderLock(out) as lock:
            yield lock
    finally:
        if is_new:
            with suppress(OSError):
                out.rmdir()  # fails unless it is empty


def find_state(out: Path, arguments: dict[str, Any]) -> State | None:
    """The newest state that can be read, or None for a new run.

    Damaged states are named, and put aside under another name, so that they never count as one of the states that are
    kept.

    Raises:
        InputError: If there is a run but it is not to be resumed, or none though there should be one.
    """
    resume, auto_resume = arguments["resume"], arguments["auto_resume"]
    for name in ("change", "new_data"):
        if arguments[name] and not (resume or auto_resume):
            raise InputError(f"--{name.replace('_', '-')} is about a run that goes on: add --resume, or leave it out")
    newest = checkpoint.latest_checkpoint(out)
    if newest is None:
        if resume and not auto_resume:
            raise InputError(f"--resume: there is no checkpoint (step-*.safetensors) in {out}")
        if (out / MODEL_NAME).exists():
            raise InputError(
                f"{out} holds a {MODEL_NAME} but no checkpoint (step-*.safetensors) to continue from, and a new run "
                "would overwrite it: choose another --out, or move the file"
            )
        remove_averages_after(out, 0)
        return None
    if not (resume or auto_resume):
        raise InputError(
            f"{out} holds a run already ({newest.name}): add --resume to continue it, or choose another --out"
        )
    path, damaged = checkpoint.newest_readable(out)
    reasons = "; ".join(reason for _, reason in damaged)
    if path is None:
        raise InputError(f"no checkpoint in {out} can be read: {reasons}")
    for bad, reason in damaged:
        warn(f"{reason}. It is kept as {set_aside(bad, 'damaged').name}; going on from {path.name}")
    return State(path, read_state(path)[1])


def set_aside(path: Path, why: str) -> Path:
    """Give a file a name under which it is no state or model. Returns its new path."""
    return path.replace(path.with_name(f"{path.name}.{why}"))


def adopt(options: Options, state: State) -> dict[str, list[Any]]:
    """Make the arguments those of the run, but for those that may differ.

    Returns:
        What was changed on purpose: {name: [before, from now on]}.

    Raises:
        InputError: If an option was given that would change the result, and that was not asked for.
    """
    arguments = options.arguments
    changes = {}
    # Images in another place need not have splits and columns of the same names.
    elsewhere = "data" in options.given and arguments["data"] != state.meta["arguments"].get("data")
    former = options.defaults | _FORMER_DEFAULTS
    for name, value in (former | state.meta["arguments"]).items():
        if name in MODES:
            continue
        if not _is_like(value, former.get(name)):
            raise InputError(f"{state.path}: its --{name} is {value!r:.200}: use a state that nobody edited")
        is_given = name in options.given and not (name == "precision" and arguments[name] == "auto")  # stored as chosen
        if not is_given and not (name in _OF_SOURCE and elsewhere):
            arguments[name] = value
        elif name not in FREE and arguments[name] != value:
            if not (arguments["change"] and name in CHANGEABLE):
                raise InputError(_refusal(name, arguments[name], value, state.meta["step"]))
            changes[name] = [value, arguments[name]]
    if arguments["new_data"]:
        size = state.meta["unet"].get("image_size")
        arguments["image_size"] = None if size is None else as_argument(size)
        arguments["channels"] = state.meta["unet"].get("in_channels")
    return changes


def _is_like(value: object, default: object) -> bool:
    """Whether a stored argument is of a type that its option has."""
    if default is None:  # of an option that may be left out, or that must be given
        return value is None or isinstance(value, (bool, int, str))
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def _refusal(name: str, asked: object, stored: object, step: int) -> str:
    option = f"--{name.replace('_', '-')}"
    way = f"add --change to go on with it from step {step}" if name in CHANGEABLE else "start a new run"
    return (
        f"{option} {asked} differs from the {stored} this run was started with, and would change its result: leave the "
        f"option out, or {way}"
    )


def value_range(state: State | None) -> ValueRange | None:
    """What [-1, 1] stands for in the float data of the run that is resumed; None if it has none."""
    entry = None if state is None else state.meta.get("value_range")
    return None if entry is None else ValueRange.from_dict(entry)


def match_data(dataset: ImageSet, state: State, new_data: bool) -> tuple[ImageSet, dict[str, Any]]:
    """The dataset with its classes numbered as the run's are, after a comparison with what the run was trained on.

    Args:
        dataset: The images as they are now.
        state: What the run is resumed from.
        new_data: Whether they may be others.

    Returns:
        The dataset, and what differs: {name: [before, from now on]}.

    Raises:
        InputError: If they differ and must not, or have classes that the run does not have.
    """
    names = state.meta["label_names"] if state.meta["unet"].get("num_classes") else None
    stored = state.meta["training"]
    mapped, refusal = dataset, ""
    if names and dataset.label_names != names:
        try:
            mapped = dataset.with_classes(names)
        except InputError as error:
            refusal = str(error)
    before = {"count": stored.get("count"), "digest": stored.get("digest"), "classes": names}
    now = {"count": len(dataset), "digest": _digest_like(mapped, before["digest"]), "classes": dataset.label_names}
    if before["digest"] is None:
        say(
            f"{state.path.name} is of an older version and does not say which images it was trained on: whether "
            f"{dataset.name} has the same ones could not be compared"
        )
        same = names is None or dataset.label_names == names
    else:
        same = not refusal and now["digest"] == before["digest"]
    if same:
        return mapped, {}
    differing = {name: [before[name], now[name]] for name in now if before[name] not in (None, now[name])}
    if refusal or not new_data:
        details = "; ".join(_difference(name, *values) for name, values in differing.items())
        way = "" if refusal else ", or add --new-data to go on with these (their classes are matched by name)"
        raise InputError(
            f"{dataset.name} is not what this run was trained on: {details}. {refusal and refusal + '. '}Give the "
            f"former images as --data{way}"
        )
    return mapped, {"data": [stored["data"], dataset.name], **differing}


def _digest_like(dataset: ImageSet, stored: str | None) -> str:
    """The digest of a data set, of the index or of the pixels as a stored one is; for the latter all may be read."""
    if stored is None or stored.startswith(INDEX_DIGEST) or not isinstance(dataset, StoredDataset):
        return dataset.digest
    say(f"All images of {dataset.name} are read once, to compare them with those that the run was trained on")
    with Progress(transient=True, console=console) as bar:
        task = bar.add_task("comparing images")
        return dataset.pixel_digest(lambda done, total: bar.update(task, completed=done, total=total))


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "count":
        return f"it has {now} images instead of {before}"
    if name == "digest":
        return f"the digest of the images and labels is {now[:12]} instead of {before[:12]}"
    return f"its classes are {', '.join(now or ['none'])} instead of {', '.join(before)}"


def compare_machine(meta: dict[str, Any], trainer: Trainer) -> None:
    """Say so if this machine, or this division of the batch, will not give the bits that those before would have."""
    if "machine" not in meta:
        return
    before, now = {"ranks": 1, "micro_batch": meta["training"]["batch_size"], **meta["machine"]}, trainer.machine()
    words = {
        "device": "on {}",
        "threads": "with {} threads",
        "torch": "with torch {}",
        "ranks": "on {} ranks",
        "micro_batch": "in micro-batches of {}",
    }
    same = {name for name in words if before.get(name) == now[name]}
    if trainer.device.type != "cpu":
        same.add("threads")
    if trainer.config.batch_size <= 2 * now["micro_batch"]:  # a sum of two terms, whoever adds them
        same.add("ranks")
    names = [name for name in words if name not in same]
    if not names:
        return
    then, here = (" and ".join(words[name].format(part.get(name)) for name in names) for part in (before, now))
    way = f" (OMP_NUM_THREADS={before.get('threads')} sets the number of threads)" if "threads" in names else ""
    say(
        f"The run was trained {then} until here, and goes on {here}{way}: its weights will be as good, but their bits "
        "will differ from those of an uninterrupted run"
    )


def set_diverged_aside(out: Path, error: NonFiniteLoss, arguments: dict[str, Any]) -> str:
    """What to say of a run that diverged, with the command that goes on from its last good state.

    The state whose weights gave the numbers that are not finite, if it was saved, is put aside with its model: from it,
    no setting could go on.
    """
    bad, kept = checkpoint.checkpoint_path(out, error.weights_of), ""
    if bad.exists():
        aside = [set_aside(path, "diverged").name for path in (bad, out / MODEL_NAME) if path.exists()]
        kept = f" The state of step {error.weights_of} gave this and is kept as {' and '.join(aside)}."
    newest = checkpoint.latest_checkpoint(out)
    # A tenth, or the rate of Ho et al. 2020 where even that is far from what anybody trains with.
    settings = f"--lr {min(arguments['lr'] / 10, 2e-4):g}"
    if newest is None:
        way = f"No good state had been saved: start again with other settings, such as {settings}"
    else:
        command = f"python -m ddpm_fast.train --out {shlex.quote(str(out))} --resume --change {settings}"
        way = f"The last good state is {newest}. Continue from it with other settings, such as: {command}"
    return f"{error}{kept} {way}. A longer --warmup, a smaller --grad-clip, and --precision fp32 help too"
