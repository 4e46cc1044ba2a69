"""`python -m benchmarks report draw` and `... compare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from benchmarks.report.compare import MEMORY_THRESHOLD, THRESHOLD
from benchmarks.report.compare import compare as compared
from benchmarks.report.page import draw as drawn
from benchmarks.report.results import read_result
from ddpm_fast.commands.common import console, plain_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.command()
def draw(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="Files that the benchmarks wrote.")],
    out: Annotated[Path, typer.Option(help="The page; its pictures go to images/ in the same folder.")] = Path(
        "docs/benchmarks.md"
    ),
) -> None:
    """Draw a page of tables and pictures from result files."""
    with plain_errors():
        command = shlex.join(["python", "-m", "benchmarks", "report", "draw", *map(str, results), "--out", str(out)])
        for path in drawn([read_result(path) for path in results], out, command):
            console.print(f"Wrote {escape(str(path))}", soft_wrap=True)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD.json", help="The earlier result.")],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="The later result.")],
) -> None:
    """Name what became slower or faster beyond noise; exit with status 1 if anything became slower."""
    with plain_errors():
        before, after = read_result(old), read_result(new)
        found = compared(before, after)
        for result in (before, after):
            git = result.found["git"]
            changed = ", with changes" if git.get("changed_files") else ""
            commit = f"commit {(git.get('commit') or 'not known')[:12]}{changed}"
            console.print(f"{escape(str(result.path))}: {commit}, {result.found['date']}", soft_wrap=True)
        for warning in found.warnings:
            console.print("[yellow]Warning:[/]", escape(warning), soft_wrap=True)
        for title, changes in (("[red]Slower[/]", found.slower), ("[green]Faster[/]", found.faster)):
            for change in changes:
                text = f"{change.name}: {change.slowdown:+.0%}; before {change.before}; now {change.after}"
                console.print(f"{title} {escape(text)}", soft_wrap=True)
        console.print(
            f"{len(found.slower)} slower and {len(found.faster)} faster beyond noise (the 95% intervals do not "
            f"overlap and the ratio moved by more than {THRESHOLD:.0%}; memory by more than {MEMORY_THRESHOLD:.0%}); "
            f"{found.same} as before",
            soft_wrap=True,
        )
        for names, result in ((found.only_old, before), (found.only_new, after)):
            for name in names:
                console.print(f"Only in {escape(result.path.name)}: {escape(name)}", soft_wrap=True)
        for message in after.found["failures"]:
            console.print("[red]Failed:[/]", escape(message), soft_wrap=True)
        if found.slower:
            raise typer.Exit(1)
