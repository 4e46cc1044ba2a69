"""The options of a command in a file: `--config run.yaml` reads them, and a run writes them.

The file is a mapping from the names of options to values. What may stand in it follows from the command's own options,
and nothing is said of them twice. It is other people's input: YAML without tags, aliases and nesting, of bounded size.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import stat
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
import yaml
from typer.core import TyperCommand

from ddpm_fast import __version__
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.atomic import atomic_path

NAME = "config.yaml"  # in a folder
_HEAD = "# Written by ddpm_fast"
MOST_BYTES = 1 << 16  # a file that names every option of a command has about 2 KiB
_DEPTH = 2  # a mapping, and lists in it
# What YAML 1.1 takes for a number of base 8 or 60, where the same text on the command line is another number.
_ODD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
_LARGEST = 1 << 63  # no option takes a larger integer
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", Path: "a path"}


@dataclass(frozen=True)
class Config:
    """What a file says.

    Attributes:
        path: The file.
        values: The value of each parameter of the command, by the parameter's name.
    """

    path: Path
    values: dict[str, Any]

    def blamed(self, message: str) -> str:
        """What to add to the message of an error that may be about a value of the file: where that value stands.

        The values are checked where those of the command line are, and the messages name the options.
        """
        named = [
            name
            for name, value in self.values.items()
            if re.search(rf"--{_key(name)}\b(?!-)", message) or (isinstance(value, str) and repr(value) in message)
        ]
        keys = f"{', '.join(map(_key, named))} in " if named else "with the options of "
        return f" ({keys}{printable(str(self.path))})"


def read(path: Path, command: TyperCommand) -> Config:
    """The options in a file, or in the config.yaml of a folder, checked against those of the command.

    Raises:
        InputError: If it is no such file, or a key or a value is not one of the command's options.
    """
    path = path / NAME if os.path.isdir(path) else path
    shown = printable(str(path))
    given = _mapping(_text(path, shown), shown)
    kinds, values = _types(command), {}
    options = {key: name for name in kinds for key in _keys(command, name)}
    for key, value in given.items():
        if key not in options:
            raise InputError(f"{shown}: {_unknown(key, options)}")
        name = options[key]
        if name in values:
            raise InputError(f"{shown}: {key} is given twice: leave one of them out")
        values[name] = _checked(shown, key, value, kinds[name])
    return Config(path, {name: value for name, value in values.items() if value is not None})


def write(path: Path, command: str, values: Mapping[str, Any]) -> None:
    """Write a file that --config reads, whole or not at all.

    Args:
        path: The file.
        command: How the command is called.
        values: The value of each option, by its parameter's name. None stands for an option that was not given, and
            is left out.

    Raises:
        InputError: If it cannot be written, or a file is there that no run has written.
    """
    if os.path.exists(path) and not _text(path, printable(str(path))).startswith(_HEAD):
        raise InputError(f"{path} was not written by a run, and is kept")
    plain = {_key(name): _plain(value) for name, value in values.items() if value is not None}
    head = f"{_HEAD} {__version__}. To repeat this run: {printable(command)} --config {printable(path.name)}\n"
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=math.inf)
    with atomic_path(path, durable=False) as temporary:
        temporary.write_text(head + text, encoding="utf-8")


def beside(out: Path) -> Path:
    """Where the options of a run go that has written this file or folder."""
    return out / NAME if out.is_dir() else out.with_suffix(".yaml")


def _text(path: Path, shown: str) -> str:
    """The text of a file. Raises InputError for what is no file of text, or too large."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{shown} is no file; expected a file of options, such as run.yaml")
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {shown}: {error.strerror}; expected a file of options") from error
    if len(content) > MOST_BYTES:
        raise InputError(f"{shown} is larger than {MOST_BYTES} bytes; expected a file of options, such as a run writes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown} is not UTF-8 (byte {error.start}); expected a text of options") from error


def _mapping(text: str, shown: str) -> dict[str, Any]:
    """What a text of YAML says, which must be one mapping of texts to plain values."""
    try:
        _refuse_what_is_not_needed(text, shown)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{shown} holds no mapping; expected lines such as `batch-size: 64`")
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if counts and (most := counts.most_common(1)[0])[1] > 1:
            raise InputError(f"{shown}: {printable(most[0]):.100} is given twice: leave one of them out")
        return {str(key): value for key, value in yaml.safe_load(text).items()}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
        raise InputError(f"{shown}{where} is no YAML: {printable(str(problem)):.200}") from error
    except InputError:
        raise
    except ValueError as error:  # a date that there is not, or a number of too many digits
        raise InputError(f"{shown} holds a value that cannot be read: {printable(str(error)):.200}") from error


def _refuse_what_is_not_needed(text: str, shown: str) -> None:
    """Raises InputError for what a file of options does without, before anything is made of it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{shown}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"{where}: aliases (*{printable(event.anchor):.40}) are not read: write the value out")
        if getattr(event, "tag", None) is not None:
            raise InputError(f"{where}: tags ({printable(event.tag):.80}) are not read: write a plain value")
        if isinstance(event, yaml.ScalarEvent) and event.style is None and _ODD_NUMBER.fullmatch(event.value):
            raise InputError(
                f"{where}: {event.value:.40} is a number of base 8 or 60 in YAML: write it without the first zeros, or "
                "as a text in quotes"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise InputError(f"{where}: values inside of values are not read; expected lines such as `batch-size: 64`")


def _types(command: TyperCommand) -> dict[str, Any]:
    """The type of each parameter of a command, by the parameter's name."""
    assert command.callback is not None
    hints = get_type_hints(inspect.unwrap(command.callback))
    return {name: hints[name] for name in (param.name for param in command.params) if name in hints}


def _keys(command: TyperCommand, name: str) -> Iterator[str]:
    """What an option may be called in a file: as on the command line, or with underscores."""
    for param in command.params:
        if param.name == name:
            longs = [opt.removeprefix("--") for opt in param.opts if opt.startswith("--")]
            yield from dict.fromkeys([name, _key(name), *longs, *(long.replace("-", "_") for long in longs)])


def _key(name: str) -> str:
    return name.replace("_", "-")


def _unknown(key: str, options: Mapping[str, str]) -> str:
    """What to say of a key that is no option, with the nearest one that is."""
    keys = {option.replace("_", "-") for option in options}
    near = difflib.get_close_matches(key.replace("_", "-")[:100], sorted(keys), 1)
    way = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(keys))}"
    return f"{printable(key)[:100]} is no option of this command; {way}"


def _checked(shown: str, key: str, value: Any, hint: Any) -> Any:
    """The value as the option takes it; None for one that is not given. Raises InputError for another type."""
    union = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kind = next(each for each in union if each is not type(None))
    if value is None and type(None) in union:
        return None
    if get_origin(kind) is list:
        each = get_args(kind)[0]
        return [_checked(shown, key, part, each) for part in (value if isinstance(value, list) else [value])]
    converted = None if isinstance(value, int) and abs(value) > _LARGEST else _converted(value, kind)
    if converted is None:
        said = "too large a number" if isinstance(value, int) and abs(value) > _LARGEST else f"{value!r:.100}"
        quote = ": put it in quotes" if kind in (str, Path) and not isinstance(value, list | dict) else ""
        raise InputError(
            f"{shown}: {key} is {printable(said)}, a {type(value).__name__}; expected {_KINDS.get(kind, kind)}{quote}"
        )
    return converted


def _converted(value: Any, kind: Any) -> Any:
    """A value of YAML as one of this type; None if it is none."""
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if kind is int:
        return value if isinstance(value, int) else None
    if kind is float:
        try:  # YAML 1.1 takes 2e-4, without a point, for a text
            return float(value) if isinstance(value, int | float | str) else None
        except ValueError:
            return None
    return str(value) if isinstance(value, str | int | float) else None


def _plain(value: Any) -> Any:
    """The value of an option as YAML has it."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool | int | float | str) else str(value)


def values_of(context: typer.Context) -> dict[str, Any]:
    """The values of all options of the command that is running, by their parameters' names."""
    return {param.name: context.params[param.name] for param in context.command.params if param.name in context.params}
