"""The images of a training: from where they are, and which of them are held out, to the two sets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import Progress

from ddpm_fast.commands.common import console
from ddpm_fast.commands.selecting import selection_of
from ddpm_fast.commands.sizes import parse_size
from ddpm_fast.commands.stopping import Stopping
from ddpm_fast.commands.training import resuming
from ddpm_fast.commands.training.log import say, warn
from ddpm_fast.commands.training.resuming import State
from ddpm_fast.data import (
    BUILTIN,
    HUGGING_FACE,
    ImageSet,
    open_dataset,
    parse_held_out,
    split_as_recorded,
    split_held_out,
)
from ddpm_fast.errors import InputError
from ddpm_fast.values import ValueRange, parse_range


def absolute(data: str) -> str:
    """The path of the images from wherever the run will be resumed, or the name of a built-in set."""
    return data if data in BUILTIN or data.startswith(HUGGING_FACE) else str(Path(data).absolute())


def absolute_file(name: str) -> str:
    """The path of a file from wherever the run will be resumed; a name that is none as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def run_images(
    arguments: dict[str, Any], state: State | None, stopping: Stopping
) -> tuple[ImageSet, ImageSet | None, dict[str, Any]]:
    """Load the images of a run, and hold some of them out if that is asked for.

    Args:
        arguments: The command's options.
        state: What the run is resumed from, or None.
        stopping: Whether to stop.

    Returns:
        The images that are trained on; those held out, or None; and what differs from the images that the run was
        trained on until here.
    """
    # A run that is older than reading on demand had all images in memory, without those that were broken.
    in_memory = True if state is not None and "order" not in state.meta["training"] else None
    dataset = load_images(arguments, stopping, in_memory, resuming.value_range(state))
    differing: dict[str, Any] = {}
    if state is not None:
        dataset, differing = resuming.match_data(dataset, state, arguments["new_data"])
    if arguments["held_out"] is None:
        return dataset, None, differing
    # After the classes have got the numbers of the run.
    recorded = None if state is None or differing else state.meta["training"].get("held_out")
    if recorded is None:
        parts = split_held_out(dataset, parse_held_out(arguments["held_out"]), arguments["seed"])
    else:
        parts = split_as_recorded(dataset, recorded)
    return (*parts, differing)


def load_images(
    arguments: dict[str, Any], stopping: Stopping, in_memory: bool | None, value_range: ValueRange | None
) -> ImageSet:
    """The dataset. Files that were skipped are shown as warnings. A signal raises Stopped.

    Args:
        arguments: The command's options.
        stopping: Whether to stop.
        in_memory: As for open_dataset.
        value_range: That of the run which is resumed; None where the arguments say it, or nobody.
    """
    given = None if arguments["value_range"] is None else parse_range(arguments["value_range"])
    image_size = None if arguments["image_size"] is None else parse_size(arguments["image_size"])
    ends = given if value_range is None else value_range.ends
    if not console.is_terminal:
        say(f"Loading images from {escape(arguments['data'])}")
    with (
        warnings.catch_warnings(record=True) as caught,
        Progress(transient=True, console=console) as bar,
        stopping.anywhere(),
    ):
        warnings.simplefilter("always")
        task = bar.add_task("loading images")
        dataset = open_dataset(
            arguments["data"],
            image_size=image_size,
            channels=arguments["channels"],
            strict=arguments["strict"],
            classes=bool(arguments["classes"]),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            in_memory=False if arguments["crop"] == "random" else in_memory,
            selection=selection_of(arguments | {"value_range": ends}),
        )
    for warning in caught:
        warn(str(warning.message))
    return dataset


def check_same_images(found: Sequence[tuple[int, str]]) -> None:
    """Raises InputError unless all processes have the same images. found: The count and digest of each."""
    for number, (count, digest) in enumerate(found):
        if (count, digest) != found[0]:
            what = f"{count} images instead of {found[0][0]}"
            if count == found[0][0]:
                what = f"images and labels with the digest {digest[:12]} instead of {found[0][1][:12]}"
            raise InputError(f"rank {number} has {what}, which rank 0 has: give all ranks the same images as --data")
