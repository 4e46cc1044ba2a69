"""What the commands share: how they speak to the terminal, how bad input is reported, paths, and where to compute."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import typer
from rich.console import Console
from rich.markup import escape

from ddpm_fast import starting
from ddpm_fast.commands.ranks import Ranks, ranks_of_environment
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.memory import is_out_of_memory
from ddpm_fast.loops.distributed import local_device
from ddpm_fast.ops.backends import extension

# The terminal


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


def say_written(*paths: str | os.PathLike | None) -> None:
    """Say where each file is that was written. None is passed over."""
    for path in paths:
        if path is not None:
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
        errors.print(f"[bold red]Error{'' if ranks.is_first else f' (rank {ranks.rank})'}:[/] {escape(what)}")
        raise typer.Exit(2) from None


@contextlib.contextmanager
def _speaking(ranks: Ranks) -> Iterator[None]:
    """Inside, a warning is a line, and of several ranks only the first one prints lines."""
    was_quiet = console.quiet
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning if ranks.is_first else _show_nothing
        console.quiet = was_quiet or not ranks.is_first
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


class App(typer.Typer):
    """A command with its options, as `app = App()`. Calling it runs it on the command line's arguments and ends the
    process.

    Wrong options are reported like all other wrong input: on unbroken lines, with control characters as their escapes.
    """

    def __init__(self, **options: Any):
        """Of options, see typer.Typer."""
        super().__init__(add_completion=False, pretty_exceptions_enable=False, **options)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run the command."""
        starting.started()
        options["standalone_mode"] = False  # raise instead of showing an error
        try:
            status = super().__call__(*arguments, **options)
        except typer.Abort:  # what older versions of typer make of Ctrl-C
            status = starting.INTERRUPTED
        except Exception as error:
            # Typer's errors about the command line, which have no common public class in all of its versions.
            if not hasattr(error, "format_message"):
                raise
            status = getattr(error, "exit_code", 2)
            context = getattr(error, "ctx", None)
            message = error.format_message()
            if message and type(error).__name__ != "NoArgsIsHelpError":  # that one has shown the help already
                program = context.command_path if context is not None else "this command"
                errors.print(f"[bold red]Error:[/] {escape(message)} (`{escape(program)} --help` lists the options)")
        sys.exit(status or 0)


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
