"""The ledger as a table for the terminal, as JSON, and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.ledger.cases import Case
from benchmarks.ledger.entries import KINDS, Line
from ddpm_fast.pictures.canvas import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, WIDTH, look

_COLOURS = (BLUE, SKY, PURPLE, VERMILION, ORANGE, "0.55", GREEN, "0.8", "0.3", "black")


class Total(NamedTuple):
    """What a variant of a case launches and moves: (kernels, bytes) by kind and by op. variant: eager or fused."""

    case: Case
    variant: str
    kinds: dict[str, tuple[int, int]]
    ops: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, case: Case, variant: str, lines: Sequence[Line]) -> Total:
        kinds: dict[str, tuple[int, int]] = {}
        ops: dict[str, tuple[int, int]] = {}
        for line in lines:
            for sums, name in ((kinds, line.kind), (ops, line.op)):
                kernels, moved = sums.get(name, (0, 0))
                sums[name] = kernels + line.kernels, moved + line.bytes
        return cls(case, variant, {kind: kinds[kind] for kind in KINDS if kind in kinds}, dict(sorted(ops.items())))

    @property
    def kernels(self) -> int:
        return sum(kernels for kernels, _ in self.kinds.values())

    @property
    def bytes(self) -> int:
        return sum(moved for _, moved in self.kinds.values())

    @property
    def name(self) -> str:
        return self.case.side if self.variant == "eager" else f"{self.case.side}, {self.variant}"

    @property
    def work(self) -> str:
        return f"{self.case.work}, {self.case.size} bf16, batch {self.case.batch}"

    def to_dict(self) -> dict[str, Any]:
        """For the JSON: {"kernels", "bytes"} in all, by kind and by op."""
        made: dict[str, Any] = {**self.case._asdict(), "variant": self.variant}
        made |= {"kernels": self.kernels, "bytes": self.bytes}
        for name, sums in (("kinds", self.kinds), ("ops", self.ops)):
            made[name] = {key: {"kernels": kernels, "bytes": moved} for key, (kernels, moved) in sums.items()}
        return made


def groups(totals: Sequence[Total]) -> list[list[Total]]:
    """The totals of the same work at the same size, side by side."""
    made: dict[str, list[Total]] = {}
    for total in totals:
        made.setdefault(total.work, []).append(total)
    return list(made.values())


def _unit(totals: Sequence[Total]) -> tuple[float, str]:
    """The bytes of the unit that suits the largest of the totals, and its name."""
    return (1e9, "GB") if max(total.bytes for total in totals) >= 1e9 else (1e6, "MB")


def table(totals: Sequence[Total]) -> Table:
    """Kernels and bytes by kind, a column for each of the totals, all of the same work: 80 characters for four."""
    (scale, unit), kinds = _unit(totals), [kind for kind in KINDS if any(kind in total.kinds for total in totals)]
    made = Table(title=totals[0].work, title_justify="left")
    made.add_column("\n\nkind", no_wrap=True)
    for total in totals:
        heading = f"{total.case.side}\n{total.variant}\nkernels{unit:>5}"
        made.add_column(heading, justify="right", no_wrap=True)

    def cells(found: list[tuple[int, int] | None]) -> list[str]:
        return [f"{pair[0]} {pair[1] / scale:6.2f}" if pair else "" for pair in found]

    for kind in kinds:
        made.add_row(kind, *cells([total.kinds.get(kind) for total in totals]))
    made.add_section()
    made.add_row("all", *cells([(total.kernels, total.bytes) for total in totals]))
    return made


def draw(totals: Sequence[Total]) -> Figure:
    """Stacked bars: kernels on the left and bytes on the right, a row for each piece of work."""
    rows = groups(totals)
    kinds = [kind for kind in KINDS if any(kind in total.kinds for total in totals)]
    colours = dict(zip(KINDS, _COLOURS, strict=True))
    with look():
        figure = Figure((WIDTH, 0.9 + sum(0.75 + 0.3 * len(row) for row in rows)), layout="constrained")
        ratios = [0.75 + 0.3 * len(row) for row in rows]
        panels = figure.subplots(len(rows), 2, sharey="row", squeeze=False, height_ratios=ratios)
        for row, pair in zip(rows, panels, strict=True):
            scale, unit = _unit(row)
            for column, (axes, label) in enumerate(zip(pair, ("kernels", unit), strict=True)):
                for place, total in enumerate(row):
                    left = 0.0
                    for kind in kinds:
                        width = total.kinds.get(kind, (0, 0))[column] / (scale if column else 1)
                        axes.barh(place, width, 0.75, left=left, color=colours[kind], label=kind if not place else None)
                        left += width
                    text = f"{left:.3g}" if column else f"{left:.0f}"
                    axes.annotate(text, (left, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
                axes.set_yticks(range(len(row)), [total.name for total in row])
                longest = max(total.bytes / scale if column else total.kernels for total in row)
                axes.set(xlabel=label, title=row[0].work if not column else "", xlim=(0, 1.15 * longest))
                axes.grid(axis="y", visible=False)
            pair[0].invert_yaxis()
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure
