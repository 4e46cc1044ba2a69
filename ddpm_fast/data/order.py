"""Which image is the k-th training example, whether it is mirrored and where it is cut, as pure functions of (seed, k).

Nothing here has state to save, so a resumed run sees exactly the examples that an uninterrupted one would have seen,
whatever its batch size. The random numbers come from SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators"), evaluated at a counter. It uses integers only, so the order does not change with
torch's version, which torch.randperm does not promise.

There are two versions of the order. Version 1 sorts n random keys, which takes memory and time for n of them in each
epoch. Version 2 is a keyed bijection of 0 .. n-1, computed for the examples of a batch alone: a Feistel network (Luby &
Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions") in the form for any n of Black &
Rogaway 2002, "Ciphers with arbitrary finite domains". A run keeps the version that it began with.
"""

from functools import lru_cache
from math import isqrt

import numpy as np
import torch

from ddpm_fast.data.source import Window
from ddpm_fast.errors import InputError

ORDERS = (1, 2)  # the versions
_WORD = (1 << 64) - 1
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
# Streams, which are independent under one seed.
_ORDER, _FLIP, _CROP, _BIJECTION, _AUGMENT, _CHOICE = 1, 2, 3, 4, 5, 6
# Four are proven to do for a large n. For n = 6, where the halves are 2 and 3, the frequencies of the 720 permutations
# differ by 35% after 8, 8% after 12, and no more than by chance (2%) after 16.
_ROUNDS = 16
_BLOCK = 4096  # examples that are computed at once, in 1.3 ms; 32 at a time would take 0.3 ms each time
_ABSENT = np.empty(0, np.int64)
_ZERO = np.zeros(1, np.uint64)


def splitmix64(state: int, counters: np.ndarray) -> np.ndarray:
    """Outputs of the SplitMix64 generator that starts at `state`: uint64, one for each number in `counters`.

    `counters` is uint64, and the first output has the number 0.
    """
    return _output(np.uint64(state & _WORD), counters)


def _output(state: np.ndarray | np.uint64, counters: np.ndarray) -> np.ndarray:
    """What `splitmix64` says, for one state for each counter."""
    z = state + (counters + np.uint64(1)) * _GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _stream_state(seed: int, stream: int, epoch: int) -> int:
    """Where the generator of (seed, stream, epoch) starts.

    The three are hashed one after another, so that nearby seeds share nothing.
    """
    state = 0
    for part in (seed, stream, epoch):
        state = int(splitmix64(state ^ (part & _WORD), _ZERO)[0])
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


def _bijection(seed: int, epochs: np.ndarray, positions: np.ndarray, n: int) -> np.ndarray:
    """The images at some positions of some epochs.

    A position p is the pair (p // b, p % b) with b about the root of n. Each round adds to one half, modulo what it
    counts to, a random function of the other one. What lands at n or above, of the less than b numbers that there are,
    goes through again until it lands below, which keeps it a bijection.

    Args:
        seed: The seed of the run.
        epochs: uint64 [k].
        positions: Below n, uint64 [k].
        n: The number of images.

    Returns:
        The numbers of the images, uint64 [k].
    """
    right_size = np.uint64(isqrt(n - 1) + 1)
    left_size = np.uint64(-(-n // int(right_size)))
    stream = int(splitmix64(int(splitmix64(seed, _ZERO)[0]) ^ _BIJECTION, _ZERO)[0])
    different, which = np.unique(epochs, return_inverse=True)
    starts = _output(np.uint64(stream) ^ different, _ZERO)
    keys = _output(starts, np.arange(_ROUNDS, dtype=np.uint64)[:, None])[:, which]
    images, todo = positions.copy(), np.arange(len(positions))
    while len(todo):
        left, right = np.divmod(images[todo], right_size)
        for i, key in enumerate(keys[:, todo]):
            if i % 2 == 0:
                left = (left + _output(key, right) % left_size) % left_size
            else:
                right = (right + _output(key, left) % right_size) % right_size
        images[todo] = left * right_size + right
        todo = todo[images[todo] >= n]
    return images


# Micro-batches follow each other, and so do batches.
@lru_cache(maxsize=4)
def _block(seed: int, number: int, n: int) -> np.ndarray:
    """The images of the examples number * _BLOCK and on, int64 [_BLOCK]."""
    examples = np.uint64(number * _BLOCK) + np.arange(_BLOCK, dtype=np.uint64)
    epochs, positions = np.divmod(examples, np.uint64(n))
    return _bijection(seed, epochs, positions, n).astype(np.int64)


def batch_indices(seed: int, start: int, count: int, n: int, version: int = 2) -> torch.Tensor:
    """The dataset indices of the training examples start .. start+count-1: int64 [count].

    The stream of examples is endless. Example k belongs to epoch k // n, and each epoch visits each of the n images
    once, in an order that depends on (seed, epoch) alone.

    Args:
        seed: The seed of the run.
        start: The number of the first example.
        count: How many examples.
        n: The number of images.
        version: That of the order, one of `ORDERS`. Version 2 takes time and memory for the examples alone.

    Raises:
        InputError: If the dataset is empty, the range negative or the version unknown.
    """
    _check_range(start, count)
    if n <= 0:
        raise InputError(f"the dataset must have at least one image, got n={n}")
    if version not in ORDERS:
        raise InputError(f"the order of the data has the versions {ORDERS}, got {version}")
    if version == 2:
        first, after = start // _BLOCK, -(-(start + count) // _BLOCK)
        blocks = [_ABSENT] + [_block(seed, number, n) for number in range(first, after)]
        offset = start - first * _BLOCK
        return torch.from_numpy(np.concatenate(blocks)[offset : offset + count])
    parts, end = [torch.empty(0, dtype=torch.int64)], start + count
    while start < end:
        epoch, first = divmod(start, n)
        last = min(n, first + end - start)
        parts.append(_permutation(seed, epoch, n)[first:last])
        start += last - first
    return torch.cat(parts)


def choose(seed: int, count: int, n: int, group: int = 0) -> np.ndarray:
    """`count` different numbers of 0 .. n-1, in an order that depends on (seed, group) alone: int64 [count].

    The first ones of a larger count are those of a smaller one.

    Args:
        seed: The seed.
        count: How many, up to n.
        n: How many there are to choose from.
        group: Tells choices apart that have one seed.

    Raises:
        InputError: If there are not so many.
    """
    if not 0 <= count <= n:
        raise InputError(f"{count} of {n} cannot be chosen; expected a number in 0..{n}")
    if not count:
        return _ABSENT
    positions = np.arange(count, dtype=np.uint64)
    return _bijection(_stream_state(seed, _CHOICE, group), np.zeros_like(positions), positions, n).astype(np.int64)


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


def crop_windows(seed: int, start: int, count: int) -> list[Window]:
    """Where the training examples start .. start+count-1 are cut at random.

    Each example has three random fractions, which depend on (seed, example number) alone.

    Raises:
        InputError: If the range is negative.
    """
    return [Window(*fractions) for fractions in _fractions(_stream_state(seed, _CROP, 0), start, count, 3).tolist()]


def augment_fractions(seed: int, transform: int, start: int, count: int, each: int) -> np.ndarray:
    """What a transform of the training examples start .. start+count-1 is drawn from.

    They depend on (seed, transform, example number) alone.

    Args:
        seed: The seed of the run.
        transform: The number of the transform.
        start: The number of the first example.
        count: How many examples.
        each: How many fractions each example has, always the same for a transform.

    Returns:
        float64 [count, each], each at least 0 and below 1.

    Raises:
        InputError: If the range is negative.
    """
    return _fractions(_stream_state(seed, _AUGMENT, transform), start, count, each)


def _fractions(state: int, start: int, count: int, each: int) -> np.ndarray:
    """Random fractions of some examples, so many for each: float64 [count, each]."""
    _check_range(start, count)
    counters = np.uint64(each * start) + np.arange(each * count, dtype=np.uint64)
    bits = splitmix64(state, counters) >> np.uint64(11)  # as many as a double has
    return (bits * 2.0**-53).reshape(count, each)
