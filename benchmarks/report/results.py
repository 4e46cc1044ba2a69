"""Result files as `python -m benchmarks.ratios`, `.loop` and `.growth` write them, read back and checked.

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
# Of benchmarks.growth: the fields of a point and of its exponent, what they are, and the unit that is drawn.
QUANTITIES = (
    ("seconds", "seconds_exponent", "time (s)", 1),
    ("peak_bytes", "memory_exponent", "peak memory (MiB)", 2**20),
)
ADVICE = "expected the JSON that `python -m benchmarks.ratios --out FILE.json` writes (or benchmarks.loop or .growth)"


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
    """Ours beside one peer. case: its name in the file. name: for the reader, without the size. counts: how many
    "bytes", "normals", "flops" or "instructions" it takes at least. rates: how many of them the machine does a second
    at best. floors: seconds that no implementation can go under, by what sets them: counts over rates, or whatever else
    the file names. notes: what differs between the two."""

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
    network: str
    dtype: str
    counts: dict[str, float]
    rates: dict[str, float]
    floors: dict[str, float]
    notes: tuple[str, ...]
    identity: tuple

    @property
    def place(self) -> str:
        """What it is of: the shape of an op's images, the network of a layer above the ops."""
        return self.size or self.network

    @property
    def copy_share(self) -> float | None:
        """The bytes a second of ours over those of a copy."""
        return self.floors["bytes"] / self.ours.median_s if "bytes" in self.counts.keys() & self.rates.keys() else None

    @property
    def floor(self) -> tuple[str, float] | None:
        """(what sets it, seconds) of the floor that binds: the highest."""
        return max(self.floors.items(), key=lambda item: item[1]) if self.floors else None

    def __str__(self) -> str:
        return f"{self.case} [{self.setting}], {self.measured} beside {self.baseline}"


@dataclass(frozen=True)
class Curve:
    """How a quantity of ours grows: y over x, and the exponent of the power law through it, if there is one."""

    name: str
    against: str
    quantity: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    exponent: float | None


@dataclass(frozen=True)
class NoiseMemory:
    """Peak bytes of a training step with its noise stored and regenerated, and those of the noise itself."""

    name: str
    stored: int
    regenerated: int
    noise: int


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
    noise: list[NoiseMemory]


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
    optional = {"git": dict, "sizes": dict, "ceilings": dict, "absent": dict | list, "noise": list}
    optional |= {"mismatches": list, "failures": list, "rounds": int}
    kinds |= {name: kind for name, kind in optional.items() if made.get(name) is not None}
    if wrong := [name for name, kind in kinds.items() if not isinstance(made.get(name), kind)]:
        raise InputError(f"{path} is no result: {', '.join(wrong)} missing or of another kind; {ADVICE}")
    rows, curves, noise = _rows(path, made), _curves(path, made), _noise(path, made)
    if not (rows or curves or noise):
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
        noise=noise,
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
        "normals": _number(made, "normals_per_s") or _number(said, "normals_per_s"),
        "instructions": _number(made, "issue_rate"),
    }
    flops = said["flops_per_s"] if isinstance(said.get("flops_per_s"), dict) else {}
    found |= {f"flops {dtype}": _number(flops, dtype) for dtype in flops}
    return {name: rate for name, rate in found.items() if rate}


def _rows(path: Path, made: dict) -> list[Row]:
    lines = made["results"]
    for i, line in enumerate(lines):
        if not _is_growth(line) and (wrong := _wrong(line)):
            nameless = {"object", "operation", "shape"} & set(wrong)
            name = "" if nameless else f" ({_case(line)})"
            raise InputError(f"{path}: results[{i}]{name} lacks a valid {', '.join(wrong)}; {ADVICE}: measure again")
    return [_row(line, made) for line in lines if not _is_growth(line)]


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
    counts, rates = _counts(line, made), _rates(line, made)
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
        network=line["network"] if isinstance(line.get("network"), str) else "",
        dtype=str(line.get("dtype") or ""),
        counts=counts,
        rates=rates,
        floors=_floors(line, counts, rates),
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


def _counts(line: dict, made: dict) -> dict[str, float]:
    """Row.counts, as far as the file has them."""
    names = {"bytes": "bytes", "flops": "flops", "normals": "normals", "instructions": "warp_instructions"}
    counts = {name: _number(line, field) for name, field in names.items()}
    # Older files of ops have the rate at which ours drew normals.
    ours, threads = line[line["measured"]], _number(made["machine"], "threads")
    if (rate := _number(ours, "normals_per_s_per_thread")) and threads and _operation(line) != "normal":
        counts["normals"] = counts["normals"] or rate * threads * ours["median_s"]
    return {name: count for name, count in counts.items() if count}


def _rates(line: dict, made: dict) -> dict[str, float]:
    """Row.rates, as far as the file has them."""
    ceilings = _ceilings(made)
    rates = {
        "bytes": _bandwidth(line, made),
        "flops": ceilings.get(f"flops {line.get('dtype')}"),
        "normals": ceilings.get("normals"),
        "instructions": ceilings.get("instructions"),
    }
    # Older files of ops have that of the `normal` of the same size.
    threads = _number(made["machine"], "threads")
    if (rate := _number(_beside(line, made, "normal"), "normals_per_s_per_thread")) and threads:
        rates["normals"] = rates["normals"] or rate * threads
    return {name: rate for name, rate in rates.items() if rate}


def _floors(line: dict, counts: dict[str, float], rates: dict[str, float]) -> dict[str, float]:
    floors = {name: count / rates[name] for name, count in counts.items() if name in rates}
    if (seconds := _number(line, "floor_s")) and isinstance(line.get("floor_is"), str):
        floors.setdefault(line["floor_is"], seconds)
    return floors


def _is_growth(line: Any) -> bool:
    return isinstance(line, dict) and "points" in line


def _curves(path: Path, made: dict) -> list[Curve]:
    """Two curves of each result of benchmarks.growth. Points at 0, which no logarithmic axis shows, are left out."""
    curves = []
    for i, line in enumerate(made["results"]):
        if not _is_growth(line):
            continue
        wrong = [name for name in ("task", "axis") if not isinstance(line.get(name), str)]
        points, fixed = line["points"], line.get("fixed")
        if not isinstance(points, list) or not all(is_positive(p.get("x")) for p in points if isinstance(p, dict)):
            wrong.append("points.x")
        elif not all(isinstance(p, dict) and isinstance(p.get(y), int | float) for p in points for y, *_ in QUANTITIES):
            wrong.append("points (seconds, peak_bytes)")
        if not isinstance(fixed, dict):
            wrong.append("fixed")
        if wrong:
            raise InputError(f"{path}: results[{i}] lacks a valid {', '.join(wrong)}; {ADVICE}: measure again")
        for y, exponent, quantity, unit in QUANTITIES:
            shown = [(p["x"], p[y] / unit) for p in points if is_positive(p[y])]
            if shown:
                against = line["axis"].replace("_", " ")
                power = line.get(exponent)
                power = power if isinstance(power, int | float) else None
                curves.append(Curve(_fixed_name(line), against, quantity, *zip(*shown, strict=True), power))
    return curves


def _fixed_name(line: dict) -> str:
    """What a curve or a pair of benchmarks.growth was measured of: "sampling cifar10 fp32, batch 8, 32 pixels"."""
    fixed = line["fixed"]
    name = " ".join(str(part) for part in (line["task"], fixed.get("network"), fixed.get("dtype")) if part)
    parts = [name]
    if "batch" in fixed:
        parts.append(f"batch {fixed['batch']}")
    if "image_size" in fixed:
        parts.append(f"{fixed['image_size']} pixels")
    if "steps" in fixed and line["task"] == "sampling":
        parts.append(f"{fixed['steps']} steps")
    return ", ".join(parts)


def _noise(path: Path, made: dict) -> list[NoiseMemory]:
    found = []
    for i, line in enumerate(made.get("noise") or []):
        ways = [line.get(way) if isinstance(line, dict) else None for way in ("stored", "regenerated")]
        peaks = [way.get("peak_bytes") if isinstance(way, dict) else None for way in ways]
        if not all(isinstance(peak, int) for peak in peaks) or not is_positive(line.get("noise_bytes")):
            raise InputError(f"{path}: noise[{i}] lacks a valid peak_bytes or noise_bytes; {ADVICE}: measure again")
        if not isinstance(line.get("task"), str) or not isinstance(line.get("fixed"), dict):
            raise InputError(f"{path}: noise[{i}] lacks a valid task or fixed; {ADVICE}: measure again")
        found.append(NoiseMemory(_fixed_name(line), *peaks, line["noise_bytes"]))
    return found
