"""Result files as a page, or one against another: `python -m benchmarks.report draw` and `... compare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from ddpm_fast.compare import THRESHOLD, Change
from ddpm_fast.compare import compare as compared
from ddpm_fast.page import draw as drawn
from ddpm_fast.results import Result, read_result
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddpm_fast import duration
from ddpm_fast.commands.common import console, plain_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.command()
def draw(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="What the benchmarks wrote.")],
    out: Annotated[Path, typer.Option(help="The page; its pictures go to images/ beside it.")] = Path(
        "docs/benchmarks.md"
    ),
) -> None:
    """Draw a page of tables and pictures from result files."""
    with plain_errors():
        command = shlex.join(["python", "-m", "benchmarks.report", "draw", *map(str, results), "--out", str(out)])
        for path in drawn([read_result(path) for path in results], out, command):
            console.print(f"Wrote {escape(str(path))}", soft_wrap=True)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD.json", help="The result from before.")],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="The result from now.")],
) -> None:
    """Name what became slower or faster beyond noise; exit with status 1 if anything became slower."""
    with plain_errors():
        before, after = read_result(old), read_result(new)
        found = compared(before, after)
        console.print(f"{_when(before)}\n{_when(after)}", soft_wrap=True)
        for warning in found.warnings:
            console.print("[yellow]Warning:[/]", escape(warning), soft_wrap=True)
        for title, changes, colour in (("Slower", found.slower, "red"), ("Faster", found.faster, "green")):
            if changes:
                # A table wrapped to the 80 columns of a log file cannot be read.
                Console(highlight=False, width=max(console.width, 190)).print(_table(title, changes, colour))
        console.print(
            f"{len(found.slower)} slower and {len(found.faster)} faster beyond noise (the 95% intervals do not "
            f"overlap, and the change is more than {THRESHOLD:.0%}); {found.same} as before",
            soft_wrap=True,
        )
        for rows, where in ((found.only_old, before), (found.only_new, after)):
            for row in rows:
                console.print(f"Only in {escape(where.path.name)}: {escape(str(row))}", soft_wrap=True)
        for message in after.failed:
            console.print("[red]Not timed:[/]", escape(message), soft_wrap=True)
        if found.slower:
            raise typer.Exit(1)


def _when(result: Result) -> str:
    commit = (result.git.get("commit") or "not known")[:12]
    changed = ", with changes" if result.git.get("changed_files") else ""
    return f"{escape(str(result.path))}: commit {commit}{changed}, {result.date}"


def _table(title: str, changes: list[Change], colour: str) -> Table:
    table = Table(title=f"[{colour}]{title}[/] (speed-up is the peer's time over ours)", title_justify="left")
    for name in ("case", "calls", "ours", "peer"):
        table.add_column(name)
    for name in ("speed-up before", "now", "ours takes", "ours before", "now", "peer before", "now"):
        table.add_column(name, justify="right")
    for change in changes:
        ratios = [f"{row.speedup:.2f} ({row.low:.2f}..{row.high:.2f})" for row in (change.old, change.new)]
        times = [duration(row.ours.median_s) for row in (change.old, change.new)]
        peers = [duration(row.peer.median_s) for row in (change.old, change.new)]
        row = change.new
        names = [escape(name) for name in (row.case, row.setting, row.measured, row.baseline)]
        table.add_row(*names, *ratios, f"{change.slowdown:+.0%}", *times, *peers)
    return table


if __name__ == "__main__":
    app()
