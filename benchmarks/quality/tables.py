"""What was found, as tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLUMNS = {
    "Frechet": lambda line: line["fid"]["value"],
    "kernel, 1e-3": lambda line: 1e3 * line["kid"]["value"],
    "precision": lambda line: line["pr"]["precision"],
    "recall": lambda line: line["pr"]["recall"],
    "density": lambda line: line["pr"]["density"],
    "coverage": lambda line: line["pr"]["coverage"],
}


def scores(runs: Iterable[Mapping[str, Any]]) -> str:
    """Scores: the mean over the seeds, and the standard deviation of one seed behind it."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for line in runs:
        drawing = line["drawing"]
        key = (line["name"], line["average"], f"{drawing['sampler']}, {drawing['steps']}", line["images"], drawing["n"])
        groups.setdefault(key, []).append(line)
    rows = []
    for (name, average, sampler, images, n), group in sorted(groups.items()):
        cells = [name, average, sampler, f"{images:,}", f"{n:,}", str(len(group))]
        rows.append(cells + [spread([read(line) for line in group]) for read in COLUMNS.values()])
    return _table(["recipe", "average", "sampler, steps", "images seen", "samples", "seeds", *COLUMNS], rows)


def times(results: Iterable[Mapping[str, Any]]) -> str:
    """When both sides of a speedrun were at each goal."""
    rows = []
    for result in results:
        ratio = "-" if result["speedup"] is None else f"{result['speedup']:.2f}"
        rows.append([f"{result['goal']:.3f}", point(result["ours"]), point(result["theirs"]), ratio])
    return _table(["Frechet distance", "ours", "theirs", "times sooner"], rows)


def parts(rows: Iterable[Mapping[str, Any]]) -> str:
    """What it costs to put each part of ours back."""
    names = {"fid": "Frechet distance", "images": "images", "seconds": "seconds an image", "time": "time"}
    cells = [[row["part"], *(f"{row[key]:.3g}" if key in row else "-" for key in names)] for row in rows]
    return _table(["part put back", *names.values()], cells)


def point(found: Mapping[str, Any] | None) -> str:
    """A point of a curve, for people."""
    return "not there" if found is None else f"{found['seconds'] / 60:.1f} minutes, {found['images']:,} images"


def spread(values: Sequence[float]) -> str:
    """A mean, with the standard deviation where there are several values."""
    mean = statistics.fmean(values)
    told = _short(mean, 3)
    return told if len(values) < 2 else f"{told} ± {_short(statistics.stdev(values), 2)}"


def _short(value: float, digits: int) -> str:
    """A number with so many digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(cells) for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)
