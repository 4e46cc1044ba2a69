"""What a sweep has found: its file, a table of it, and its figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ddpm_fast.commands.quality import quantities
from ddpm_fast.commands.quality.axes import Combination
from ddpm_fast.commands.quality.quantities import FRECHET, KERNEL, SCORE, best_of, best_of_all, measured
from ddpm_fast.errors import InputError, printable
from ddpm_fast.pictures import sweeps
from ddpm_fast.pictures.page import HtmlPage

KIND = "sweep"  # what the JSON says that it is
_DRAWN = (FRECHET, KERNEL, "precision", "recall", SCORE)  # the rows of the figure
_TEXTS = ("model", "model_digest", "sampler", "spacing")
_NUMBERS = ("guidance", "network_calls", "seconds", "seconds_per_image")


def read_sweep(path: Path) -> dict[str, Any]:
    """The report of a sweep.

    Raises:
        InputError: If the file is none.
    """
    advice = "expected the .json that `python -m ddpm_fast.evaluate fid --sweep ... --out FILE.json` writes"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {advice}") from error
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise InputError(f"{path} is not the report of a sweep; {advice}")
    rows, axes = report.get("combinations"), report.get("axes")
    settings = report.get("settings")
    known = isinstance(settings, dict) and all(
        isinstance(settings.get(name, {}), dict | None) for name in ("reference", "features")
    )
    if not known or not isinstance(axes, dict) or not isinstance(rows, list):
        raise InputError(f"{path} lacks settings, axes or combinations; {advice}")
    for row in rows:
        _check_row(row, path, advice)
    return report


def _check_row(row: Any, path: Path, advice: str) -> None:
    """Raises InputError for what is no row of a sweep."""
    is_row = (
        isinstance(row, dict)
        and all(_is(row.get(name), str) for name in _TEXTS)
        and _is(row.get("steps"), int | str)
        and all(_is(row.get(name), int | float) for name in _NUMBERS)
        and _is(row.get("eta"), int | float | None)
        and all(
            isinstance(row.get(one.metric, {}), dict)
            and all(_is(row.get(one.metric, {}).get(name), int | float | None) for name in (one.field, one.error or ""))
            for one in quantities.QUANTITIES
        )
    )
    if not is_row:
        raise InputError(f"{path}: one of its combinations is none: {row!r:.200}; {advice}")


def _is(value: object, kind: Any) -> bool:
    """Whether a value from a JSON file is of a kind; True and False are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def combination_of(row: Mapping[str, Any]) -> Combination:
    """The combination that a row is of."""
    return Combination(
        model=row["model"],
        sampler=row["sampler"],
        steps=row["steps"],
        spacing=row["spacing"],
        eta=row.get("eta"),
        guidance=float(row["guidance"]),
    )


def varied(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options that are not the same in all rows, in the order of the columns."""
    names = ("model", "sampler", "steps", "spacing", "eta", "guidance")
    return [name for name in names if len({row[name] for row in rows if row.get(name) is not None}) > 1]


def table_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A table of the rows: the heads of its columns, and its cells. The sampler and the steps are always there."""
    options = list(dict.fromkeys(["sampler", "steps", *varied(rows)]))
    shown = measured(rows)
    heads = [*options, "calls", "s/image", *(f"{one.name} {'↓' if one.lower_is_better else '↑'}" for one in shown)]
    cells = [
        [
            *("-" if row.get(name) is None else printable(_short(row[name])) for name in options),
            str(row["network_calls"]),
            f"{row['seconds_per_image']:.3g}",
            *(one.text(row) for one in shown),
        ]
        for row in rows
    ]
    return heads, cells


def best_cells(rows: Sequence[Mapping[str, Any]]) -> set[tuple[int, int]]:
    """The rows and columns of the cells of table_of that have the best value of their column."""
    shown = measured(rows)
    first = len(table_of(rows)[0]) - len(shown)
    found = {(best_of(one, rows), first + i) for i, one in enumerate(shown)} if len(rows) > 1 else set()
    return {(row, column) for row, column in found if row is not None}


def markdown_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown, in columns that are even in plain text too: the best of each column is bold."""
    rows = _sorted(rows)
    heads, cells = table_of(rows)
    bold = best_cells(rows)
    lines = [
        heads,
        *(
            [f"**{cell}**" if (i, j) in bold else cell.replace("|", "\\|") for j, cell in enumerate(row)]
            for i, row in enumerate(cells)
        ),
    ]
    widths = [max(len(line[j]) for line in lines) for j in range(len(heads))]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    best = best_of_sweep(rows)
    if best is not None:
        texts += ["", f"Best by {best['by']}: {best['words']}."]
    return "\n".join(texts) + "\n"


def _sorted(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows by model and sampler, in the order in which these come, and then by the other options and the steps."""
    first: dict[Any, int] = {}
    for row in rows:
        first.setdefault((row["model"], row["sampler"]), len(first))

    def place(row: Mapping[str, Any]) -> tuple:
        others = (row["spacing"], row.get("eta") or 0, row["guidance"], row["network_calls"])
        return (first[row["model"], row["sampler"]], *others)

    return sorted(rows, key=place)


def best_of_sweep(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best row: its number from 0 ("row"), what it is the best by ("by"), and its combination ("words")."""
    found = best_of_all(rows)
    if found is None:
        return None
    place, by = found
    return {"row": place, "by": by, "words": printable(combination_of(rows[place]).describe(varied(rows)))}


def figure_of(report: Mapping[str, Any]) -> Figure:
    """The figure of a sweep: a line for each sampler, and for each model, spacing and eta where these vary.

    Args:
        report: As read_sweep returns it, with at least one combination.
    """
    rows = report["combinations"]
    names = [name for name in ("model", "sampler", "spacing", "eta") if name in varied(rows) or name == "sampler"]
    shown = [one for one in measured(rows) if one.name in _DRAWN]
    points = [
        sweeps.Point(
            series=printable(" ".join(_series(name, row[name]) for name in names if row.get(name) is not None)),
            calls=row["network_calls"],
            seconds=row["seconds_per_image"],
            guidance=row["guidance"],
            values={one.name: value for one in shown if (value := one.value(row)) is not None},
            errors={one.name: error for one in shown if (error := one.error_of(row)) is not None},
        )
        for row in rows
    ]
    best = best_of_sweep(rows)
    return sweeps.draw_sweep(
        points,
        [sweeps.Quantity(one.name, one.lower_is_better) for one in shown],
        None if best is None else points[best["row"]],
        about(report["settings"]),
    )


def about(settings: Mapping[str, Any]) -> str:
    """A line that says what was measured of how many samples, and against what."""
    reference, features = settings.get("reference") or {}, settings.get("features") or {}
    against = f" against {reference.get('n')} images of {reference.get('name')}" if reference else ""
    return printable(f"{settings.get('n')} samples each{against}; features: {features.get('name')}")


def _series(name: str, value: Any) -> str:
    """A part of the name of a line."""
    return f"eta {value:g}" if name == "eta" else str(value)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def add_sweep(page: HtmlPage, report: Mapping[str, Any]) -> None:
    """Add a section: the figure, and the table with its best row marked. report: see figure_of."""
    page.section("Ways of drawing")
    rows = _sorted(report["combinations"])
    if not rows:
        return
    page.figure(figure_of(report), "The quality against the steps, the seconds an image and the guidance")
    best = best_of_sweep(rows)
    page.table(*table_of(rows), marked=None if best is None else best["row"])
    if best is not None:
        page.text(f"Best by {best['by']}: {best['words']}.")
