"""What the benchmarks' commands share: their options, and how results are put down as JSON, as a page and in a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ddpm_fast.commands.common import console
from ddpm_fast.files.atomic import atomic_path, check_writable

Out = Annotated[Path, typer.Option(help="Where the results go, as JSON.")]
Page = Annotated[Path | None, typer.Option("--markdown", help="Where they go as a Markdown page too.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Backends = Annotated[list[str], typer.Option("--backend", help="Only this backend of ours (may be repeated).")]
Only = Annotated[str, typer.Option(help="Only the cases whose name holds this, such as 'q_sample uint8'.")]
Minutes = Annotated[float | None, typer.Option(help="Start nothing after so many minutes; the run fails then.")]


def check(out: Path, page: Path | None) -> None:
    """Raises InputError unless both can be written; for calling before minutes of work."""
    for path in filter(None, (out, page)):
        check_writable(path)


def write(report: dict, text: str, out: Path, page: Path | None) -> None:
    """Write the report as JSON and, if it has a place, the text as its page; say where they are."""
    with atomic_path(out) as path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    if page is not None:
        with atomic_path(page) as path:
            path.write_text(text)
    console.print(f"Wrote {out}" + (f" and {page}" if page else ""), soft_wrap=True)


def title(report: dict) -> str:
    """The machine and the versions of a report in a line."""
    machine, versions = report["machine"], report["versions"]
    libraries = f"torch {versions['torch']}, diffusers {versions['diffusers'] or 'not installed'}"
    if "gpu" not in machine:
        return f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads; {libraries}"
    card = machine["gpu"]
    return f"{card['name']}, driver {card['state'].get('driver_version')}; {libraries}, triton {versions['triton']}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; the first columns, of texts, start at the left, the others, of numbers, stand at the right."""
    lines = [list(header), ["---"] * texts + ["---:"] * (len(header) - texts), *map(list, rows)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 1e-6:.3g} us"
