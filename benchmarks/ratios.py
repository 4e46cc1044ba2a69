"""How much faster than each baseline, from interleaved rounds: `python -m benchmarks.ratios --out FILE.json`.

On the CPU, or with `--device cuda` on a GPU.

Machines are noisy, and noise is common to what runs within the same milliseconds. So the variants of a case take turns
(A B C A B C ...), each round gives one ratio for each baseline, and their median is the claim, with the 95% interval of
its bootstrap (Efron 1979).
"""

from __future__ import annotations

import contextlib
import functools
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from ddpm_fast.operations import Operation
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddpm_fast import cases, kernels, machine, report, timing
from ddpm_fast.commands.common import choose_device, console, plain_errors
from ddpm_fast.errors import InputError

MAX_SETS = 512  # more would rotate through sizes at which only the launches count
QUICK_ROUNDS = 3

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Setting(NamedTuple):
    """How the calls of a case are made. graph: replayed from a CUDA graph. sets: of tensors, used in turn."""

    graph: bool = False
    sets: int = 1

    def __str__(self) -> str:
        return ("graph" if self.graph else "calls") + (", L2 rotated" if self.sets > 1 else "")


def settings(nbytes: int, l2_bytes: int | None) -> list[Setting]:
    """The ways of calling that are measured for a call that moves so many bytes; the last is the one to quote.

    Without a GPU, and where one call overflows the L2 by itself, plain calls. Below that also a graph, on one set of
    tensors, as a training loop has them, and on so many that the L2 never holds what is asked for.
    """
    if l2_bytes is None or (sets := timing.rotation(nbytes, l2_bytes)) == 1:
        return [Setting()]
    return [Setting(), Setting(graph=True), *([Setting(graph=True, sets=sets)] if sets <= MAX_SETS else [])]


def batches(
    operation: Operation, labels: list[str], setting: Setting, skipped: dict[str, str]
) -> dict[str, timing.Batch]:
    """What is timed of each variant; those that this setting cannot have are added to skipped, with the reason."""
    made = {}
    operations = [operation, *(operation.replica() for _ in range(setting.sets - 1))]
    make = timing.graph_batch if setting.graph else timing.batch
    for label in labels:
        if setting.graph and label == "diffusers":
            skipped[label] = "its loop counts steps on the host, which a graph would freeze: only as plain calls"
            continue
        calls = [functools.partial(each.variant(label), None) for each in operations]
        within = functools.partial(operation.running, label)
        try:
            with within():
                made[label] = make(calls, operation.device)._replace(within=within)
        except RuntimeError as error:
            if not (setting.graph or isinstance(error, torch.OutOfMemoryError)):
                raise
            skipped[label] = f"{setting}: {str(error).splitlines()[0]}"
    return made


def compare(
    operation: Operation, setting: Setting, errors: dict[str, float], rounds: int, ceilings: Ceilings
) -> tuple[list[dict], dict[str, str]]:
    """(the results, one for each pair of a measured variant and a baseline; what was left out, and why)."""
    skipped: dict[str, str] = {}
    timed = batches(operation, list(errors), setting, skipped)
    columns = timing.interleaved(list(timed.values()), rounds, operation.device).T
    seconds = dict(zip(timed, columns, strict=True))
    measured, baselines = operation.labels(ceilings.ours)
    case = operation.case
    results = []
    for ours in [label for label in seconds if label in measured]:
        for baseline in [label for label in seconds if label in baselines]:
            results.append(
                {
                    "operation": case.operation,
                    "case": str(case),
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "shape": case.shape,
                    "memory_format": "channels_last" if case.channels_last else "contiguous",
                    "network": case.network,
                    "setting": str(setting),
                    "sets": setting.sets,
                    "measured": ours,
                    "baseline": baseline,
                    **timing.ratio(seconds[baseline], seconds[ours]),
                    "bytes": case.elements * operation.bytes_per_element,
                    **ceilings.of(operation, ours, float(np.median(seconds[ours]))),
                    **{
                        label: {
                            "error": errors[label],
                            "median_s": float(np.median(seconds[label])),
                            "min_s": float(seconds[label].min()),
                            **cases.rates(operation, float(np.median(seconds[label]))),
                        }
                        for label in (ours, baseline)
                    },
                }
            )
    return results, skipped


class Ceilings:
    """What the machine could do at best: a large copy's bandwidth, normals a second as `normal` draws them, and on a
    GPU its rate of instructions, beside what the kernels of each case execute, counted by kernels.py."""

    def __init__(self, ours: tuple[str, ...], bandwidth: float, normals: float, card: dict | None, counted: dict):
        self.ours, self.bandwidth, self.rate, self.counted = ours, bandwidth, machine.issue_rate(card), counted
        self.normals = normals

    def of(self, operation: Operation, label: str, seconds: float) -> dict:
        """What a result says of its floor, and how much of the time it is."""
        nbytes = operation.case.elements * operation.bytes_per_element
        instructions = kernels.instructions(self.counted, operation.case, label)
        issuing = instructions / self.rate if instructions and self.rate else None
        # `normal` itself is what the ceiling is made of.
        normals = 0 if operation.case.operation == "normal" else operation.case.elements * operation.normals
        drawing = normals / self.normals
        floor = machine.floor(bytes=nbytes / self.bandwidth, instructions=issuing or 0.0, normals=drawing)
        return {
            "normals": normals,
            "floor_s": floor.seconds,
            "floor_is": floor.bound_by,
            "floor_share": floor.seconds / seconds,
            "copy_share": nbytes / self.bandwidth / seconds,
            "kernels_s": kernels.seconds(self.counted, operation.case, label),
            "warp_instructions": instructions,
            "issue_share": None if issuing is None else issuing / seconds,
        }


COLUMNS = (
    *("case", "calls", "ours", "time", "ns/element", "GB/s", "of copy", "of issue", "floor", "floor is", "error"),
    *("baseline", "time", "error", "speed-up", "95% interval"),
)


def cells(line: dict) -> list[str]:
    """A result as text, under COLUMNS."""
    ours, other = line[line["measured"]], line[line["baseline"]]
    low, high = line["speedup_95"]
    issued = "-" if line["issue_share"] is None else f"{line['issue_share']:.0%}"
    return [
        *(line["case"], line["setting"], line["measured"]),
        *(report.duration(ours["median_s"]), f"{ours['ns_per_element']:.3g}", f"{ours['gb_per_s']:.3g}"),
        *(f"{line['copy_share']:.0%}", issued, report.duration(line["floor_s"]), line["floor_is"]),
        *(f"{ours['error']:.0e}", line["baseline"], report.duration(other["median_s"]), f"{other['error']:.0e}"),
        *(f"{line['speedup']:.2f}", f"{low:.2f}..{high:.2f}"),
    ]


def brief(results: list[dict]) -> list[str]:
    """The results in a line for each case, in the setting to quote (diffusers, which has no graph, from the plain
    calls): time and share of the floor of each measured variant, and what each baseline takes of the first's time."""
    by_case: dict[str, list[dict]] = {}
    for line in results:
        by_case.setdefault(line["case"], []).append(line)
    lines = []
    for case, group in by_case.items():
        setting = group[-1]["setting"]
        quoted = [line for line in group if line["setting"] == setting]
        ours = {line["measured"]: line for line in quoted}
        times = ", ".join(
            f"{label} {report.duration(line[label]['median_s'])} ({line['floor_share']:.0%} {line['floor_is']})"
            for label, line in ours.items()
        )
        plain = [line for line in group if line["baseline"] == "diffusers" and line not in quoted]
        ratios = " ".join(
            f"{line['baseline']} {line['speedup']:.2f}x" + " (calls)" * (line in plain)
            for line in [*quoted, *plain]
            if line["measured"] == quoted[0]["measured"]
        )
        lines.append(f"{case} [{setting.split()[-1]}] {times}; {ratios}".replace("instructions", "instr."))
    return lines


def _table(made: dict) -> Table:
    table = Table(*COLUMNS[:3], title=f"{report.title(made)}; {made['rounds']} rounds, medians")
    for name in COLUMNS[3:]:
        table.add_column(name, justify="right")
    previous = None
    for line in made["results"]:
        case, *rest = cells(line)
        if case != previous:
            table.add_section()
        table.add_row(case if case != previous else "", *rest)
        previous = case
    return table


def markdown(made: dict) -> str:
    """The results as a page."""
    lines = [f"# Fused ops\n\n{report.title(made)}; {made['rounds']} rounds, medians. {made['date']}.\n"]
    lines.append(f"A large copy moves {1e-9 * made['copy_bytes_per_s']:.0f} GB/s (bytes read and written).")
    lines.append(f"`normal` draws {1e-9 * made['normals_per_s']:.3g} G normals/s.")
    if rate := made["issue_rate"]:
        lines.append(f"The GPU issues {1e-12 * rate:.2f} T warp instructions/s at most (32-bit integer ones, half).")
    lines.append("\n" + report.markdown_table(COLUMNS, map(cells, made["results"])))
    for reason, names in made["absent"].items():
        lines.append(f"Absent from {len(names)} cases: {reason}\n")
    lines += [f"Not timed: {message}\n" for message in made["mismatches"]]
    return "\n".join(lines)


@app.command()
def main(
    out: report.Out,
    rounds: Annotated[int, typer.Option(help="Rounds per comparison.")] = 60,
    only: report.Only = "",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, 3 rounds: does it run and match?")] = False,
    device: report.Device = "cpu",
    backend: report.Backends = [],  # noqa: B006
    page: report.Page = None,
    counted: Annotated[Path | None, typer.Option("--kernels", help="What benchmarks.kernels counted.")] = None,
    minutes: report.Minutes = None,
) -> None:
    """Time the fused ops against every baseline in turns; print the ratios and write them to a file."""
    with plain_errors():
        started = time.monotonic()
        report.check(out, page)
        if rounds < 1:
            raise InputError(f"rounds is {rounds}; expected at least 1")
        place = choose_device(device)
        ours = cases.our_backends(backend, place)
        rounds = QUICK_ROUNDS if quick else rounds
        chosen = cases.matching(only, quick, place)
        where = machine.environment(place)
        card = where["machine"].get("gpu")
        bandwidth, normals = machine.copy_bandwidth(place), machine.normal_rate(place)
        ceilings = Ceilings(ours, bandwidth, normals, card, kernels.read(counted))
        console.print(f"A large copy: {1e-9 * bandwidth:.0f} GB/s, read and written; {1e-9 * normals:.3g} G normals/s")
        results, missing, mismatches, unmeasured = [], {}, [], set()

        def leave_out(case: cases.Case, label: str, reason: str) -> None:
            missing.setdefault(f"{label}: {reason}", []).append(str(case))

        for case in chosen:
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                mismatches.append(f"{case}: the {minutes:g} minutes were over")
                continue
            labels = [label for kind in cases.labels(case, ours) for label in kind]
            for label in list(labels):
                if reason := cases.absent(case, label, quick, place):
                    leave_out(case, label, reason)
                    labels.remove(label)
                    unmeasured.update({label} & set(ours))
            console.print(f"{case}: {', '.join(labels)}")
            with out_of_memory(place, f"{case}: ", mismatches):
                operation = cases.build(case, place)
                errors = {}
                for label in labels:
                    with out_of_memory(place, f"{case}: {label}: ", mismatches):
                        try:
                            errors[label] = cases.check(operation, label)
                        except cases.Mismatch as error:
                            mismatches.append(str(error))
                nbytes = case.elements * operation.bytes_per_element
                for setting in settings(nbytes, card and card["l2_bytes"]):
                    found, skipped = compare(operation, setting, errors, rounds, ceilings)
                    results += found
                    for label, reason in skipped.items():
                        if label in ours:
                            mismatches.append(f"{case}: {label}: {reason}")
                        else:
                            leave_out(case, label, reason)
        made = {
            **where,
            "device": str(place),
            "rounds": rounds,
            "copy_bytes_per_s": bandwidth,
            "normals_per_s": normals,
            "issue_rate": ceilings.rate,
            "absent": missing,
            "mismatches": mismatches,
            "results": results,
        }
        report.write(made, markdown(made), out, page)
        if place.type == "cpu":
            # A table wrapped to the 80 columns of a log file cannot be read.
            Console(highlight=False, width=max(console.width, 210)).print(_table(made))
        for line in brief(results) if place.type != "cpu" else []:
            console.print(escape(line), soft_wrap=True)
        for reason, names in missing.items():
            console.print(
                f"[yellow]Absent[/] from {len(names)} of {len(chosen)} cases: {escape(reason)}", soft_wrap=True
            )
        for message in mismatches:
            console.print("[red]Not timed:[/]", escape(message), soft_wrap=True)
        if unmeasured:
            console.print(f"[red]Not measured in all cases:[/] {', '.join(sorted(unmeasured))}")
        if mismatches or unmeasured:
            raise typer.Exit(1)


@contextlib.contextmanager
def out_of_memory(device: torch.device, what: str, messages: list[str]):
    """Inside, running out of the GPU's memory ends the block and is said, rather than ending the run."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        messages.append(what + str(error).splitlines()[0])
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    app()
