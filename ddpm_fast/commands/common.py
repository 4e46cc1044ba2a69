"""What the commands share: how they speak to the terminal, how bad input is reported, paths, and where to compute."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import typer
from rich.markup import escape

from ddpm_fast.commands.app import App as App
from ddpm_fast.commands.outcome import outcome
from ddpm_fast.commands.ranks import Ranks, ranks_of_environment
from ddpm_fast.commands.terminal import console, errors
from ddpm_fast.errors import InputError
from ddpm_fast.files.memory import is_out_of_memory
from ddpm_fast.loops.distributed import local_device
from ddpm_fast.ops.backends import extension

# The terminal


def say_written(*paths: str | os.PathLike | None) -> None:
    """Say where each file is that was written. None is passed over."""
    for path in paths:
        if path is not None:
            outcome.written.append(Path(path).resolve())
            console.print(f"Wrote {escape(str(Path(path).resolve()))}")


@contextlib.contextmanager
def plain_errors(says_missing_kernels: bool = True) -> Iterator[None]:
    """What every command does its work in.

    An InputError ends the command with its message and status 2 instead of a traceback, and so does a file that the
    system refuses, or a lack of memory. A warning is a line. If the fast kernels are missing, a line says so. Of
    several ranks the first one speaks for all: the others print their errors and nothing else.

    Args:
        says_missing_kernels: False for a command that says so itself.
    """
    ranks = Ranks()
    try:
        ranks = ranks_of_environment()
        with _speaking(ranks):
            if says_missing_kernels and extension.unavailable and ranks.is_first:
                errors.print(
                    f"[yellow]Warning:[/] the fast kernels are missing, so all is slower: "
                    f"{escape(extension.unavailable)}"
                )
            yield
    except Exception as error:
        what = in_words(error)
        if not what:
            raise
        if outcome.config is not None:
            what += outcome.config.blamed(what)
        errors.print(f"[bold red]Error{'' if ranks.is_first else f' (rank {ranks.rank})'}:[/] {escape(what)}")
        raise typer.Exit(2) from None


@contextlib.contextmanager
def _speaking(ranks: Ranks) -> Iterator[None]:
    """Inside, a warning is a line, and of several ranks only the first one prints lines."""
    was_quiet = console.quiet
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning if ranks.is_first else _show_nothing
        console.quiet = was_quiet or not ranks.is_first
        outcome.is_first = ranks.is_first
        try:
            yield
        finally:
            console.quiet = was_quiet


def in_words(error: Exception) -> str:
    """What to say of an error that is not the package's fault; the empty string for one that may be."""
    if isinstance(error, InputError):
        return str(error)
    if is_out_of_memory(error):
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"there is not enough memory ({reason:.200}): take a smaller --batch-size, smaller or fewer images, or a "
            "smaller model"
        )
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, BrokenPipeError):
        # A file that cannot be used, where nothing more is known of what it was for.
        return f"{error.strerror}: {os.fsdecode(error.filename)}"
    return ""


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In place of warnings.showwarning, which also shows the line of code that warned."""
    errors.print(f"[yellow]Warning:[/] {escape(str(message))}")


def _show_nothing(*_: object, **__: object) -> None:
    """In place of warnings.showwarning, where another rank shows the same warning."""


# Options


def path_option(help: str, *names: str) -> Any:
    """A typer option whose value is a path, as a Path or a str: a `~` at its beginning becomes the home folder.

    A shell does that for `--out ~/x` and not for `--out=~/x`.

    Args:
        help: What the option is for.
        *names: The option's names, if they do not follow from the parameter's.
    """
    return typer.Option(*names, help=help, callback=expand_home)


def expand_home(path: Any) -> Any:
    """The path, of the type that it has, with `~` at its beginning replaced. None stays None."""
    return None if path is None else type(path)(os.path.expanduser(path))


SOURCES = (
    "a shipped model's name, a model.safetensors file, the folder of a training run, a diffusers folder, another "
    "library's .pt or .ckpt, or hf:OWNER/NAME"
)
ModelOption = Annotated[str, path_option(SOURCES)]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=SOURCES, callback=expand_home)]
FlagsOption = Annotated[
    str | None,
    typer.Option(help="of a .pt file: the flags that its training script was given, such as '--image_size 64 ...'"),
]


# Where to compute


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one, and of several ranks each has its own.

    Raises:
        InputError: For a device that is not there.
    """
    ranks = ranks_of_environment()
    device = local_device(ranks.device_name(name))
    if device.type == "cuda" and ranks.world_size > 1:
        torch.cuda.set_device(device)  # where what names no device goes
    return device
