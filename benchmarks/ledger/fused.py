"""The lines of a ledger as a compiler groups them: an estimate of what torch.compile launches.

Convolutions, matrix products, attention and the optimiser stay as they are. Everything between them, which reads and
writes element by element or reduces, becomes one kernel, and one more after each reduction that something depends on.
Such a kernel reads what others made, once, and writes what others read. What is made element by element of no more
bytes than it would take to write and read it is computed again instead.
"""

from collections.abc import Sequence

from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.ledger.entries import ELEMENTWISE, NORMS, REDUCTIONS, Line

Sizes = dict[StorageWeakRef, int]


class Kernel:
    """Lines that run as one. again: those that an earlier kernel has computed already."""

    def __init__(self, lines: Sequence[Line], again: Sequence[Line] = ()):
        self.lines, self.again = list(lines), list(again)

    @property
    def reads(self) -> Sizes:
        """What others made, with the bytes."""
        found: Sizes = {}
        made: set[StorageWeakRef] = set()
        for line in (*self.again, *self.lines):
            found |= {storage: max(n, found.get(storage, 0)) for storage, n in line.reads if storage not in made}
            made |= {storage for storage, _ in line.writes}
        return found

    @property
    def makes(self) -> Sizes:
        return {storage: n for line in self.lines for storage, n in line.writes}


def fused(lines: Sequence[Line]) -> list[Line]:
    """The lines, in which those that are fusable have become groups."""
    kernels: list[Kernel] = []
    pending: list[Line] = []
    for line in lines:
        if line.fusable:
            pending.append(line)
            continue
        needed = _needed([storage for storage, _ in line.reads], pending)
        kernels += _cut([each for each in pending if id(each) in needed])
        pending = [each for each in pending if id(each) not in needed]
        kernels.append(Kernel([line]))
    kernels += _cut(pending)
    everything = {storage for line in lines for storage, _ in line.reads}
    readers: dict[StorageWeakRef, set[int]] = {}
    for number, kernel in enumerate(kernels):
        for storage in kernel.reads:
            readers.setdefault(storage, set()).add(number)
    made = []
    for number, kernel in enumerate(kernels):
        # What only this kernel reads stays inside; what nobody reads is a result.
        seen = {s: n for s, n in kernel.makes.items() if readers.get(s, set()) - {number} or s not in everything}
        made.append(kernel.lines[0] if len(kernel.lines) == 1 and not kernel.again else _joined(kernel, seen))
    return made


def _needed(storages: Sequence[StorageWeakRef], lines: Sequence[Line]) -> set[int]:
    """Which of the lines have to run before something reads these storages, by identity."""
    wanted, found = set(storages), set()
    for line in reversed(lines):
        if any(storage in wanted for storage, _ in line.writes):
            found.add(id(line))
            wanted |= {storage for storage, _ in line.reads}
    return found


def _cut(lines: Sequence[Line]) -> list[Kernel]:
    """The lines in kernels: a reduction ends its kernel, and what the next one needs is computed again if that pays."""
    groups: list[list[Line]] = [[]]
    for line in lines:
        groups[-1].append(line)
        if line.reduces:
            groups.append([])
    made, before = [], []
    for group in groups:
        if group:
            made.append(Kernel(group, _again(Kernel(group).reads, before)))
        before += [line for line in group if not line.reduces]
    return made


def _again(reads: Sizes, before: Sequence[Line]) -> list[Line]:
    """The earlier lines that are computed again, as that moves no more bytes than to write their results and read
    them."""
    found: set[int] = set()
    for storage, n in reads.items():
        needed = _needed([storage], before)
        if needed and sum(Kernel([line for line in before if id(line) in needed]).reads.values()) <= 2 * n:
            found |= needed
    return [line for line in before if id(line) in found]


def _joined(kernel: Kernel, writes: Sizes) -> Line:
    kinds = {line.kind for line in kernel.lines}
    kind = next((kind for kind in (NORMS, REDUCTIONS) if kind in kinds), ELEMENTWISE)
    moved = sum(kernel.reads.values()) + sum(writes.values())
    return Line("fused", kind, 1, moved, reads=tuple(kernel.reads.items()), writes=tuple(writes.items()))
