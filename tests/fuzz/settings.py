"""Files of a command's options (`--config`), damaged or hostile: bytes, YAML that means more than it says, values."""

from __future__ import annotations

import json
import random
from pathlib import Path

import typer.main
import yaml

from ddpm_fast.commands import config, sample
from tests.fuzz import damage
from tests.fuzz.places import MEGABYTES, Case, write

_GOOD = {"model": "mnist", "n": 4, "steps": 3, "labels": "3", "guidance": 1.5, "out": "x.png", "seed": 1}
_LINES = (
    "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nn: [*b, *b, *b, *b, *b, *b]",
    "n: !!python/object/apply:os.system ['true']",
    "n: !!python/name:os.system",
    "model: !!binary aGVsbG8=",
    "<<: {n: 3}",
    "? [n]\n: 3",
    "n: 0o17\nsteps: 1_000\nseed: 1:30",
    "n: 3\n---\nn: 4",
    "n: 3\nn: 4",
    "%YAML 9.9\n---\nn: 3",
    "model: |\n  " + "x" * 70_000,
    "[" * 5000,
    "{" * 5000,
    "n: " + "9" * 5000,
    "model: 2026-11-26",
    "\ufeffn: 3",
    "",
)
_COMMAND = typer.main.get_command(sample.app)


def options(rng: random.Random, place: Path) -> Case:
    kind = rng.randrange(4)
    text = yaml.safe_dump(_GOOD)
    if kind == 0:
        data, how = damage.bytes_of(text.encode(), rng)
    elif kind == 1:  # JSON is YAML
        damaged, how = damage.config_text(_GOOD, rng)
        data = damaged.encode("utf-8", "replace")
    elif kind == 2:
        line = rng.choice(_LINES)
        data, how = f"{text if rng.random() < 0.3 else ''}{line}\n".encode(), f"{line:.60}"
    else:
        key, value = rng.choice([*_GOOD, "no-such"]), rng.choice(damage.STRANGE)
        data, how = json.dumps({**_GOOD, key: value}).encode("utf-8", "replace"), f"{key} is {value!r:.60}"
    path = write(rng, place, data, "run.yaml")
    return how, lambda: config.read(path, _COMMAND), _check, MEGABYTES


def _check(loaded: config.Config) -> str:
    known = {parameter.name for parameter in _COMMAND.params}
    strange = {name: value for name, value in loaded.values.items() if name not in known or isinstance(value, dict)}
    return f"options that there are not: {strange!r:.100}" if strange else ""
