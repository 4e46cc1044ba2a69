"""docs/benchmarks.md: result files as a page, with a table and pictures for each way of calling."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from ddpm_fast.results import CEILING, MIN_ROUNDS, Curve, NoiseMemory, Result, Row
from matplotlib.figure import Figure

from ddpm_fast import drawings, duration, markdown_table
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path, check_writable
from ddpm_fast.ops import dispatch as backend
from ddpm_fast.pictures.canvas import check_picture, save_figure

# What the labels of the rows stand for.
PEERS = {
    "diffusers": "diffusers, through its public interface",
    "torch": "plain torch in eager mode, as one writes it",
    "torch.compile": "the plain torch code under torch.compile",
    "composed": "plain torch in eager mode, as the reference codes compose it",
    "denoising-diffusion-pytorch": "denoising-diffusion-pytorch, through its public interface",
    "diffusers torch.compile": "diffusers' network under torch.compile",
    "diffusers channels_last": "diffusers' network in channels_last memory",
    "diffusers DDPMPipeline": "diffusers' pipeline, called as its documentation does",
}
OWN_NETWORK = "denoising-diffusion-pytorch"  # it cannot hold our weights
_PACKAGES = {"torch.compile": "torch", "composed": "torch"}  # of the others, the label's first word


def draw(results: Sequence[Result], page: Path, command: str) -> list[Path]:
    """Write the page, and its pictures in images/ beside it; the paths of all, the page first. command: what drew it.

    Raises InputError, before anything is written, for a place that cannot be written and for two results of one name,
    whose pictures would be written over each other.
    """
    names = [result.path.stem for result in results]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"several results are called {', '.join(twice)}: their pictures would have the same names; expected a name "
            f"for each: copy one to another name"
        )
    check_writable(page)
    pictures: dict[Path, Figure] = {}
    text = [_HEAD.format(command=command), *(_section(result, page, pictures) for result in results)]
    for path in pictures:
        check_picture(path)
    for path, figure in pictures.items():
        save_figure(figure, path)
    with atomic_path(page) as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")
    return [page, *pictures]


_HEAD = f"""\
# Benchmarks

Drawn by `{{command}}`; nothing here is written by hand.

**How to read it.** A speed-up is the peer's time over ours: above 1, ours is faster. The variants of a case take turns
on the same tensors, each round gives one ratio for each peer, and the claim is the median of the rounds with the 95%
bootstrap interval of that median. Before anything was timed, each op's result was compared with plain torch in float64;
`error` is the deviation in units of the largest value (for `normal`, how far its moments are from those of N(0, 1), in
standard errors). Of networks and loops it is ||out - truth|| over ||truth||, and "-" where there was nothing to compare
with. A variant that does not match is not timed, and a peer that is not there is listed as absent. A file of fewer than
{MIN_ROUNDS} rounds is marked: its times mean nothing. `benchmarks/README.md` says what was called on each side.
"""


def _section(result: Result, page: Path, pictures: dict[Path, Figure]) -> str:
    """The text about a result; its figures are added to pictures."""
    ours = [row for row in result.rows if row.operation != CEILING]
    parts = [f"## {_device(result)}\n", _untimed(result), _provenance(result, page), _peers(result), _summary(ours)]

    def picture(what: str, alt: str, figure: Figure) -> None:
        path = page.parent / "images" / f"{page.stem}-{result.path.stem}-{what}.png"
        pictures[path] = figure
        parts.append(f"![{alt}](images/{path.name})\n")

    settings = list(dict.fromkeys(row.setting for row in ours))
    for setting in settings:
        rows = [row for row in ours if row.setting == setting]
        if len(settings) > 1:
            parts.append(f"### Called as: {setting}\n")
        for i, some in enumerate(_by_size(rows)):
            suffix = "-".join([*_words(setting), *([str(i + 1)] if i else [])])
            title = f"Speed-up on {_device(result)} ({setting})"
            figure = drawings.draw_speedups(some, title, _absent_peers(result), result.quick)
            picture(f"speedup-{suffix}", f"Speed-up beside each peer, {setting}", figure)
        for i, some in enumerate(_by_size(one_each(row for row in rows if row.floors))):
            suffix = "-".join([*_words(setting), *([str(i + 1)] if i else [])])
            title = f"How close to the floor on {_device(result)} ({setting})"
            figure = drawings.draw_floors(some, title, result.quick)
            picture(f"floors-{suffix}", f"The time of each case beside its floors, {setting}", figure)
        if any(row.floors for row in rows):
            parts.append(_floors_text(result))
        for work in ("flops", "normals"):
            bound = [row for row in rows if {"bytes", work} <= row.counts.keys() & row.rates.keys()]
            # What ours does is counted: beside another network it says nothing of the peer.
            bound = [row for row in bound if work != "flops" or row.baseline != OWN_NETWORK]
            if bound and not (work == "normals" and "flops" in bound[0].counts):
                title = f"{work.capitalize()} a second on {_device(result)} ({setting})"
                figure = drawings.draw_roofline(bound, work, title, result.quick)
                picture("-".join(["roofline", *_words(setting)]), f"Roofline: {work} a second, {setting}", figure)
        for size in dict.fromkeys(row.size for row in rows):
            parts.append((f"**{size}**" + (f", {setting}" if len(settings) > 1 else "") + "\n") if size else "")
            parts.append(_table([row for row in rows if row.size == size], result))
    ceilings = [row for row in result.rows if row.operation == CEILING]
    if ceilings:
        parts.append(_ceilings(ceilings))
    for quantity in dict.fromkeys(curve.quantity for curve in result.curves):
        curves = [curve for curve in result.curves if curve.quantity == quantity]
        figure = drawings.draw_growth(curves, f"Growth of {quantity} on {_device(result)}", result.quick)
        parts.append(f"### Growth of {quantity}\n")
        picture("-".join(["growth", *_words(quantity)]), f"Growth of {quantity}", figure)
        parts.append(_growth_table(curves))
    if result.noise:
        parts.append(_noise_table(result.noise))
    return "\n".join(filter(None, [*parts, _left_out(result)]))


def _device(result: Result) -> str:
    """Where a result was measured, in a few words."""
    machine = result.machine
    if "gpu" in machine:
        return machine["gpu"].get("name", "a GPU")
    return f"{machine.get('cpu', 'a CPU')}, {machine.get('isa')}, {machine.get('threads')} threads"


def _untimed(result: Result) -> str:
    if not result.quick:
        return ""
    return (
        f"> **Not for timing.** Made by `--quick`, with {result.rounds or 'a few'} rounds, which shows that everything "
        "runs and matches. The times and ratios below mean nothing.\n"
    )


def _provenance(result: Result, page: Path) -> str:
    machine, git = result.machine, result.git
    load, gpu = machine.get("load_average"), machine.get("gpu")
    changed = git.get("changed_files") or []
    lines = [("file", _link(result.path, page))]
    if gpu:
        state = gpu.get("state", {})
        clocks = f"{state.get('clocks.sm')} MHz, memory {state.get('clocks.mem')} MHz" if state else "not known"
        lines.append(("GPU", f"{gpu.get('name')}, driver {state.get('driver_version', 'not known')}; clocks {clocks}"))
    cpu = f"{machine.get('cpu')}, {machine.get('architecture')}, {machine.get('isa')}; {machine.get('cores')} cores"
    lines.append(("processor", f"{cpu}, {machine.get('threads')} threads used"))
    lines.append(
        ("load before", ", ".join(f"{x:.2f}" for x in load) + " (1, 5, 15 minutes)" if load else "not recorded")
    )
    versions = [f"{name} {version or '(not there)'}" for name, version in result.versions.items()]
    lines.append(("versions", ", ".join(versions)))
    dirty = f", with changes in {', '.join(changed)}" if changed else ", nothing changed"
    lines.append(("commit", f"{git.get('commit') or 'not known'}{dirty if git else ''}"))
    if result.ceilings:
        lines.append(("at best", ", ".join(f"{1e-9 * x:.4g} G{name}/s" for name, x in result.ceilings.items())))
    lines.append(("date", result.date))
    lines.append(("rounds", str(result.rounds or "not recorded")))
    return markdown_table(("measured", "on, with, when"), lines, texts=2)


def _link(path: Path, page: Path) -> str:
    """A link to a file that lies in the same working folder as the page, which may be a repository; else its name."""
    here, path, target = Path.cwd(), path.resolve(), page.resolve()
    if not (path.is_relative_to(here) and target.is_relative_to(here)):
        return f"`{path.name}`"
    return f"[{path.name}]({Path(os.path.relpath(path, target.parent)).as_posix()})"


def _peers(result: Result) -> str:
    """What ours was compared with, and in how many of the cases."""
    ours = [row for row in result.rows if row.operation != CEILING]
    cases = len({row.case for row in ours})
    lines = []
    for peer in drawings.colours([*(row.baseline for row in ours), *_absent_peers(result)]):
        version = result.versions.get(_PACKAGES.get(peer, peer.split()[0]))
        beside = len({row.case for row in ours if row.baseline == peer})
        lines.append((peer, PEERS.get(peer, "named so in the file"), version or "-", f"{beside} of {cases} cases"))
    return markdown_table(("peer", "is", "version", "beside ours in"), lines, texts=4) if lines else ""


def _absent_peers(result: Result) -> dict[str, set[str]]:
    """Result.absences without backends of ours."""
    return {name: cases for name, cases in result.absences.items() if name not in backend.NAMES}


def _summary(rows: Sequence[Row]) -> str:
    """What each peer's ratios come to, and where ours is not faster, by name."""
    if not rows:
        return ""
    lines = []
    for peer in drawings.colours(row.baseline for row in rows):
        ratios = sorted(row.speedup for row in rows if row.baseline == peer)
        middle = statistics.median(ratios)
        lines.append(
            f"- beside {peer}: {ratios[0]:.2f}x to {ratios[-1]:.2f}x, {middle:.2f}x in the middle of {len(ratios)} rows"
        )
    behind = [row for row in rows if row.low <= 1]
    lines += [f"- **not faster**: {row}: {row.speedup:.2f}x ({row.low:.2f}..{row.high:.2f})" for row in behind] or [
        "- not faster (an interval that reaches 1 or below): none"
    ]
    return "\n".join(lines) + "\n"


def _by_size(rows: Sequence[Row]) -> Iterable[list[Row]]:
    """The rows in portions for a figure each, of as many sizes as it has panels."""
    sizes = list(dict.fromkeys(row.size for row in rows))
    for start in range(0, len(sizes), drawings.PANELS):
        some = sizes[start : start + drawings.PANELS]
        yield [row for row in rows if row.size in some]


def one_each(rows: Iterable[Row]) -> list[Row]:
    """A row for each case and each of ours, with the median of its times: older files have one for each peer."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.measured), []).append(row)
    return [sorted(group, key=lambda row: row.ours.median_s)[len(group) // 2] for group in groups.values()]


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text).split()


def _floors_text(result: Result) -> str:
    rate = result.ceilings.get("bytes")
    copy = f"a large copy, {1e-9 * rate:.0f} GB/s read and written" if rate else "the copy of the same size, below"
    text = f"The floor of the **bytes** is what has to be read and written, once, at the rate of {copy}. "
    causes = {cause for row in result.rows for cause in row.floors}
    if "normals" in causes:
        text += (
            "That of the **normals** is the time in which `normal`, measured in the same run, makes as many as are "
            "drawn once; it also writes them to memory, so that an op that does not can come out a little under it. "
        )
    if "flops" in causes:
        text += "That of the **flops** is what the shapes count, over the rate of a large matrix product. "
    if "instructions" in causes:
        text += (
            "That of the **instructions** is what the kernels executed, over the rate at which the GPU issues them. "
        )
    text += "floor/time is the highest floor over the time measured: at 100% nothing is left to gain.\n"
    return text


def _table(rows: Sequence[Row], result: Result) -> str:
    """A line for each case and each of ours, a column for each peer."""
    peers = list(drawings.colours(row.baseline for row in rows))
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.measured), []).append(row)
    # Columns that no row fills are left out.
    names = ("GB/s", "images/s", "MFU", "of copy", "floor", "set by", "floor/time")
    table = []
    for (case, measured), group in groups.items():
        (row,) = one_each(group)
        beside = {each.baseline: each for each in group}
        facts = [
            "" if row.ours.gb_per_s is None else f"{row.ours.gb_per_s:.3g}",
            "" if row.ours.images_per_s is None else f"{row.ours.images_per_s:.4g}",
            "" if row.ours.mfu is None else f"{row.ours.mfu:.0%}",
            "" if row.copy_share is None else f"{row.copy_share:.0%}",
            *(("", "", "") if row.floor is None else _floor_cells(row)),
        ]
        absent = _absent_peers(result)
        cells = [_beside(beside.get(peer), case in absent.get(peer, ())) for peer in peers]
        errors = [each.peer.error for each in group if each.peer.error is not None]
        last = [_error(row.ours.error), _error(max(errors, default=None))]
        table.append(([drawings.label_of(row, rows), measured, duration(row.ours.median_s)], facts, cells + last))
    kept = [i for i in range(len(names)) if any(facts[i] for _, facts, _ in table)]
    header = ["case", "ours", "time", *(names[i] for i in kept)]
    header += [*(f"{peer}: time, speed-up" for peer in peers), "error", "peers' error"]
    return markdown_table(header, ([*first, *(facts[i] or "-" for i in kept), *last] for first, facts, last in table))


def _floor_cells(row: Row) -> tuple[str, str, str]:
    cause, seconds = row.floor
    return duration(seconds), cause, f"{seconds / row.ours.median_s:.0%}"


def _beside(row: Row | None, absent: bool) -> str:
    if row is None:
        return "absent" if absent else "-"
    return f"{duration(row.peer.median_s)}, **{row.speedup:.2f}x** ({row.low:.2f}..{row.high:.2f})"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _ceilings(rows: Sequence[Row]) -> str:
    """The copies, which say what the machine can do and are no claim of ours."""
    lines = [
        (row.size, f"{row.ours.gb_per_s or 0:.0f}", duration(row.ours.median_s), row.baseline, f"{row.speedup:.2f}")
        for row in rows
    ]
    header = ("copied", "GB/s", "time", "the same by", "takes times as long")
    return "A copy on this machine, read and written, into a tensor that exists:\n\n" + markdown_table(header, lines)


def _growth_table(curves: Sequence[Curve]) -> str:
    lines = [
        (
            *(curve.name, curve.against, ", ".join(f"{x:g}" for x in curve.x), ", ".join(f"{y:.4g}" for y in curve.y)),
            "-" if curve.exponent is None else f"{curve.exponent:.2f}",
        )
        for curve in curves
    ]
    return markdown_table(("of ours", "against", "at", curves[0].quantity, "exponent"), lines)


def _noise_table(pairs: Sequence[NoiseMemory]) -> str:
    lines = [
        (pair.name, *(f"{nbytes / 2**20:.4g}" for nbytes in (pair.stored, pair.regenerated, pair.noise)))
        for pair in pairs
    ]
    return "### Peak memory with the noise stored, and regenerated\n\n" + markdown_table(
        ("peak MiB of", "noise stored", "regenerated", "the noise itself"), lines
    )


def _left_out(result: Result) -> str:
    """The peers that were absent, with the reasons, and what failed: by name, also where there is nothing to name."""
    absent = [f"- {reason}" + (f" ({', '.join(cases)})" if cases else "") for reason, cases in result.absent.items()]
    failed = [f"- {message}" for message in result.failed]
    if not (result.rows or absent or failed):
        return ""  # of growth, where nothing is beside ours
    notes: dict[str, list[str]] = {}
    for row in result.rows:
        for note in row.notes:
            if row.case not in notes.setdefault(note, []):
                notes[note].append(row.case)
    differ = [f"- {note} ({', '.join(cases)})" for note, cases in notes.items()]
    parts = [
        *(["What differs between the two sides:\n\n" + "\n".join(differ)] if differ else []),
        "Absent, and why:\n\n" + "\n".join(absent) if absent else "No peer was absent from any case.",
        "**Not timed**, as it did not match or failed:\n\n" + "\n".join(failed)
        if failed
        else "All that was compared matched.",
    ]
    return "\n\n".join(parts) + "\n"
