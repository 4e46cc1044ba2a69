"""The pictures of docs/benchmarks.md: each draw_ function returns a matplotlib Figure in ddpm_fast.canvas' look."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from ddpm_fast.results import Curve, Row
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ddpm_fast import duration
from ddpm_fast.pictures.canvas import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, WIDTH, look

PANELS = 2  # of sizes beside each other in a figure
PEERS = {
    "diffusers": BLUE,
    "torch": ORANGE,
    "torch.compile": GREEN,
    "composed": PURPLE,
    "denoising-diffusion-pytorch": VERMILION,
    "diffusers torch.compile": SKY,
    "diffusers channels_last": "0.35",
    "diffusers DDPMPipeline": "0.6",
}
FLOORS = {
    "bytes": {"color": BLUE, "marker": "|", "markersize": 10, "markeredgewidth": 2.6},
    "normals": {"color": VERMILION, "marker": "x", "markersize": 7, "markeredgewidth": 2},
    "instructions": {"color": GREEN, "marker": "+", "markersize": 9, "markeredgewidth": 2},
    "flops": {"color": PURPLE, "marker": "d", "markersize": 6.5},
}
OTHERS = ("black", "0.2", "0.8")  # for names that are not above
_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "black")
_MARKS = "osD^vPX"
_BAR = 0.165  # inches
_GAP = 0.12
_UNTIMED = "made with too few rounds to time anything: it shows that all runs and matches"


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each peer, the same in every picture."""
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in PEERS]
    more = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(unknown)}
    return {name: colour for name, colour in (PEERS | more).items() if name in names}


def label_of(row: Row, rows: Sequence[Row]) -> str:
    """A case's name, and which of ours it was where there are several."""
    several = len({other.measured for other in rows}) > 1
    return f"{row.name} ({row.measured})" if several else row.name


def draw_speedups(
    rows: Sequence[Row], title: str, absent: Mapping[str, Collection[str]] | None = None, untimed: bool = False
) -> Figure:
    """The time of each peer over ours, a group of bars a case and a panel a size (PANELS at most), with the 95%
    intervals; bars grow from the line at 1, to the left where ours is slower.

    absent: peers, and the cases that lack them. One that other cases have is called absent where its bar would be, one
    that none has in the legend. untimed: say that the times mean nothing.
    """
    sizes = list(dict.fromkeys(row.size for row in rows))
    peers, absent = colours(row.baseline for row in rows), absent or {}
    missing = {
        (row.size, label_of(row, rows), peer) for row in rows for peer in peers if row.case in absent.get(peer, ())
    }
    present: dict[str, list[str]] = {}
    for name, peer in [(label_of(row, rows), row.baseline) for row in rows] + [where[1:] for where in missing]:
        beside = present.setdefault(name, [])
        if peer not in beside:
            beside.append(peer)
    # In inches from the top: where each case's group and each of its bars stand.
    at, middles, y = {}, {}, 0.0
    for name, beside in present.items():
        beside.sort(key=list(peers).index)
        for i, peer in enumerate(beside):
            at[name, peer] = y + (i + 0.5) * _BAR
        middles[name] = y + len(beside) * _BAR / 2
        y += len(beside) * _BAR + _GAP
    with look():
        figure = Figure((WIDTH, y + 1.45 + 0.25 * untimed), layout="constrained")
        panels = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
        lowest, highest = min(row.low for row in rows), max(row.high for row in rows)
        for axes, size in zip(panels, sizes, strict=True):
            for row in (row for row in rows if row.size == size):
                where = at[label_of(row, rows), row.baseline]
                axes.barh(where, row.speedup - 1, 0.9 * _BAR, left=1, color=peers[row.baseline])
                reach = [[max(0.0, row.speedup - row.low)], [max(0.0, row.high - row.speedup)]]
                axes.errorbar(row.speedup, where, xerr=reach, color="0.15", linewidth=1, capsize=1.8)
                end = max(row.high, 1.0)
                axes.annotate(
                    f"{row.speedup:.3g}x", (end, where), (4, 0), textcoords="offset points", va="center", fontsize=7.5
                )
            for name, peer in (where[1:] for where in missing if where[0] == size):
                style = {"va": "center", "fontsize": 7.5, "style": "italic", "color": "0.35"}
                offset = {"xytext": (4, 0), "textcoords": "offset points"}
                axes.annotate(f"{peer}: absent", (1, at[name, peer]), **offset, **style)
            axes.axvline(1, color="0.15", linewidth=1.2)
            axes.set(title=size, xscale="log", xlabel="the peer's time over ours, 95% interval")
            axes.set_xlim(min(0.8, lowest / 1.3), max(2.0, highest) * 1.6)
            _plain_ticks(axes.xaxis)
            axes.grid(False, axis="y")
            axes.xaxis.label.set_fontsize(8.5)
        panels[0].set_yticks(list(middles.values()), list(middles), fontsize=8.5)
        panels[0].set_ylim(y, -_GAP)
        for axes in panels:
            axes.tick_params(axis="y", length=0)
        named = [Patch(color=colour, label=f"beside {peer}") for peer, colour in peers.items()]
        named += [
            Patch(facecolor="white", edgecolor="0.35", label=f"{peer}: absent") for peer in absent if peer not in peers
        ]
        named.append(Line2D([], [], color="0.15", linewidth=1.2, label="1: as fast as the peer"))
        return _headed(figure, title, named, untimed)


def draw_floors(rows: Sequence[Row], title: str, untimed: bool = False) -> Figure:
    """Ours, in time on a logarithmic axis, and the floors of each case under which it cannot be; a panel a size
    (PANELS at most). rows: one for each case."""
    sizes = list(dict.fromkeys(row.size for row in rows))
    names = list(dict.fromkeys(label_of(row, rows) for row in rows))
    causes = _marks(cause for row in rows for cause in row.floors)
    with look():
        figure = Figure((WIDTH, 0.26 * len(names) + 1.8 + 0.25 * untimed), layout="constrained")
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        facts = [_facts(row) for row in rows]
        kept = [name for name in facts[0] if any(fact[name] for fact in facts)]

        def columns(row: Row) -> list[str]:
            return [_facts(row)[name] for name in kept]

        for axes, size in zip(panels, sizes, strict=True):
            for row in (row for row in rows if row.size == size):
                y = names.index(label_of(row, rows))
                axes.plot([min(row.floors.values()), row.ours.median_s], [y, y], color="0.8", linewidth=2, zorder=1)
                for cause, seconds in row.floors.items():
                    axes.plot(seconds, y, linestyle="none", label=cause, **causes[cause])
                axes.plot(row.ours.median_s, y, "o", color="black", markersize=5, label="measured")
                said = "".join(f"{text:>6}" for text in columns(row))
                axes.text(1.0, y, said, transform=axes.get_yaxis_transform(), va="center", **_MONO)
            said = "".join(f"{name:>6}" for name in kept)
            axes.text(1.0, -1, said, transform=axes.get_yaxis_transform(), va="center", **_MONO)
            axes.set(title=size, xscale="log", xlabel="time of a call or step")
            low, high = axes.get_xlim()
            axes.set_xlim(low / 1.2, high * 1.2)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 3e3 else (1,)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: duration(seconds)))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(axis="y", length=0)
            axes.tick_params(axis="x", labelsize=7)
        panels[0].set_yticks(range(len(names)), names, fontsize=8.5)
        panels[0].set_ylim(len(names) - 0.4, -1.5)
        named = [Line2D([], [], color="black", marker="o", linestyle="none", label="ours, measured")]
        for cause, mark in causes.items():
            named.append(Line2D([], [], linestyle="none", label=f"floor of the {cause}", **mark))
        title += "\nfloor: the highest floor over the time measured; copy: bytes a second over those of a copy"
        return _headed(figure, title, named, untimed)


def draw_roofline(rows: Sequence[Row], work: str, title: str, untimed: bool = False) -> Figure:
    """Work a second over work a byte, both logarithmic, under the roof of what the machine does: its copy of so many
    bytes a second to the left, its rate of that work to the right (Williams, Waterman & Patterson 2009). A panel for
    each such rate (PANELS at most). Full marks are ours, hollow ones the fastest peer of the same case.

    rows: those whose counts and rates have "bytes" and `work`, "flops" or "normals".
    """
    rates = list(dict.fromkeys(row.rates[work] for row in rows))
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(dict.fromkeys(row.operation for row in rows))}
    mark = {name: _MARKS[i % len(_MARKS)] for i, name in enumerate(dict.fromkeys(row.place for row in rows))}
    fastest: dict[tuple, Row] = {}
    for row in rows:
        beaten = fastest.setdefault((row.case, row.measured), row)
        if row.peer.median_s < beaten.peer.median_s:
            fastest[row.case, row.measured] = row
    with look():
        figure = Figure((WIDTH, 5.2 + 0.25 * untimed), layout="constrained")
        panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
        for axes, rate in zip(panels, rates, strict=True):
            some = [row for row in fastest.values() if row.rates[work] == rate]
            intensities = [row.counts[work] / row.counts["bytes"] for row in some]
            ridge = rate / some[0].rates["bytes"]
            low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
            axes.plot([low, ridge, high], [low / ridge * rate, rate, rate], color="0.15", linewidth=1.4)
            for row, x in zip(some, intensities, strict=True):
                style = {"color": colour[row.operation], "marker": mark[row.place], "markersize": 6.5, "linestyle": ""}
                axes.plot(x, row.counts[work] / row.ours.median_s, label=str(row), **style)
                axes.plot(x, row.counts[work] / row.peer.median_s, label=f"{row}: peer", fillstyle="none", **style)
            kinds = sorted({row.dtype for row in some})
            axes.set(title=", ".join(kinds), xscale="log", yscale="log", xlabel=f"{work} a byte")
            _plain_ticks(axes.xaxis)
        panels[0].set_ylabel(f"{work} a second")
        named = [Line2D([], [], color="0.15", linewidth=1.4, label="what the machine does at best")]
        named += [Patch(color=shade, label=name) for name, shade in colour.items()]
        named += [Line2D([], [], color="0.3", marker=shape, linestyle="", label=name) for name, shape in mark.items()]
        return _headed(figure, f"{title}\nfull: ours; hollow: the fastest peer", named, untimed)


def draw_growth(curves: Sequence[Curve], title: str, untimed: bool = False) -> Figure:
    """A quantity over what it grows with, both logarithmic, a panel for each of what that is; the exponent of each
    curve is in its name."""
    against = list(dict.fromkeys(curve.against for curve in curves))
    columns = min(PANELS, len(against))
    rows = -(-len(against) // columns)
    with look():
        figure = Figure((WIDTH, 3.9 * rows + 0.5 + 0.25 * untimed), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, what in zip(panels, against, strict=False):
            for i, curve in enumerate(curve for curve in curves if curve.against == what):
                name = curve.name if curve.exponent is None else f"{curve.name}:\nexponent {curve.exponent:.2f}"
                style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKS[i % len(_MARKS)], "markersize": 4}
                axes.plot(curve.x, curve.y, label=name, **style)
            axes.set(xscale="log", yscale="log", xlabel=what, ylabel=curves[0].quantity)
            ticks = sorted({x for curve in curves if curve.against == what for x in curve.x})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.xaxis.set_minor_formatter(NullFormatter())
            _plain_ticks(axes.yaxis)
            axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(0, -0.14), frameon=False)
        for axes in panels[len(against) :]:
            axes.set_visible(False)
        return _headed(figure, title, [], untimed)


def _facts(row: Row) -> dict[str, str]:
    """What stands beside a row of draw_floors, by column; empty where the file does not have it."""
    seconds = row.ours.median_s
    return {
        "floor": f"{row.floor[1] / seconds:.0%}" if row.floor else "",
        "GB/s": f"{row.ours.gb_per_s:.3g}" if row.ours.gb_per_s else "",
        "copy": f"{row.copy_share:.0%}" if row.copy_share else "",
        "MFU": f"{row.ours.mfu:.0%}" if row.ours.mfu else "",
    }


_MONO = {"family": "monospace", "fontsize": 7.5, "color": "0.25"}


def _marks(causes: Iterable[str]) -> dict[str, dict]:
    """How each kind of floor is marked."""
    other = {"marker": "d", "markersize": 7}
    names = dict.fromkeys(causes)
    return {name: FLOORS.get(name, {"color": OTHERS[i % len(OTHERS)], **other}) for i, name in enumerate(names)}


def _plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10 ... instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _headed(figure: Figure, title: str, named: list, untimed: bool) -> Figure:
    """The figure with its title, a warning where the times mean nothing, and the legend under both."""
    text = title + (f"\nNOT FOR TIMING: {_UNTIMED}" if untimed else "")
    colour = VERMILION if untimed else "black"
    figure.suptitle(text, fontsize=10.5, x=0.01, horizontalalignment="left", color=colour)
    if named:
        columns = len(named) if len(named) <= 5 else 3
        figure.legend(handles=named, loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5)
    return figure
