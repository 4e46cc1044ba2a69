"""What a benchmark finds: ours compared with one peer on one piece of work, as it is measured, stored and drawn."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import timing

CEILING = "copy"  # the operation whose rows say what the machine can do, not what we do


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a row is about. what: the op, or the layer above the ops. text: the name that nothing else has. name: for
    the reader, without the place. place: the shape of an op's images, or the name of a network. steps: of a chain."""

    what: str
    text: str
    name: str
    place: str
    dtype: str
    batch: int
    steps: int = 1


@dataclasses.dataclass(frozen=True)
class Side:
    """The median time of one variant in seconds, and the error of its result before it was timed."""

    median_s: float
    error: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """Ours compared with one peer; without any peer, baseline is empty and peer None. setting: how the calls were made.
    speedup: the peer's time over ours, with its 95% interval from low to high. counts: how many "bytes", "normals",
    "flops" or "instructions" the work takes at least."""

    subject: Subject
    setting: str
    measured: str
    baseline: str
    speedup: float
    low: float
    high: float
    ours: Side
    peer: Side | None
    counts: dict[str, float]

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Row":
        """A row as dataclasses.asdict() wrote it. Raises TypeError or KeyError for anything else."""
        peer = None if line["peer"] is None else Side(**line["peer"])
        parts = {"subject": Subject(**line["subject"]), "ours": Side(**line["ours"]), "peer": peer}
        return cls(**(line | parts))

    @property
    def identity(self) -> tuple:
        return self.subject.text, self.subject.steps, self.setting, self.measured, self.baseline

    def rate(self, cause: str) -> str:
        """The name of the ceiling that limits a cause: each dtype has its own rate of operations."""
        return f"flops {self.subject.dtype}" if cause == "flops" else cause

    def floors(self, ceilings: Mapping[str, float]) -> dict[str, float]:
        """The times that no implementation can go under, by what sets them: counts over the machine's rates."""
        rates = {cause: ceilings.get(self.rate(cause)) for cause in self.counts}
        return {cause: self.counts[cause] / rate for cause, rate in rates.items() if rate and self.counts[cause]}

    def floor(self, ceilings: Mapping[str, float]) -> tuple[str, float] | None:
        """(what sets it, seconds) of the highest floor."""
        return max(self.floors(ceilings).items(), key=lambda item: item[1], default=None)

    def __str__(self) -> str:
        return f"{self.subject.text} [{self.setting}], {self.measured} compared with {self.baseline or 'nothing'}"


def rows(
    subject: Subject,
    seconds: Mapping[str, np.ndarray],
    counts: Mapping[str, dict[str, float]],
    errors: Mapping[str, float],
    setting: str = "calls",
) -> list[Row]:
    """Makes a row of each pair of ours and a peer. seconds: by label, the times of the rounds, in which all labels took
    turns. counts: by each label of ours, what the work takes at least; the other labels are peers. errors: by label, of
    those results that could be compared. setting: how the calls were made."""
    sides = {label: Side(float(np.median(times)), errors.get(label)) for label, times in seconds.items()}
    made = []
    for ours in [label for label in seconds if label in counts]:
        for peer in [label for label in seconds if label not in counts] or [""]:
            ratios = seconds[peer or ours] / seconds[ours]
            speedup, interval = float(np.median(ratios)), timing.median_interval(ratios)
            row = Row(subject, setting, ours, peer, speedup, *interval, sides[ours], sides.get(peer), counts[ours])
            made.append(row)
    return made


def by_variant(found: list[Row]) -> list[list[Row]]:
    """The rows in groups of one piece of work, one setting and one variant of ours: a row for each peer."""
    groups: dict[tuple, list[Row]] = {}
    for row in found:
        groups.setdefault(row.identity[:-1], []).append(row)
    return list(groups.values())


def lines(found: list[Row], ceilings: Mapping[str, float]) -> list[str]:
    """The rows for a log, a line for each variant of ours."""
    made = []
    for row, *others in by_variant(found):
        text = f"{row.subject.text} [{row.setting}] {row.measured} {duration(row.ours.median_s)}"
        if floor := row.floor(ceilings):
            text += f", {floor[1] / row.ours.median_s:.0%} of the time is the floor of the {floor[0]}"
        peers = [f"{x.baseline} {x.speedup:.2f}x ({x.low:.2f}..{x.high:.2f})" for x in (row, *others) if x.peer]
        made.append(f"{text}; {', '.join(peers) or 'compared with nothing'}")
    return made


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 1e-6:.3g} us"
