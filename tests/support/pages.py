"""What the pages of the documentation tell their readers to run."""

import importlib
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import typer.main

DOCS = Path(__file__).parents[2] / "docs"


class Command(NamedTuple):
    """A command of ours: `python -m ddpm_fast.NAME WORDS`, perhaps below torchrun."""

    name: str
    words: list[str]

    def smaller(self, options: Mapping[str, str]) -> list[str]:
        """Its words with other values for some options, which are added where they are not among them."""
        words = list(self.words)
        for option, value in options.items():
            if option in words:
                words[words.index(option) + 1] = value
            else:
                words += [option, value]
        return words

    def unknown_options(self) -> set[str]:
        """Those of its options that the command does not have."""
        given = {word.partition("=")[0] for word in self.words if re.match(r"--?[a-z]", word) and " " not in word}
        return given - options(self.name, *self.words[:1])


def options(name: str, subcommand: str = "") -> set[str]:
    """The options of a command of ours, or of one of its subcommands if it has that."""
    command = typer.main.get_command(importlib.import_module(f"ddpm_fast.commands.{name}").app)
    command = getattr(command, "commands", {}).get(subcommand, command)
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page that are in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[Command]:
    """The commands of ours in the bash blocks of a page, in order."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "-m" in words and words[words.index("-m") + 1].startswith("ddpm_fast."):
                at = words.index("-m") + 1
                yield Command(words[at].removeprefix("ddpm_fast."), words[at + 1 :])


def run_python(code: str, name: str, smaller: Mapping[str, str], names: dict | None = None) -> dict:
    """The names that code leaves behind. smaller: texts that occur in it, and what replaces them."""
    names = {} if names is None else names
    for before, after in smaller.items():
        assert before in code, f"{name} no longer has {before!r}"
        code = code.replace(before, after)
    exec(compile(code, name, "exec"), names)
    return names
