"""What became slower between two result files, or faster, beyond noise.

What is compared are the ratios to the peers, not the times: the peer ran in the same rounds, on a machine that was as
busy. A ratio has changed when the two 95% intervals do not overlap (which chance alone brings about once in some 180
rows) and it moved by more than 3%, as not all that differs between two runs of one build is within a run's interval.
Of growth only the peak memory is compared, since its times have no peer: it has changed if it moved by more than 5%.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.report.results import MIN_ROUNDS, Result, fixed_name
from benchmarks.rows import CEILING, Row, duration
from ddpm_fast.errors import InputError

THRESHOLD, MEMORY_THRESHOLD = 0.03, 0.05
_MACHINE = ("cpu", "architecture", "cores", "isa", "backend", "threads")


@dataclass(frozen=True)
class Change:
    """What is in both files. slowdown: how much more of the peer's time, or how much more memory, ours takes."""

    name: str
    slowdown: float
    is_beyond_noise: bool
    before: str
    after: str


@dataclass(frozen=True)
class Comparison:
    """slower, faster: the largest change first. same: how many did not change. warnings: what else differs."""

    slower: list[Change] = field(default_factory=list)
    faster: list[Change] = field(default_factory=list)
    same: int = 0
    only_old: list[str] = field(default_factory=list)
    only_new: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def compare(old: Result, new: Result) -> Comparison:
    """Raises InputError for files of too few rounds, and for files that have nothing in common."""
    for result in (old, new):
        if result.quick:
            raise InputError(
                f"{result.path} was made with {result.found.get('rounds') or 'too few'} rounds (--quick), which time "
                f"nothing; expected at least {MIN_ROUNDS}: measure again without --quick"
            )
    before, after = _measured(old), _measured(new)
    changes = [_change(str(name), each, after[name]) for name, each in before.items() if name in after]
    if not changes:
        raise InputError(
            f"{old.path} and {new.path} have nothing in common: {len(before)} rows in the first, {len(after)} in the "
            "second; expected two results of one command on the same kind of device"
        )
    beyond = sorted((c for c in changes if c.is_beyond_noise), key=lambda change: -abs(change.slowdown))
    return Comparison(
        slower=[change for change in beyond if change.slowdown > 0],
        faster=[change for change in beyond if change.slowdown < 0],
        same=len(changes) - len(beyond),
        only_old=[str(name) for name in before if name not in after],
        only_new=[str(name) for name in after if name not in before],
        warnings=_warnings(old, new),
    )


def _measured(result: Result) -> dict[str, Row | float]:
    """By name: the rows that make a claim of ours, and of growth the bytes of each point."""
    rows = [row for row in result.rows if row.subject.what != CEILING and row.peer is not None]
    found: dict[str, Row | float] = {f"{row}, steps: {row.subject.steps}": row for row in rows}
    for line in result.growth:
        for point in line["points"]:
            found[f"peak memory of {fixed_name(line)}, {line['axis']} {point['x']}"] = point["peak_bytes"]
    return found


def _change(name: str, old: Row | float, new: Row | float) -> Change:
    if not isinstance(old, Row):
        slowdown = new / old - 1 if old else 0.0
        sizes = [f"{nbytes / 2**20:.4g} MiB" for nbytes in (old, new)]
        return Change(name, slowdown, abs(slowdown) > MEMORY_THRESHOLD, *sizes)
    slowdown = old.speedup / new.speedup - 1
    apart = new.high < old.low or old.high < new.low
    texts = [
        f"{row.speedup:.2f}x ({row.low:.2f}..{row.high:.2f}), ours {duration(row.ours.median_s)}, "
        f"the peer {duration(row.peer.median_s)}"
        for row in (old, new)
    ]
    return Change(name, slowdown, apart and abs(slowdown) > THRESHOLD, *texts)


def _warnings(old: Result, new: Result) -> list[str]:
    """Where and with what the two were measured, as far as it differs and is not what is compared."""
    machines = [result.found["machine"] for result in (old, new)]
    pairs = [(name, *(machine.get(name) for machine in machines)) for name in _MACHINE]
    cards = [machine.get("gpu", {}) for machine in machines]
    pairs.append(("GPU", *(card.get("name") for card in cards)))
    pairs.append(("GPU driver", *(card.get("state", {}).get("driver_version") for card in cards)))
    versions = [result.found["versions"] for result in (old, new)]
    names = [name for name in versions[0] if name != "ddpm_fast" and name in versions[1]]
    pairs += [(f"version of {name}", *(each[name] for each in versions)) for name in names]
    return [f"the {name} differs: {before}, then {after}" for name, before, after in pairs if before != after]
