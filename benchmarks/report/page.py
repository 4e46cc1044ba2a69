"""docs/benchmarks.md: result files as a page, with pictures and a table for each way of calling."""

import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.convolutions import Shape
from benchmarks.report import drawings
from benchmarks.report.results import QUANTITIES, Curve, Result, fixed_name
from benchmarks.rows import CEILING, Row, by_variant, duration
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path, check_writable
from ddpm_fast.pictures.canvas import save_figure

HEAD = Path(__file__).parent / "head.md"
OWN_NETWORK = "denoising-diffusion-pytorch"  # it cannot hold our weights
_PACKAGES = {"torch.compile": "torch", "composed": "torch", "register_autograd": "torch"}  # else the first word


def draw(results: Sequence[Result], page: Path, command: str) -> list[Path]:
    """Writes the page, a section for each result, and its pictures in images/ in the same folder; returns the paths of
    all that was written. command: what draws it. Raises InputError, before anything is written, for a place that cannot
    be written, and for two results of one name, whose pictures would overwrite each other."""
    names = [result.path.stem for result in results]
    if len(set(names)) < len(names):
        raise InputError(f"the results are called {', '.join(names)}; expected different names, as pictures get them")
    check_writable(page)
    pictures: dict[Path, Figure] = {}
    text = [HEAD.read_text().replace("{command}", command), *(_section(result, page, pictures) for result in results)]
    for path in pictures:
        check_writable(path)
    for path, figure in pictures.items():
        save_figure(figure, path)
    with atomic_path(page) as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")
    return [page, *pictures]


def _section(result: Result, page: Path, pictures: dict[Path, Figure]) -> str:
    """The text about a result; its figures are added to pictures."""
    ours = [row for row in result.rows if row.subject.what != CEILING]
    parts = [f"## {result.path.stem}\n"]
    if result.quick:
        parts.append("> **Not for timing.** Made by `--quick`, which shows that everything runs and matches.\n")
    parts += [_provenance(result, page), _peers(result, ours), _summary(ours)]

    def picture(what: str, figure: Figure) -> None:
        name = "".join(c if c.isalnum() else " " for c in f"{page.stem} {result.path.stem} {what}")
        path = page.parent / "images" / f"{'-'.join(name.split())}.png"
        pictures[path] = figure
        parts.append(f"![{what}](images/{path.name})\n")

    for setting in dict.fromkeys(row.setting for row in ours):
        rows = [row for row in ours if row.setting == setting]
        title = f"{{}} on {result.device} ({setting.replace('calls', 'called from Python')})"
        for i, some in enumerate(drawings.portions([row for row in rows if row.peer]), 1):
            figure = drawings.draw_speedups(some, title.format("Speed-up"), result.quick)
            picture(f"Speed-up, {setting}, {i}", figure)
        causes = {cause for row in rows for cause in row.floors(result.ceilings)}
        # Of networks the flops, whose count says nothing of a peer with a network of its own; of ops the normals.
        work = "flops" if "flops" in causes else "normals"
        some = [row for row in rows if row.peer and {"bytes", work} <= row.floors(result.ceilings).keys()]
        some = [row for row in some if work == "normals" or row.baseline != OWN_NETWORK]
        if some:
            name = title.format(f"{work.capitalize()} a second")
            picture(f"Roofline, {setting}", drawings.draw_roofline(some, result.ceilings, work, name, result.quick))
        there = [row for row in result.rows if row.setting == setting]  # with the copies, which are no claim of ours
        for place in dict.fromkeys(row.subject.place for row in there):
            parts += [f"**{place}**, {setting}\n", _table([row for row in there if row.subject.place == place], result)]
    for quantity, (name, _) in QUANTITIES.items():
        if curves := result.curves(quantity):
            figure = drawings.draw_growth(curves, name, f"Growth of {name} on {result.device}", result.quick)
            picture(f"Growth of {name}", figure)
            parts.append(_growth_table(curves, name))
    return "\n".join(
        filter(None, [*parts, *(table(result) for table in (_convolutions, _noise, _fidelity, _loading, _left_out))])
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table, empty without rows; the first columns hold texts, the others numbers, aligned to the right."""
    lines = [list(header), ["---"] * texts + ["---:"] * (len(header) - texts), *map(list, rows)]
    text = "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"
    return text if len(lines) > 2 else ""


def _provenance(result: Result, page: Path) -> str:
    found, machine, git = result.found, result.found["machine"], result.found["git"]
    here, path, target = Path.cwd(), result.path.resolve(), page.resolve()
    link = f"`{path.name}`"  # or a link, in one working folder, which may be a repository
    if path.is_relative_to(here) and target.is_relative_to(here):
        link = f"[{path.name}]({Path(os.path.relpath(path, target.parent)).as_posix()})"
    gpu, changed = machine.get("gpu", {"state": {}}), ", ".join(git.get("changed_files") or []) or "nothing"
    lines = {
        "file": link,
        "processor": ", ".join(f"{name} {machine.get(name)}" for name in ("cpu", "isa", "cores", "threads")),
        "GPU": f"{gpu.get('name')}, {', '.join(f'{name} {value}' for name, value in gpu['state'].items())}",
        "load before": ", ".join(f"{x:.2f}" for x in machine.get("load_average") or []) + " (1, 5 and 15 minutes)",
        "versions": ", ".join(f"{name} {version or '(not there)'}" for name, version in found["versions"].items()),
        "commit": f"{git.get('commit') or 'not known'}, with changes in: {changed}",
        "at best": ", ".join(f"{1e-9 * rate:.4g} G{name}/s" for name, rate in result.ceilings.items()) or "-",
        "date, rounds": f"{found['date']}, {found.get('rounds') or '-'}",
    }
    rows = [(name, text) for name, text in lines.items() if name != "GPU" or "name" in gpu]
    return markdown_table(("measured", "on, with, when"), rows, texts=2)


def _peers(result: Result, rows: Sequence[Row]) -> str:
    """What ours was compared with, and in how many of the cases."""
    cases, lines = len({row.subject.text for row in rows}), []
    for peer in drawings.colours(
        [*(row.baseline for row in rows if row.peer), *(result.absent.keys() & drawings.PEERS.keys())]
    ):
        version = result.found["versions"].get(_PACKAGES.get(peer, peer.split()[0]))
        there = len({row.subject.text for row in rows if row.baseline == peer})
        lines.append((peer, version or "-", f"{there} of {cases} cases"))
    return markdown_table(("peer", "version", "compared in"), lines, texts=3)


def _summary(rows: Sequence[Row]) -> str:
    """What each peer's ratios amount to, and where ours is not faster, by name."""
    compared, lines = [row for row in rows if row.peer], []
    for peer in drawings.colours(row.baseline for row in compared):
        ratios = sorted(row.speedup for row in compared if row.baseline == peer)
        middle = f"{statistics.median(ratios):.2f}x is the median of {len(ratios)} rows"
        lines.append(f"- compared with {peer}: {ratios[0]:.2f}x to {ratios[-1]:.2f}x; {middle}")
    behind = [f"{row}: {row.speedup:.2f}x ({row.low:.2f}..{row.high:.2f})" for row in compared if row.low <= 1]
    lines += [f"- **not faster**: {text}" for text in behind or ["none (no interval reaches 1)"]] if compared else []
    return "\n".join(lines) + "\n" if lines else ""


def _table(rows: Sequence[Row], result: Result) -> str:
    """A line for each case and each of ours, a column for each peer."""
    peers, table = list(drawings.colours(row.baseline for row in rows if row.peer)), []
    loops = any("flops" in row.counts for row in rows)
    for group in by_variant(list(rows)):
        row, there = group[0], {each.baseline: each for each in group}
        seconds, floor, floors = row.ours.median_s, row.floor(result.ceilings), row.floors(result.ceilings)
        cells = [drawings.label_of(row, rows), duration(seconds)]
        if loops:
            steps = row.subject.steps if row.subject.what == "sampling" else 1
            rate, mfu = row.subject.batch / steps / seconds, floors.get("flops", 0) / seconds
            cells += [str(row.subject.batch), str(steps), f"{rate:.4g}", f"{mfu:.0%}"]
        else:
            cells.append(f"{1e-9 * row.counts['bytes'] / seconds:.3g}")
        cells += [duration(floor[1]), floor[0], f"{floor[1] / seconds:.0%}"] if floor else ["-"] * 3
        for peer in peers:
            if each := there.get(peer):
                interval = f"({each.low:.2f}..{each.high:.2f})"
                cells.append(f"{duration(each.peer.median_s)}, **{each.speedup:.2f}x** {interval}")
            else:
                cells.append("absent" if row.subject.text in result.absent.get(peer, ()) else "-")
        theirs = [each.peer.error for each in group if each.peer and each.peer.error is not None]
        table.append([*cells, _error(row.ours.error), _error(max(theirs, default=None))])
    header = ["case", "time of ours", *(("batch", "steps", "images/s", "MFU") if loops else ("GB/s",))]
    header += ["floor", "set by", "floor/time", *(f"{peer}: time, speed-up" for peer in peers), "error", "peers' error"]
    return markdown_table(header, table)


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _growth_table(curves: Sequence[Curve], name: str) -> str:
    lines = []
    for curve in curves:
        x, y = ", ".join(f"{x:g}" for x in curve.x), ", ".join(f"{y:.4g}" for y in curve.y)
        lines.append([curve.name, curve.against, x, y, "-" if curve.exponent is None else f"{curve.exponent:.2f}"])
    return markdown_table(["of ours", "against", "at", name, "exponent"], lines)


def _convolutions(result: Result) -> str:
    """Tables of the library's convolutions: a line for each shape and batch, a column for each pass."""
    groups: dict[tuple, dict[str, dict]] = {}
    for line in result.found.get("convolutions", []):
        shape = Shape(**{name: line[name] for name in Shape._fields})
        groups.setdefault((shape, line["batch"], line["cudnn_benchmark"]), {})[line["pass"]] = line
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for (shape, batch, benchmark), passes in groups.items():
        cells = [str(shape), str(shape.count), str(batch), "on" if benchmark else "off"]
        for line in passes.values():
            rate = f", {line['flops_per_second'] / 1e12:.3g} TFLOP/s" if "flops_per_second" in line else ""
            cells.append(f"{duration(line['seconds'])}{rate}")
        tables.setdefault(tuple(passes), []).append(cells)
    header = ["bf16, channels_last", "in the network", "batch", "cudnn.benchmark"]
    return "\n".join(markdown_table([*header, *passes], lines) for passes, lines in tables.items())


def _noise(result: Result) -> str:
    lines = []
    for line in result.growth(stored=True):
        sizes = [*(point["peak_bytes"] for point in line["points"]), line["noise_bytes"]]
        lines.append([fixed_name(line), *(f"{nbytes / 2**20:.4g}" for nbytes in sizes)])
    return markdown_table(["peak memory in MiB of", "noise stored", "noise regenerated", "the noise itself"], lines)


def _fidelity(result: Result) -> str:
    lines = []
    for line in result.found.get("fidelity", []):
        levels, worst, p = (f"{line[name]:.3g}" for name in ("mean_levels", "worst_image_mean_levels", "p_value"))
        lines.append([line["mode"], duration(line["seconds"]), levels, f"{line['differing_share']:.2%}", worst, p])
    if not lines:
        return ""
    control = f"control: {result.found['control']['steps']} steps"
    lines.append([control, "-", "-", "-", "-", f"{result.found['control']['p_value']:.3g}"])
    mode = f"mode, {result.found['n']} digits in {result.found['steps']} steps"
    return markdown_table([mode, "time", "mean difference", "pixels that differ", "of the worst image", "p"], lines)


def _loading(result: Result) -> str:
    lines = [
        [
            f"{line['count']:,} in a {line['kind']}",
            f"{line['open_seconds']:.2g} s",
            *(f"{line[name] / 2**20:.0f}" for name in ("anonymous_bytes", "anonymous_bytes_of_the_set", "peak_bytes")),
            f"{line['images_per_second']:,.0f}",
            f"{line['waited']:.1%}",
        ]
        for line in result.found.get("loading", [])
    ]
    memory = ("memory in MiB", "of the set", "peak")
    return markdown_table(["images read on demand", "opened in", *memory, "images/s", "waits at 80% of that"], lines)


def _left_out(result: Result) -> str:
    """The peers that were absent, with the reasons, and what failed: by name, also where there is nothing to name."""
    parts = []
    for title, said in (("What differs between the two sides", "notes"), ("Absent, and why", "absent")):
        lines = [f"- {text} ({', '.join(cases)})" for text, cases in result.found[said].items()]
        parts += [f"{title}:\n\n" + "\n".join(lines)] if lines else []
    if result.found["left_out"]:
        parts.append(f"Left out when the time was over: {', '.join(result.found['left_out'])}.")
    if failed := "\n".join(f"- {message}" for message in result.found["failures"]):
        parts.append(f"**Not timed**, as it did not match or failed:\n\n{failed}")
    elif result.rows:
        parts.append("All results matched.")
    return "\n\n".join(parts) + "\n" if parts else ""
