"""Which image is the k-th training example, and whether it is mirrored, as pure functions of (seed, k).

Nothing here has state to save, so a resumed run sees exactly the examples that an uninterrupted one would have seen,
whatever its batch size. The random numbers come from SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators"), evaluated at a counter. It uses integers only, so the order does not change with
torch's version, which torch.randperm does not promise.
"""

from functools import lru_cache

import numpy as np
import torch

from ddpm_fast.errors import InputError

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_ORDER, _FLIP = 1, 2  # two streams, so that mirroring and order are independent under one seed


def splitmix64(state: int, counters: np.ndarray) -> np.ndarray:
    """Outputs of the SplitMix64 generator that starts at `state`: uint64, one for each number in `counters`.

    `counters` is uint64, and the first output has the number 0.
    """
    z = np.uint64(state & _WORD) + (counters + np.uint64(1)) * np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _stream_state(seed: int, stream: int, epoch: int) -> int:
    """Where the generator of (seed, stream, epoch) starts.

    The three are hashed one after another, so that nearby seeds share nothing.
    """
    state = 0
    for part in (seed, stream, epoch):
        state = int(splitmix64(state ^ (part & _WORD), np.zeros(1, np.uint64))[0])
    return state


# Two entries, because a batch may contain the end of one epoch and the start of the next.
@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> torch.Tensor:
    """The order of the epoch's images, int64 [n]."""
    keys = splitmix64(_stream_state(seed, _ORDER, epoch), np.arange(n, dtype=np.uint64))
    return torch.from_numpy(np.argsort(keys, kind="stable"))


def _check_range(start: int, count: int) -> None:
    if start < 0 or count < 0:
        raise InputError(f"start and count must not be negative, got start={start}, count={count}")


def batch_indices(seed: int, start: int, count: int, n: int) -> torch.Tensor:
    """The dataset indices of the training examples start .. start+count-1: int64 [count].

    The stream of examples is endless. Example k belongs to epoch k // n, and each epoch visits each of the n images
    once, in an order that depends on (seed, epoch) alone.

    Raises:
        InputError: If the dataset is empty or the range negative.
    """
    _check_range(start, count)
    if n <= 0:
        raise InputError(f"the dataset must have at least one image, got n={n}")
    parts, end = [torch.empty(0, dtype=torch.int64)], start + count
    while start < end:
        epoch, first = divmod(start, n)
        last = min(n, first + end - start)
        parts.append(_permutation(seed, epoch, n)[first:last])
        start += last - first
    return torch.cat(parts)


def flip_mask(seed: int, start: int, count: int) -> torch.Tensor:
    """Which of the training examples start .. start+count-1 are mirrored left to right: bool [count].

    Each example has one fair random bit, which depends on (seed, example number) alone.

    Raises:
        InputError: If the range is negative.
    """
    _check_range(start, count)
    counters = np.uint64(start) + np.arange(count, dtype=np.uint64)
    bits = splitmix64(_stream_state(seed, _FLIP, 0), counters) >> np.uint64(63)
    return torch.from_numpy(bits.astype(bool))
