"""The lines of a ledger as a compiler groups them: an estimate of what torch.compile launches.

Convolutions, matrix products, attention and the optimiser stay as they are. Everything between them, which reads and
writes element by element or reduces, becomes one kernel, and one more after each reduction that something depends on.
Such a kernel reads what others made, once, and writes what others read.
"""

from collections.abc import Sequence

from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.ledger.entries import ELEMENTWISE, NORMS, REDUCTIONS, Line


def fused(lines: Sequence[Line]) -> list[Line]:
    """The lines, in which those that are fusable have become groups."""
    kernels: list[list[Line]] = []
    pending: list[Line] = []
    for line in lines:
        if line.fusable:
            pending.append(line)
            continue
        needed = _needed(line, pending)
        kernels += _cut([each for each in pending if id(each) in needed])
        pending = [each for each in pending if id(each) not in needed]
        kernels.append([line])
    kernels += _cut(pending)
    readers: dict[StorageWeakRef, set[int]] = {}
    for number, kernel in enumerate(kernels):
        for storage in {storage for line in kernel for storage, _ in line.reads}:
            readers.setdefault(storage, set()).add(number)
    return [
        kernel[0] if len(kernel) == 1 else _joined(kernel, number, readers) for number, kernel in enumerate(kernels)
    ]


def _needed(line: Line, pending: Sequence[Line]) -> set[int]:
    """Which of the pending lines have to run before this one, by identity."""
    wanted, found = {storage for storage, _ in line.reads}, set()
    for each in reversed(pending):
        if any(storage in wanted for storage, _ in each.writes):
            found.add(id(each))
            wanted |= {storage for storage, _ in each.reads}
    return found


def _cut(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines in groups that one kernel each can hold: a reduction ends its group."""
    made: list[list[Line]] = [[]]
    for line in lines:
        made[-1].append(line)
        if line.reduces:
            made.append([])
    return [group for group in made if group]


def _joined(kernel: Sequence[Line], number: int, readers: dict[StorageWeakRef, set[int]]) -> Line:
    """One line for the kernel. What it writes is left out of its bytes if no other kernel reads it."""
    reads: dict[StorageWeakRef, int] = {}
    writes: dict[StorageWeakRef, int] = {}
    for line in kernel:
        for storage, size in line.reads:
            if storage not in writes:
                reads[storage] = max(size, reads.get(storage, 0))
        for storage, size in line.writes:
            writes[storage] = max(size, writes.get(storage, 0))
    seen = {storage: size for storage, size in writes.items() if readers.get(storage, set()) != {number}}
    kinds = {line.kind for line in kernel}
    kind = next((kind for kind in (NORMS, REDUCTIONS) if kind in kinds), ELEMENTWISE)
    moved = sum(reads.values()) + sum(seen.values())
    return Line("fused", kind, 1, moved, False, False, tuple(reads.items()), tuple(seen.items()))
