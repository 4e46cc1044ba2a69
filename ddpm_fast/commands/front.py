"""`ddpm-fast`: lists the commands and runs one of them.

Only the command that is chosen is imported, because that imports torch: the list, and the completion of a command's
name by the shell, take a fraction of a second.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ddpm_fast import __version__, starting
from ddpm_fast.commands.app import App

SCRIPT = "ddpm-fast"
COMPLETE_VARIABLE = "_DDPM_FAST_COMPLETE"  # by which a shell asks for completions; typer's own name for this script

# All commands: the names of their modules in ddpm_fast.commands, and what they do.
COMMANDS = {
    "train": "train a model on your images",
    "prepare": "decode images once, so that training need not",
    "sample": "draw images from a model, or edit some with it",
    "demo": "a page in the browser, to draw with models, edit pictures and look at trainings",
    "average": "average the weights of a run otherwise, when it is over",
    "evaluate": "measure a model, or compare samplers",
    "plot": "draw the theory",
    "convert": "keep another library's model as a file of ours",
    "export": "write a model for another library, or publish it",
    "info": "which backends are active, and why the others are not; or what a model is",
}


def page(program: str) -> str:
    """The list of the commands. program: how they are called, such as "ddpm-fast " or "python -m ddpm_fast."."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {program}{name:{width}} {summary}" for name, summary in COMMANDS.items()]
    return (
        "Train denoising diffusion models (DDPM) on your images, and sample from them.\n\n"
        + "\n".join(lines)
        + "\n\nEach explains its options with --help, and takes them from a file with --config. To draw 64 handwritten "
        "digits\nwith the model that ships here:\n\n"
        f"  {program}sample --out samples.png\n\n"
        f"`{SCRIPT} --install-completion` lets your shell complete commands and options.\n"
    )


class Commands(TyperGroup):
    """The commands by their names. What they are is imported when one of them is chosen."""

    def __init__(self, *arguments: Any, **options: Any):
        """Of the arguments, see typer's class."""
        super().__init__(*arguments, **options)
        for name, summary in COMMANDS.items():
            self.add_command(TyperCommand(name, help=summary, short_help=summary))

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        """The command that the first argument names, and the other arguments. See typer's class."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, command, rest
        starting.begin()
        module = importlib.import_module(f"ddpm_fast.commands.{name}")
        starting.started()
        return name, typer.main.get_command(module.app), rest


app = App(add_completion=True, cls=Commands)


@app.callback()
def _front() -> None:
    """Train diffusion models on your images, and sample from them."""


def run() -> None:
    """Do what the command line says, and end the process."""
    starting.started()
    first = next(iter(sys.argv[1:]), "--help")
    if COMPLETE_VARIABLE in os.environ:
        app(prog_name=SCRIPT, complete_var=COMPLETE_VARIABLE)
    elif first == "--help":
        is_module = sys.argv[0].endswith("__main__.py")
        print(page("python -m ddpm_fast." if is_module else f"{SCRIPT} "), end="")
    elif first == "--version":
        print(f"ddpm_fast {__version__}")
    else:
        app(prog_name=SCRIPT)
