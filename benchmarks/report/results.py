"""Result files as `python -m benchmarks.ratios` and `python -m benchmarks.loop` write them, read back and checked.

Older files lack a row's name, setting and floor, and the bandwidth of a copy; what follows from the other rows of the
same file (a `copy` and a `normal` of the same size) is taken from there. Fields that are not known are left alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_fast.errors import InputError

# An interval of fewer rounds says nothing: that of 5 values reaches from their smallest to their largest.
MIN_ROUNDS = 5
CEILING = "copy"  # the operation whose rows say what the machine can do, not what we do
ADVICE = "expected the JSON that `python -m benchmarks.ratios --out FILE.json` writes (or benchmarks.loop)"


@dataclass(frozen=True)
class Side:
    """What was measured of one variant. error: of its result, before it was timed."""

    median_s: float
    error: float | None
    gb_per_s: float | None
    images_per_s: float | None
    mfu: float | None


@dataclass(frozen=True)
class Row:
    """Ours beside one peer. case: its name in the file. name: for the reader, without the size. floors: seconds that no
    implementation can go under, by what sets them ("bytes", "normals", "flops", "instructions", or whatever else the
    file names). notes: what differs between the two."""

    case: str
    name: str
    size: str
    operation: str
    setting: str
    measured: str
    baseline: str
    speedup: float
    low: float
    high: float
    ours: Side
    peer: Side
    copy_share: float | None
    floors: dict[str, float]
    notes: tuple[str, ...]
    identity: tuple

    @property
    def floor(self) -> tuple[str, float] | None:
        """(what sets it, seconds) of the floor that binds: the highest."""
        return max(self.floors.items(), key=lambda item: item[1]) if self.floors else None

    def __str__(self) -> str:
        return f"{self.case} [{self.setting}], {self.measured} beside {self.baseline}"


@dataclass(frozen=True)
class Curve:
    """How a quantity of a variant grows: y over x, and the exponent of the power law through it."""

    name: str
    measured: str
    against: str
    quantity: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    exponent: float


@dataclass(frozen=True)
class Result:
    """A result file. ceilings: what the machine reaches at best, by name. absent: {why: the cases}. absences: the same
    by variant; where no case is named, from all of them. failed: what did not match, or could not be run."""

    path: Path
    date: str
    machine: dict
    versions: dict
    git: dict
    rounds: int | None
    quick: bool
    ceilings: dict[str, float]
    absent: dict[str, list[str]]
    absences: dict[str, set[str]]
    failed: list[str]
    rows: list[Row]
    curves: list[Curve]


def read_result(path: Path) -> Result:
    """A result file, of any age. Raises InputError, saying what is wrong, for a file that is none."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {ADVICE}") from error
    if not isinstance(made, dict):
        raise InputError(f"{path} holds a {type(made).__name__}; {ADVICE}")
    if "results" not in made:
        other = {"benchmarks": "pytest-benchmark's file", "cases": "a count of kernels, by benchmarks.kernels"}
        what = next((f"is {name}" for key, name in other.items() if key in made), "has no list of results")
        raise InputError(f"{path} {what}; {ADVICE}")
    kinds = {"date": str, "machine": dict, "versions": dict, "results": list}
    optional = {"git": dict, "sizes": dict, "ceilings": dict, "absent": dict | list, "growth": list}
    optional |= {"mismatches": list, "failures": list, "rounds": int}
    kinds |= {name: kind for name, kind in optional.items() if made.get(name) is not None}
    if wrong := [name for name, kind in kinds.items() if not isinstance(made.get(name), kind)]:
        raise InputError(f"{path} is no result: {', '.join(wrong)} missing or of another kind; {ADVICE}")
    rows = _rows(path, made)
    curves = [_curve(f"{path}: growth[{i}]", entry) for i, entry in enumerate(made.get("growth") or [])]
    if not rows and not curves:
        raise InputError(f"{path} has no results: nothing was timed; measure again, its log says what went wrong")
    rounds = made.get("rounds") or (made.get("sizes") or {}).get("rounds")
    absent, absences = _absent(made.get("absent") or {})
    return Result(
        path=path,
        date=made["date"],
        machine=made["machine"],
        versions=made["versions"],
        git=made.get("git") or {},
        rounds=rounds,
        quick=bool(made.get("quick")) or (rounds is not None and rounds < MIN_ROUNDS),
        ceilings=_ceilings(made),
        absent=absent,
        absences=absences,
        failed=[*(made.get("mismatches") or []), *(made.get("failures") or [])],
        rows=rows,
        curves=curves,
    )


def is_positive(value: Any) -> bool:
    """Whether a value from a JSON file is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _number(said: Any, name: str) -> float | None:
    """A field that a file may lack; None too for what is no number above 0."""
    value = said.get(name) if isinstance(said, dict) else None
    return value if is_positive(value) else None


def _absent(said: dict | list) -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """Result.absent and .absences. Older files of benchmarks.loop have a list of sentences that begin with a name, the
    others {"name: why": cases}."""
    if isinstance(said, list):
        return {reason: [] for reason in said}, {reason.split()[0]: set() for reason in said}
    absences: dict[str, set[str]] = {}
    for reason, cases in said.items():
        absences.setdefault(reason.split(": ")[0], set()).update(cases)
    return said, absences


def _ceilings(made: dict) -> dict[str, float]:
    """Rates a second: "bytes" of a large copy, "normals" of all threads, warp "instructions", and "flops DTYPE" of
    matrix products, as far as the file has them."""
    said = made.get("ceilings") or {}
    found = {
        "bytes": _number(made, "copy_bytes_per_s") or _number(said, "copy_bytes_per_s"),
        "normals": _number(said, "normals_per_s"),
        "instructions": _number(made, "issue_rate"),
    }
    flops = said["flops_per_s"] if isinstance(said.get("flops_per_s"), dict) else {}
    found |= {f"flops {dtype}": _number(flops, dtype) for dtype in flops}
    return {name: rate for name, rate in found.items() if rate}


def _rows(path: Path, made: dict) -> list[Row]:
    lines = made["results"]
    for i, line in enumerate(lines):
        if wrong := _wrong(line):
            nameless = {"object", "operation", "shape"} & set(wrong)
            name = "" if nameless else f" ({_case(line)})"
            raise InputError(f"{path}: results[{i}]{name} lacks a valid {', '.join(wrong)}; {ADVICE}: measure again")
    return [_row(line, made) for line in lines]


def _wrong(line: Any) -> list[str]:
    """The needed fields that a row does not have, or has as something else."""
    if not isinstance(line, dict):
        return ["object"]
    wrong = [name for name in ("measured", "baseline") if not isinstance(line.get(name), str)]
    if not _operation(line):
        wrong.append("operation")
    if not isinstance(line.get("case", ""), str):
        wrong.append("case")
    if not isinstance(line.get("shape", []), list):
        wrong.append("shape")
    if not is_positive(line.get("speedup")):
        wrong.append("speedup")
    interval = line.get("speedup_95")
    if not (isinstance(interval, list) and len(interval) == 2 and all(map(is_positive, interval))):
        wrong.append("speedup_95")
    for label in (line.get("measured"), line.get("baseline")):
        side = line.get(label) if isinstance(label, str) else None
        if isinstance(label, str) and not (isinstance(side, dict) and is_positive(side.get("median_s"))):
            wrong.append(f"{label}.median_s")
    return wrong


def _row(line: dict, made: dict) -> Row:
    size, case = _size(line), _case(line)
    nbytes, bandwidth = _number(line, "bytes"), _bandwidth(line, made)
    ours, peer = (_side(line, line[name]) for name in ("measured", "baseline"))
    known = ("dtype", "memory_format", "network", "batch", "steps")
    setting = line.get("setting", "calls")  # there was only one, before there were GPUs
    return Row(
        case=case,
        name=" ".join(case.replace(size, "").split()) if size else _name(line),
        size=size,
        operation=_operation(line),
        setting=setting,
        measured=line["measured"],
        baseline=line["baseline"],
        speedup=line["speedup"],
        low=line["speedup_95"][0],
        high=line["speedup_95"][1],
        ours=ours,
        peer=peer,
        copy_share=nbytes / bandwidth / ours.median_s if nbytes and bandwidth else None,
        floors=_floors(line, made),
        notes=tuple(map(str, line.get("notes") or ())),
        identity=(case, size, setting, line["measured"], line["baseline"], *(line.get(name) or None for name in known)),
    )


def _operation(line: dict) -> str:
    return str(line.get("operation") or line.get("what") or "")


def _size(line: dict) -> str:
    return "x".join(map(str, line.get("shape") or []))


def _case(line: dict) -> str:
    """The name of a row's case, as the newer files have it."""
    if "case" in line:
        return line["case"]
    network = line.get("network")  # of an op only whether it is around one
    parts = [_operation(line), network if isinstance(network, str) else "", line.get("dtype"), _size(line)]
    parts += ["channels_last" if line.get("memory_format") == "channels_last" else "", line.get("batch")]
    return " ".join(str(part) for part in parts if part)


def _name(line: dict) -> str:
    """A row without a shape for the reader: "sampling cifar10 bf16, batch 64, 50 steps"."""
    case, batch = _case(line), line.get("batch")
    parts = [case.removesuffix(f" {batch}"), f"batch {batch}"] if batch else [case]
    if _operation(line) == "sampling" and "steps" in line:
        parts.append(f"{line['steps']} steps")
    return ", ".join(parts)


def _side(line: dict, label: str) -> Side:
    said = line[label]
    errors = line.get("errors")
    error = said.get("error", errors.get(label) if isinstance(errors, dict) else None)
    return Side(said["median_s"], error, *(_number(said, name) for name in ("gb_per_s", "images_per_s", "mfu")))


def _bandwidth(line: dict, made: dict) -> float | None:
    """Bytes a second of a copy: the file's own ceiling, or the copy of the same size that ran beside the row."""
    if ceiling := _ceilings(made).get("bytes"):
        return ceiling
    rate = _number(_beside(line, made, CEILING), "gb_per_s")
    return 1e9 * rate if rate else None


def _beside(line: dict, made: dict, operation: str) -> dict | None:
    """What was measured of an operation at the size of another row."""
    for other in made["results"]:
        if _operation(other) == operation and other.get("shape") and other["shape"] == line.get("shape"):
            return other[other["measured"]]
    return None


def _floors(line: dict, made: dict) -> dict[str, float]:
    rates = _ceilings(made)
    pairs = {
        "bytes": (_number(line, "bytes"), _bandwidth(line, made)),
        "flops": (_number(line, "flops"), rates.get(f"flops {line.get('dtype')}")),
        "normals": (_number(line, "normals"), rates.get("normals")),
        "instructions": (_number(line, "warp_instructions"), rates.get("instructions")),
    }
    # Of an op there is the rate at which it drew normals, beside that of the `normal` of its size.
    ours, per_thread = line[line["measured"]], "normals_per_s_per_thread"
    if (rate := _number(ours, per_thread)) and _operation(line) != "normal":
        pairs["normals"] = (rate * ours["median_s"], _number(_beside(line, made, "normal"), per_thread))
    floors = {name: count / rate for name, (count, rate) in pairs.items() if count and rate}
    if (seconds := _number(line, "floor_s")) and isinstance(line.get("floor_is"), str):
        floors.setdefault(line["floor_is"], seconds)
    return floors


def _curve(where: str, entry: Any) -> Curve:
    names = ("name", "measured", "against", "quantity")
    wrong = [name for name in names if not (isinstance(entry, dict) and isinstance(entry.get(name), str))]
    points = [entry.get(name) if isinstance(entry, dict) else None for name in ("x", "y")]
    if not all(isinstance(values, list) and all(map(is_positive, values)) for values in points):
        wrong.append("x, y")
    elif len(points[0]) != len(points[1]) or len(points[0]) < 2:
        wrong.append("x, y of one length, at least 2")
    if isinstance(entry, dict) and not isinstance(entry.get("exponent"), int | float):
        wrong.append("exponent")
    if wrong:
        raise InputError(
            f"{where} lacks a valid {', '.join(wrong)}; expected a curve of positive numbers: measure again"
        )
    return Curve(*(entry[name] for name in names), *map(tuple, points), float(entry["exponent"]))
