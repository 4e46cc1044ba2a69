"""What became slower between two result files, or faster, beyond noise.

What is compared are the ratios to the peers, not the times: the peer ran in the same rounds, on a machine that was as
busy. A ratio has changed when the two 95% intervals do not overlap (which chance alone brings about once in some 180
rows) and it moved by more than 3%, as not all that differs between two runs of one build is within a run's interval.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ddpm_fast.results import CEILING, MIN_ROUNDS, Result, Row

from ddpm_fast.errors import InputError

THRESHOLD = 0.03
_MACHINE = ("cpu", "architecture", "cores", "isa", "backend")


@dataclass(frozen=True)
class Change:
    """A row in both files. slowdown: how much more of the peer's time ours takes; negative if less."""

    old: Row
    new: Row

    @property
    def slowdown(self) -> float:
        return self.old.speedup / self.new.speedup - 1

    @property
    def is_beyond_noise(self) -> bool:
        apart = self.new.high < self.old.low or self.old.high < self.new.low
        return apart and abs(self.slowdown) > THRESHOLD


@dataclass(frozen=True)
class Comparison:
    """slower, faster: the largest change first. same: how many rows did not change. warnings: what else differs."""

    slower: list[Change]
    faster: list[Change]
    same: int
    only_old: list[Row]
    only_new: list[Row]
    warnings: list[str]


def compare(old: Result, new: Result) -> Comparison:
    """Raises InputError for files of too few rounds, files without a row in common, and rows that cannot be told
    apart."""
    for result in (old, new):
        if result.quick:
            raise InputError(
                f"{result.path} was made with {result.rounds or 'too few'} rounds (--quick), which time nothing; "
                f"expected at least {MIN_ROUNDS}: measure again without --quick"
            )
    before, after = _by_identity(old), _by_identity(new)
    changes = [Change(row, after[key]) for key, row in before.items() if key in after]
    if not changes:
        raise InputError(
            f"{old.path} and {new.path} have nothing in common: {_some(before.values())} in the first, "
            f"{_some(after.values())} in the second; expected two results of one command on the same kind of device"
        )
    beyond = [change for change in changes if change.is_beyond_noise]
    return Comparison(
        slower=sorted((c for c in beyond if c.slowdown > 0), key=lambda change: -change.slowdown),
        faster=sorted((c for c in beyond if c.slowdown < 0), key=lambda change: change.slowdown),
        same=len(changes) - len(beyond),
        only_old=[row for key, row in before.items() if key not in after],
        only_new=[row for key, row in after.items() if key not in before],
        warnings=_warnings(old, new),
    )


def _by_identity(result: Result) -> dict[tuple, Row]:
    """The rows that make a claim of ours, by what they are of."""
    found: dict[tuple, Row] = {}
    for row in (row for row in result.rows if row.operation != CEILING):
        if row.identity in found:
            raise InputError(
                f"{result.path} has two rows of {row}, which cannot be told apart; expected one: take one of them out"
            )
        found[row.identity] = row
    return found


def _some(rows: Iterable[Row]) -> str:
    names = [str(row) for row in rows]
    return f"{len(names)} rows such as {names[0]}" if names else "no rows"


def _warnings(old: Result, new: Result) -> list[str]:
    """Where and with what the two were measured, as far as it differs and is not what is compared."""
    pairs = [(name, old.machine.get(name), new.machine.get(name)) for name in _MACHINE]
    cards = [result.machine.get("gpu", {}) for result in (old, new)]
    pairs.append(("GPU", *(card.get("name") for card in cards)))
    pairs.append(("GPU driver", *(card.get("state", {}).get("driver_version") for card in cards)))
    pairs.append(("number of threads", old.machine.get("threads"), new.machine.get("threads")))
    names = dict.fromkeys([*old.versions, *new.versions])
    # Older files do not record every library: what only one of them names is no difference.
    both = [name for name in names if name != "ddpm_fast" and name in old.versions and name in new.versions]
    pairs += [(f"version of {name}", old.versions[name], new.versions[name]) for name in both]
    return [f"the {name} differs: {before}, then {after}" for name, before, after in pairs if before != after]
