"""Result files, read back and checked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import Row
from ddpm_fast.errors import InputError

# An interval of fewer rounds says nothing: that of 5 values reaches from their smallest to their largest.
MIN_ROUNDS = 5
# Of growth: the fields of a point, what they are called, and the unit that is drawn.
QUANTITIES = {"seconds": ("time (s)", 1), "peak_bytes": ("peak memory (MiB)", 2**20)}
ADVICE = "expected the JSON that `python -m benchmarks ops --out FILE.json` writes (or network, growth ...)"
KINDS = {"date": str, "machine": dict, "versions": dict, "git": dict, "ceilings": dict, "rows": list}
KINDS |= {"absent": dict, "notes": dict, "failures": list, "left_out": list}


@dataclass(frozen=True)
class Curve:
    """How a quantity of ours grows: y over x. exponent: p of the line y = c x^p through the points' logarithms by least
    squares; 1 is proportional, 0 does not grow, and None is not known."""

    name: str
    against: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    exponent: float | None


@dataclass(frozen=True)
class Result:
    """A result file. found: its content. absent: by variant, the cases that it is absent from."""

    path: Path
    found: dict[str, Any]
    rows: list[Row]
    absent: dict[str, set[str]]

    @property
    def quick(self) -> bool:
        """Whether its times mean nothing."""
        return bool(self.found.get("quick")) or (self.found.get("rounds") or MIN_ROUNDS) < MIN_ROUNDS

    @property
    def ceilings(self) -> dict[str, float]:
        return self.found["ceilings"]

    @property
    def device(self) -> str:
        """Where it was measured, in a few words."""
        machine = self.found["machine"]
        cpu = f"{machine.get('cpu')}, {machine.get('isa')}, {machine.get('threads')} threads"
        return machine["gpu"]["name"] if "gpu" in machine else cpu

    def growth(self, stored: bool = False) -> list[dict]:
        """The series of points along what grows, or those with the noise stored and regenerated."""
        return [line for line in self.found.get("growth", []) if (line["axis"] == "stored") == stored]

    def curves(self, quantity: str) -> list[Curve]:
        """A quantity of QUANTITIES over what it grows with. Points at 0, which no logarithmic axis shows, are left
        out."""
        made = []
        for line in self.growth():
            points = [(p["x"], p[quantity] / QUANTITIES[quantity][1]) for p in line["points"] if p[quantity] > 0]
            if points:
                x, y = zip(*points, strict=True)
                power = float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else None
                made.append(Curve(fixed_name(line), line["axis"].replace("_", " "), x, y, power))
        return made


def fixed_name(line: dict) -> str:
    """What was measured with what did not change: "sampling cifar10 fp32, batch 8, 32 pixels"."""
    fixed, forms = line["fixed"], {"batch": "batch {}", "image_size": "{} pixels", "steps": "{} steps"}
    names = [name for name in forms if name in fixed and (name != "steps" or line["task"] == "sampling")]
    parts = [forms[name].format(fixed[name]) for name in names]
    return ", ".join([f"{line['task']} {fixed['network']} {fixed['dtype']}", *parts])


def read_result(path: Path) -> Result:
    """A result file. Raises InputError, saying what is wrong, for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {ADVICE}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; {ADVICE}")
    if wrong := [name for name, kind in KINDS.items() if not isinstance(found.get(name), kind)]:
        raise InputError(f"{path} is no result: {', '.join(wrong)} missing or of another kind; {ADVICE}")
    rows: list[Row] = []
    try:
        for line in found["rows"]:
            row = Row.of(line)
            if not 0 < row.low <= row.high:
                raise ValueError("its interval is not above 0")
            rows.append(row)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: rows[{len(rows)}] is no row ({error!r}); measure again") from error
    if not (rows or any(found.get(name) for name in ("growth", "fidelity", "convolutions", "loading"))):
        raise InputError(f"{path} has no results: nothing was timed; measure again, its log says what went wrong")
    absent: dict[str, set[str]] = {}
    for reason, cases in found["absent"].items():
        absent.setdefault(reason.split(": ")[0], set()).update(cases)
    return Result(path, found, rows, absent)
