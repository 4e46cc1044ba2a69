"""python -m tests.fuzz ops|files|kills: look for crashes, hangs, wrong values and unreadable states, with random cases.

Each failure is printed with the command that repeats it. The exit status is 1 if there was one.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: workers are forked, and OpenMP's threads are not

from typing import Annotated

import typer

from tests.fuzz import files, kills, ops
from tests.fuzz.supervise import Fuzzer, repeat, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Minutes = Annotated[float, typer.Option(help="how long to run")]
Seed = Annotated[int, typer.Option(help="another seed makes other cases")]
Case = Annotated[int | None, typer.Option(help="repeat this case alone, and say what it does")]
First = Annotated[int, typer.Option(help="the first case")]


def _run(fuzzer: Fuzzer, minutes: float, count: int | None, seed: int, case: int | None, first: int) -> None:
    if case is not None:
        status, said = repeat(fuzzer, seed, case)
        print(said, end="")
        raise typer.Exit(1 if status else 0)
    raise typer.Exit(1 if run(fuzzer, seed, minutes, count, first).kinds else 0)


@app.command("ops")
def fuzz_ops(
    minutes: Minutes = 1.0,
    calls: Annotated[int | None, typer.Option(help="stop after so many calls")] = None,
    seed: Seed = 0,
    case: Case = None,
    first: First = 0,
) -> None:
    """Calls of the fused ops, and of what takes numbers, with arguments that fit and that do not."""
    _run(ops.FUZZER, minutes, calls, seed, case, first)


@app.command("files")
def fuzz_files(
    minutes: Minutes = 1.0,
    count: Annotated[int | None, typer.Option("--files", help="stop after so many files")] = None,
    seed: Seed = 0,
    case: Case = None,
    first: First = 0,
) -> None:
    """Damaged and hostile models, training states, pictures and data sets."""
    _run(files.FUZZER, minutes, count, seed, case, first)


@app.command("kills")
def fuzz_kills(
    minutes: Minutes = 1.0,
    count: Annotated[int | None, typer.Option("--kills", help="stop after so many kills")] = None,
    seed: Seed = 0,
    case: Case = None,
    first: First = 0,
) -> None:
    """Training and sampling that are killed at a random moment, and continued."""
    _run(kills.FUZZER, minutes, count, seed, case, first)


if __name__ == "__main__":
    app()
