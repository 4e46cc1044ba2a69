"""Result files, read back and checked."""

from __future__ import annotations

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
ADVICE = (
    "expected the JSON that `python -m benchmarks ops --out FILE.json` writes (or network, loops, growth, fidelity)"
)
KINDS = {"date": str, "machine": dict, "versions": dict, "git": dict, "ceilings": dict, "rows": list}
KINDS |= {"absent": dict, "notes": dict, "failures": list, "left_out": list}


@dataclass(frozen=True)
class Curve:
    """How a quantity of ours grows: y over x. exponent: p of the line y = c x^p through the points' logarithms by least
    squares; 1 is proportional, 0 does not grow, and None is not known."""

    name: str
    against: str
    quantity: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    exponent: float | None


@dataclass(frozen=True)
class Result:
    """A result file. found: its content."""

    path: Path
    found: dict[str, Any]
    rows: list[Row]

    @property
    def quick(self) -> bool:
        """Whether its times mean nothing."""
        rounds = self.found.get("rounds")
        return bool(self.found.get("quick")) or (rounds is not None and rounds < MIN_ROUNDS)

    @property
    def ceilings(self) -> dict[str, float]:
        return self.found["ceilings"]

    @property
    def absent(self) -> dict[str, set[str]]:
        """The cases that each variant is absent from."""
        found: dict[str, set[str]] = {}
        for reason, cases in self.found["absent"].items():
            found.setdefault(reason.split(": ")[0], set()).update(cases)
        return found

    @property
    def growth(self) -> list[dict]:
        return [line for line in self.found.get("growth", []) if line["axis"] != "stored"]

    @property
    def noise(self) -> list[dict]:
        """Pairs of points of a training step: with its noise stored, and regenerated."""
        return [line for line in self.found.get("growth", []) if line["axis"] == "stored" and len(line["points"]) == 2]

    @property
    def device(self) -> str:
        """Where it was measured, in a few words."""
        machine = self.found["machine"]
        if "gpu" in machine:
            return machine["gpu"]["name"]
        return f"{machine.get('cpu')}, {machine.get('isa')}, {machine.get('threads')} threads"

    def curves(self, quantity: str) -> list[Curve]:
        """A quantity of QUANTITIES over what it grows with. Points at 0, which no logarithmic axis shows, are left
        out."""
        name, unit = QUANTITIES[quantity]
        made = []
        for line in self.growth:
            points = [(point["x"], point[quantity] / unit) for point in line["points"] if point[quantity] > 0]
            if points:
                x, y = zip(*points, strict=True)
                made.append(Curve(fixed_name(line), line["axis"].replace("_", " "), name, x, y, exponent(x, y)))
        return made


def exponent(x: tuple[float, ...], y: tuple[float, ...]) -> float | None:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else None


def fixed_name(line: dict) -> str:
    """What was measured with what did not change: "sampling cifar10 fp32, batch 8, 32 pixels"."""
    fixed = line["fixed"]
    parts = [f"{line['task']} {fixed['network']} {fixed['dtype']}"]
    parts += [f"batch {fixed['batch']}"] if "batch" in fixed else []
    parts += [f"{fixed['image_size']} pixels"] if "image_size" in fixed else []
    parts += [f"{fixed['steps']} steps"] if "steps" in fixed and line["task"] == "sampling" else []
    return ", ".join(parts)


def read_result(path: Path) -> Result:
    """A result file. Raises InputError, saying what is wrong, for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {ADVICE}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; {ADVICE}")
    if "results" in found:
        raise InputError(f"{path} was written by an older version of the benchmarks; measure again")
    if wrong := [name for name, kind in KINDS.items() if not isinstance(found.get(name), kind)]:
        raise InputError(f"{path} is no result: {', '.join(wrong)} missing or of another kind; {ADVICE}")
    rows = []
    for i, line in enumerate(found["rows"]):
        try:
            row = Row.of(line)
            if not (0 < row.low <= row.high and row.ours.median_s > 0 and (row.peer is None or row.peer.median_s > 0)):
                raise ValueError("a time or an interval is not above 0")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: rows[{i}] is no row ({error}); measure again") from error
        rows.append(row)
    if not (rows or found.get("growth") or found.get("fidelity")):
        raise InputError(f"{path} has no results: nothing was timed; measure again, its log says what went wrong")
    return Result(path, found, rows)
