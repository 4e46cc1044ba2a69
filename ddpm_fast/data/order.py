"""Which image is the k-th training example, and whether it is mirrored: pure functions of (seed, k).

Nothing here has state to save, so a resumed run sees exactly what an uninterrupted one would have seen,
whatever its batch size. The random numbers are SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators") evaluated at a counter: integers only, so the order also survives a change of
torch version, which torch.randperm does not promise.
"""

from functools import lru_cache

import numpy as np
import torch

from ddpm_fast.errors import InputError

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_ORDER, _FLIP = 1, 2  # streams: the same seed must not tie the mirroring to the order


def splitmix64(state: int, counters: np.ndarray) -> np.ndarray:
    """Outputs number `counters` (uint64, from 0) of the SplitMix64 generator started at `state`; uint64."""
    z = np.uint64(state & _WORD) + (counters + np.uint64(1)) * np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _stream_state(seed: int, stream: int, epoch: int) -> int:
    """Where the generator of (seed, stream, epoch) starts: hashed in turn, so nearby seeds share nothing."""
    state = 0
    for part in (seed, stream, epoch):
        state = int(splitmix64(state ^ (part & _WORD), np.zeros(1, np.uint64))[0])
    return state


# Two, because a batch may straddle an epoch's end; the smaller batches that follow then still hit.
@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> torch.Tensor:
    keys = splitmix64(_stream_state(seed, _ORDER, epoch), np.arange(n, dtype=np.uint64))
    return torch.from_numpy(np.argsort(keys, kind="stable"))


def _check_range(start: int, count: int) -> None:
    if start < 0 or count < 0:
        raise InputError(f"start and count must not be negative, got start={start}, count={count}")


def batch_indices(seed: int, start: int, count: int, n: int) -> torch.Tensor:
    """Dataset indices, int64 [count], of the examples start .. start+count-1 of an endless training stream.

    Example k belongs to epoch k // n. Each epoch visits every one of the n images once, in an order that
    depends on (seed, epoch) alone. Raises InputError for an empty dataset or a negative range.
    """
    _check_range(start, count)
    if n <= 0:
        raise InputError(f"an order needs at least one image, got n={n}")
    parts, end = [torch.empty(0, dtype=torch.int64)], start + count
    while start < end:
        epoch, first = divmod(start, n)
        last = min(n, first + end - start)
        parts.append(_permutation(seed, epoch, n)[first:last])
        start += last - first
    return torch.cat(parts)


def flip_mask(seed: int, start: int, count: int) -> torch.Tensor:
    """Which of the training examples numbered start .. start+count-1 are mirrored left-right; bool [count].

    One fair bit an example, a function of (seed, example number). Raises InputError for a negative range.
    """
    _check_range(start, count)
    counters = np.uint64(start) + np.arange(count, dtype=np.uint64)
    bits = splitmix64(_stream_state(seed, _FLIP, 0), counters) >> np.uint64(63)
    return torch.from_numpy(bits.astype(bool))
