"""The pictures of docs/benchmarks.md: each draw_ function returns a matplotlib Figure in ddpm_fast's look."""

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.report.results import Curve
from benchmarks.rows import CEILING, Row
from ddpm_fast.pictures.canvas import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, WIDTH, look

PANELS = 2  # of places next to each other in a figure
MOST_CASES = 9  # of a figure, one above the other: what fits on a screen
PEERS = {"diffusers": BLUE, "torch": ORANGE, "torch.compile": GREEN, "composed": PURPLE}
PEERS |= {"denoising-diffusion-pytorch": VERMILION, "diffusers torch.compile": SKY}
PEERS |= {"diffusers torch.compile, reduce-overhead": "#2A7FA5", "diffusers torch.compile, max-autotune": "#124E6B"}
PEERS |= {"diffusers channels_last": "0.35", "diffusers DDPMPipeline": "0.6", "register_autograd": "black"}
PEERS |= {"DDPMFastScheduler": "0.75"}
_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "black")
_MARKS = "osD^vPX"
_BAR, _GAP = 0.165, 0.12  # inches
_UNTIMED = "made with too few rounds to time anything: it shows that all runs and matches"


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each peer, the same in every picture."""
    names = set(names)
    known = PEERS | {name: "0.8" for name in sorted(names - PEERS.keys())}
    return {name: colour for name, colour in known.items() if name in names}


def label_of(row: Row, rows: Sequence[Row]) -> str:
    """A case's name, and which of ours it was where there are several."""
    several = len({other.measured for other in rows if other.subject.what != CEILING}) > 1
    return f"{row.subject.name} ({row.measured})" if several else row.subject.name


def portions(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows in portions for a figure each, of at most PANELS places and MOST_CASES names."""
    made = []
    places = list(dict.fromkeys(row.subject.place for row in rows))
    for start in range(0, len(places), PANELS):
        some = [row for row in rows if row.subject.place in places[start : start + PANELS]]
        names = list(dict.fromkeys(label_of(row, rows) for row in some))
        share = -(-len(names) // -(-len(names) // MOST_CASES))
        made += [
            [row for row in some if label_of(row, rows) in names[first : first + share]]
            for first in range(0, len(names), share)
        ]
    return made


def draw_speedups(rows: Sequence[Row], title: str, untimed: bool = False) -> Figure:
    """The time of each peer over ours, a group of bars a case and a panel a place, with the 95% intervals; bars grow
    from the line at 1, to the left where ours is slower. rows: each with a peer. untimed: the times mean nothing."""
    places = list(dict.fromkeys(row.subject.place for row in rows))
    peers = colours(row.baseline for row in rows)
    bars = {(label_of(row, rows), row.baseline) for row in rows}
    # In inches from the top: where each case's group and each of its bars stand.
    at, middles, y = {}, {}, 0.0
    for name in dict.fromkeys(label_of(row, rows) for row in rows):
        group = [peer for peer in peers if (name, peer) in bars]
        at |= {(name, peer): y + (i + 0.5) * _BAR for i, peer in enumerate(group)}
        middles[name] = y + len(group) * _BAR / 2
        y += len(group) * _BAR + _GAP
    with look():
        figure = Figure((WIDTH, y + 1.45 + 0.25 * untimed), layout="constrained")
        panels = figure.subplots(1, len(places), sharex=True, sharey=True, squeeze=False)[0]
        lowest, highest = min(row.low for row in rows), max(row.high for row in rows)
        for axes, place in zip(panels, places, strict=True):
            for row in (row for row in rows if row.subject.place == place):
                where = at[label_of(row, rows), row.baseline]
                axes.barh(where, row.speedup - 1, 0.9 * _BAR, left=1, color=peers[row.baseline])
                reach = [[max(0.0, row.speedup - row.low)], [max(0.0, row.high - row.speedup)]]
                axes.errorbar(row.speedup, where, xerr=reach, color="0.15", linewidth=1, capsize=1.8)
                style = {"textcoords": "offset points", "va": "center", "fontsize": 7.5}
                axes.annotate(f"{row.speedup:.3g}x", (max(row.high, 1.0), where), (4, 0), **style)
            axes.axvline(1, color="0.15", linewidth=1.2)
            axes.set(title=place, xscale="log", xlabel="time of the peer / time of ours, 95% interval")
            axes.set_xlim(min(0.8, lowest / 1.3), max(2.0, highest) * 1.6)
            _plain_ticks(axes.xaxis)
            axes.grid(False, axis="y")
            axes.xaxis.label.set_fontsize(8.5)
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(list(middles.values()), list(middles), fontsize=8.5)
        panels[0].set_ylim(y, -_GAP)
        named = [Patch(color=colour, label=f"compared with {peer}") for peer, colour in peers.items()]
        named.append(Line2D([], [], color="0.15", linewidth=1.2, label="1: as fast as the peer"))
        return _headed(figure, title, named, untimed)


def draw_roofline(
    rows: Sequence[Row], ceilings: Mapping[str, float], work: str, title: str, untimed: bool = False
) -> Figure:
    """Work a second over work for each byte moved, both logarithmic, under the roof of what the machine does: its copy
    of so many bytes a second to the left, its rate of that work to the right (Williams, Waterman & Patterson 2009). A
    panel for each such rate. Full marks are ours, hollow ones the fastest peer of the same case.

    rows: with a peer, and whose counts have "bytes" and `work`, "flops" or "normals".
    """
    rates = list(dict.fromkeys(row.rate(work) for row in rows))
    colour = {what: _COLOURS[i % 7] for i, what in enumerate(dict.fromkeys(row.subject.what for row in rows))}
    mark = {place: _MARKS[i % 7] for i, place in enumerate(dict.fromkeys(row.subject.place for row in rows))}
    fastest: dict[tuple, Row] = {}
    for row in sorted(rows, key=lambda row: row.peer.median_s):
        fastest.setdefault(row.identity[:-1], row)
    with look():
        figure = Figure((WIDTH, 5.2 + 0.25 * untimed), layout="constrained")
        panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, rates, strict=True):
            some = [row for row in fastest.values() if row.rate(work) == name]
            intensities = [row.counts[work] / row.counts["bytes"] for row in some]
            ridge = ceilings[name] / ceilings["bytes"]
            low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
            roof = [low * ceilings["bytes"], ceilings[name], ceilings[name]]
            axes.plot([low, ridge, high], roof, color="0.15", linewidth=1.4)
            for row, x in zip(some, intensities, strict=True):
                style = {"color": colour[row.subject.what], "marker": mark[row.subject.place], "markersize": 6.5}
                axes.plot(x, row.counts[work] / row.ours.median_s, label=str(row), **style)
                axes.plot(x, row.counts[work] / row.peer.median_s, label=f"{row}: peer", fillstyle="none", **style)
            dtypes = ", ".join(sorted({row.subject.dtype for row in some}))
            axes.set(title=dtypes, xscale="log", yscale="log", xlabel=f"{work} for each byte moved")
            _plain_ticks(axes.xaxis)
        panels[0].set_ylabel(f"{work} a second")
        named = [Line2D([], [], color="0.15", linewidth=1.4, label="what the machine does at best")]
        named += [Patch(color=shade, label=name) for name, shade in colour.items()]
        named += [Line2D([], [], color="0.3", marker=shape, linestyle="", label=name) for name, shape in mark.items()]
        title += "\nfull marks: ours; hollow marks: the fastest peer"
        if work == "flops":
            title += "; above the line, Winograd does fewer\nmultiplications than the count assumes"
        return _headed(figure, title, named, untimed)


def draw_growth(curves: Sequence[Curve], quantity: str, title: str, untimed: bool = False) -> Figure:
    """A quantity over what it grows with, both logarithmic, a panel for each of what that is; the exponent of each
    curve is in its name."""
    against = list(dict.fromkeys(curve.against for curve in curves))
    columns = min(PANELS, len(against))
    rows = -(-len(against) // columns)
    with look():
        figure = Figure((WIDTH, 3.9 * rows + 0.5 + 0.25 * untimed), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, what in zip(panels, against, strict=False):
            some = [curve for curve in curves if curve.against == what]
            for i, curve in enumerate(some):
                name = curve.name if curve.exponent is None else f"{curve.name}:\nexponent {curve.exponent:.2f}"
                axes.plot(curve.x, curve.y, label=name, color=_COLOURS[i % 7], marker=_MARKS[i % 7], markersize=4)
            axes.set(xscale="log", yscale="log", xlabel=what, ylabel=quantity)
            ticks = sorted({x for curve in some for x in curve.x})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.xaxis.set_minor_formatter(NullFormatter())
            _plain_ticks(axes.yaxis)
            axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(0, -0.14), frameon=False)
        for axes in panels[len(against) :]:
            axes.set_visible(False)
        return _headed(figure, title, [], untimed)


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
        columns = len(named) if len(named) <= 4 else 3
        figure.legend(handles=named, loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5)
    return figure
