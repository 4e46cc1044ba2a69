"""`python -m benchmarks ledger`: kernels and bytes, ours and diffusers', eager and as a compiler would group them."""

import json
from pathlib import Path
from typing import Any

from benchmarks import machine, peers
from benchmarks.ledger.cases import OURS, cases, count
from benchmarks.ledger.fused import fused
from benchmarks.ledger.pretence import META
from benchmarks.ledger.tables import Total, draw, groups, table
from benchmarks.runs import say
from ddpm_fast.commands.common import console
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path, check_writable
from ddpm_fast.pictures.canvas import check_picture, save_figure

EAGER, FUSED = "eager", "fused"


def totals(size: str, only: str = "") -> list[Total]:
    """Every case of a network whose name holds `only`, each eager and fused. diffusers' are left out, with a line that
    says so, where it is not installed. Raises InputError if there is no such case."""
    absent = peers.absent(peers.DIFFUSERS)
    if absent:
        say(f"Absent: {absent}")
    chosen = [case for case in cases(size) if only in str(case)]
    if not chosen:
        raise InputError(f"no case's name holds {only!r}; there are {'; '.join(map(str, cases(size)))}")
    made = []
    for case in chosen:
        if case.side == OURS or not absent:
            lines = count(case)
            made += [Total.of(case, EAGER, lines), Total.of(case, FUSED, fused(lines))]
    return made


def main(size: str, only: str, out: Path | None, figure: Path | None) -> None:
    """Prints the tables, and writes the files that were asked for."""
    if out is not None:
        check_writable(out)
    if figure is not None:
        check_picture(figure)
    made = totals(size, only)
    for group in groups(made):
        console.print(table(group))
    if out is not None:
        found: dict[str, Any] = machine.environment(META)
        found |= {"device": "meta", "size": size, "ledger": [total.to_dict() for total in made]}
        with atomic_path(out) as path:
            path.write_text(json.dumps(found, indent=1) + "\n")
        say(f"Wrote {out}")
    if figure is not None:
        save_figure(draw(made), figure)
        say(f"Wrote {figure}")
