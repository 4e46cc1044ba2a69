"""What became slower between two result files, or faster, beyond noise.

What is compared are the ratios to the peers, not the times: the peer ran in the same rounds, on a machine that was as
busy. A ratio has changed when the two 95% intervals do not overlap (which chance alone brings about once in some 180
rows) and it moved by more than 3%. Of growth only the peak memory is compared, since its times have no peer.
"""

from typing import NamedTuple

from benchmarks.report.results import MIN_ROUNDS, Result, fixed_name
from benchmarks.rows import CEILING, duration
from ddpm_fast.errors import InputError

THRESHOLD, MEMORY_THRESHOLD = 0.03, 0.05
_MACHINE = ("cpu", "architecture", "cores", "isa", "backend", "threads")


class Measured(NamedTuple):
    """What is compared, the larger the better, with its interval, and as text."""

    value: float
    low: float
    high: float
    threshold: float
    text: str


class Comparison(NamedTuple):
    """slower, faster: {name: what changed, as text}, the largest change first. same: how many did not change. only_old,
    only_new: by name. warnings: what else differs."""

    slower: dict[str, str]
    faster: dict[str, str]
    same: int
    only_old: list[str]
    only_new: list[str]
    warnings: list[str]


def compare(old: Result, new: Result) -> Comparison:
    """Raises InputError for files of too few rounds, and for files that have nothing in common."""
    for result in (old, new):
        if result.quick:
            few = f"was made with {result.found.get('rounds') or 'too few'} rounds (--quick), which time nothing"
            raise InputError(f"{result.path} {few}; expected at least {MIN_ROUNDS}: measure again without --quick")
    before, after = _measured(old), _measured(new)
    common = [name for name in before if name in after]
    if not common:
        sizes = f"{len(before)} rows in the first, {len(after)} in the second"
        expected = "expected two results of one command on the same kind of device"
        raise InputError(f"{old.path} and {new.path} have nothing in common: {sizes}; {expected}")
    changes = {}
    for name in common:
        x, y = before[name], after[name]
        slowdown = x.value / y.value - 1
        if (y.high < x.low or x.high < y.low) and abs(slowdown) > x.threshold:
            changes[name] = slowdown, f"{slowdown:+.0%}; before {x.text}; now {y.text}"
    changed = sorted(changes, key=lambda name: -abs(changes[name][0]))
    return Comparison(
        {name: changes[name][1] for name in changed if changes[name][0] > 0},
        {name: changes[name][1] for name in changed if changes[name][0] < 0},
        len(common) - len(changed),
        [name for name in before if name not in after],
        [name for name in after if name not in before],
        _warnings(old, new),
    )


def _measured(result: Result) -> dict[str, Measured]:
    """By name: the rows that make a claim of ours, and of growth the memory of each point."""
    found = {}
    for row in result.rows:
        if row.subject.what != CEILING and row.peer is not None:
            times = f"ours {duration(row.ours.median_s)}, the peer {duration(row.peer.median_s)}"
            text = f"{row.speedup:.2f}x ({row.low:.2f}..{row.high:.2f}), {times}"
            found[f"{row}, steps: {row.subject.steps}"] = Measured(row.speedup, row.low, row.high, THRESHOLD, text)
    for line in result.growth():
        for point in line["points"]:
            nbytes, name = max(1, point["peak_bytes"]), f"peak memory of {fixed_name(line)}"
            inverse, text = 1 / nbytes, f"{nbytes / 2**20:.4g} MiB"
            measured = Measured(inverse, inverse, inverse, MEMORY_THRESHOLD, text)
            found[f"{name}, {line['axis']} {point['x']}"] = measured
    return found


def _warnings(old: Result, new: Result) -> list[str]:
    """Where and with what the two were measured, as far as it differs and is not what is compared."""

    def facts(result: Result) -> dict:
        machine, versions = result.found["machine"], result.found["versions"]
        card = machine.get("gpu", {})
        made = {name: machine.get(name) for name in _MACHINE}
        made |= {"GPU": card.get("name"), "GPU driver": card.get("state", {}).get("driver_version")}
        return made | {f"version of {name}": versions[name] for name in versions if name != "ddpm_fast"}

    before, after = facts(old), facts(new)
    names = [name for name in before if name in after and before[name] != after[name]]
    return [f"the {name} differs: {before[name]}, then {after[name]}" for name in names]
