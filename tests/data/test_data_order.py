"""Tests of ddpm_fast.data.order: the order of examples against plain counting, flips as fair bits."""

import tracemalloc
from math import isqrt

import numpy as np
import pytest
import torch

from ddpm_fast.data import batch_indices, flip_mask
from ddpm_fast.data.order import crop_windows, splitmix64
from ddpm_fast.errors import InputError


def test_splitmix64_known_answers():
    """The generator's published outputs for these starts (Vigna's splitmix64.c)."""
    counters = np.arange(3, dtype=np.uint64)
    assert splitmix64(0, counters)[0] == 0xE220A8397B1DCDAF
    assert splitmix64(1234567, counters).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("n", [1, 2, 7, 1000], ids=["one image", "two", "odd", "many"])
def test_every_epoch_visits_every_image_once(n):
    for epoch in range(4):
        assert sorted(batch_indices(3, epoch * n, n, n, version=1).tolist()) == list(range(n))


@pytest.mark.parametrize("batch", [1, 3, 10, 17, 64], ids=["one", "three", "an epoch", "over", "six epochs"])
def test_order_does_not_depend_on_the_batch_size(batch):
    n, total = 10, 100
    whole = batch_indices(5, 0, total, n, version=1)
    parts = [batch_indices(5, k, min(batch, total - k), n, version=1) for k in range(0, total, batch)]
    assert whole.dtype == torch.int64 and torch.equal(torch.cat(parts), whole)


def test_resuming_anywhere_continues_the_same_order():
    whole = batch_indices(9, 0, 300, 37, version=1)
    for start in (290, 36, 37, 38, 150, 0):  # out of order: nothing remembered may leak
        assert torch.equal(batch_indices(9, start, 10, 37, version=1), whole[start : start + 10])


def test_orders_differ_by_seed_and_epoch_and_are_uniform():
    n = 50
    orders = {tuple(batch_indices(s, e * n, n, n, version=1).tolist()) for s in range(20) for e in range(20)}
    assert len(orders) == 400
    # Chi-square of the first image over 6,000 seeds and epochs: 49 degrees of freedom, 99.99% below 97.
    firsts = np.bincount(
        [int(batch_indices(s, e * n, 1, n, version=1)) for s in range(100) for e in range(60)], minlength=n
    )
    assert ((firsts - 120) ** 2 / 120).sum() < 97


def test_returned_indices_may_be_changed_without_harm():
    first = batch_indices(1, 0, 10, 10, version=1)
    kept = first.clone()
    first.zero_()
    assert torch.equal(batch_indices(1, 0, 10, 10, version=1), kept)


def test_empty_batches_and_large_seeds():
    assert batch_indices(0, 5, 0, 3, version=1).shape == (0,) and flip_mask(0, 5, 0).shape == (0,)
    assert sorted(batch_indices(2**63 + 5, 2**40 * 4, 4, 4, version=1).tolist()) == [0, 1, 2, 3]
    assert sorted(batch_indices(-1, 0, 4, 4, version=1).tolist()) == [0, 1, 2, 3]


def test_flips_are_fair_bits_of_the_example_number():
    whole = flip_mask(4, 0, 20000)
    assert whole.dtype == torch.bool
    assert abs(whole.double().mean() - 0.5) < 4 * 0.5 / 20000**0.5  # four standard deviations
    agree = (whole[1:] == whole[:-1]).double().mean()
    assert abs(agree - 0.5) < 4 * 0.5 / 19999**0.5
    for start, count in ((0, 7), (7, 5), (12345, 678)):
        assert torch.equal(flip_mask(4, start, count), whole[start : start + count])
    assert not torch.equal(flip_mask(5, 0, 100), whole[:100])


# ---- version 2 ----

WORD = (1 << 64) - 1


def mixed(state, number):
    """Output `number` of the SplitMix64 generator that starts at `state`, as Vigna's splitmix64.c has it."""
    z = (state + (number + 1) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def image_of(seed, example, n):
    """The image of one example in version 2, written down once more with Python's integers."""
    epoch, image = divmod(example, n)
    state = 0
    for part in (seed, 4, epoch):
        state = mixed(state ^ (part & WORD), 0)
    keys = [mixed(state, r) for r in range(16)]
    b = next(b for b in range(isqrt(n) + 2) if b * b >= n) if n < 10**6 else isqrt(n - 1) + 1
    a = (n + b - 1) // b
    while True:
        left, right = divmod(image, b)
        for r, key in enumerate(keys):
            if r % 2 == 0:
                left = (left + mixed(key, right)) % a
            else:
                right = (right + mixed(key, left)) % b
        image = left * b + right
        if image < n:
            return image


@pytest.mark.parametrize("n", [1, 2, 3, 10, 97, 4096, 5000, 10**6 + 3, 10**9, 2**40 + 1])
@pytest.mark.parametrize("seed", [0, -1, 2**63 + 5])
def test_version_2_is_what_it_is_defined_to_be(n, seed):
    for start, count in ((0, 20), (3 * n - 7, 20), (4090, 12)):
        start = max(0, start)
        wanted = [image_of(seed, k, n) for k in range(start, start + count)]
        assert batch_indices(seed, start, count, n, version=2).tolist() == wanted


def test_version_2_visits_every_image_once_in_each_epoch():
    powers = [2**k + d for k in range(10, 15) for d in (-1, 0, 1)]
    for n in [*range(1, 130), *range(130, 1001, 29), *powers]:
        two = batch_indices(3, 5 * n, 2 * n, n, version=2).view(2, n)
        assert (two.sort(1).values == torch.arange(n)).all(), n


def test_version_2_does_not_depend_on_the_batches():
    n, total = 37, 9000  # more than two blocks of what is computed at once
    whole = batch_indices(5, 0, total, n, version=2)
    for batch in (1, 999, 4096, 4097):
        starts = range(0, total, batch)[:20]
        parts = [batch_indices(5, k, min(batch, total - k), n, version=2) for k in starts]
        assert torch.equal(torch.cat(parts), whole[: sum(map(len, parts))])
    kept = whole.clone()
    whole.zero_()
    assert torch.equal(batch_indices(5, 0, total, n, version=2), kept)


@pytest.mark.parametrize("n, bins", [(16, 16), (100, 100), (10**6, 64)], ids=["small", "medium", "large"])
def test_version_2_places_images_uniformly(n, bins):
    """Chi-square over pairs of (position, image), and over the images of neighbouring positions and epochs."""
    epochs, width = 400, 40
    # The first 40 positions of each epoch, folded to so many columns and the images to so many bins.
    columns = min(n, width)
    first = np.stack([batch_indices(7, e * n, columns, n, version=2).numpy() for e in range(epochs)])
    image = first * bins // n
    tables = [
        image + bins * np.arange(columns)[None],  # the position against the image
        image[:, 1:] + bins * image[:, :-1],  # the image before
        image[1:] + bins * image[:-1],  # the image at this place in the epoch before
    ]
    for table, cells in zip(tables, (columns * bins, bins * bins, bins * bins), strict=True):
        counts = np.bincount(table.reshape(-1), minlength=cells)
        expected = np.full(cells, table.size / cells)
        if cells == bins * bins and table is tables[1] and bins == n:  # an image does not follow itself in an epoch
            expected = np.where(np.arange(cells) % (bins + 1) == 0, 0, table.size / (cells - bins))
            assert not counts[expected == 0].any()
        valid = expected > 0
        freedom = valid.sum()
        chi = ((counts - expected)[valid] ** 2 / expected[valid]).sum()
        assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5


def test_version_2_differs_by_seed_and_epoch_and_stream():
    n = 50
    orders = {tuple(batch_indices(s, e * n, n, n, version=2).tolist()) for s in range(20) for e in range(20)}
    assert len(orders) == 400
    assert tuple(batch_indices(0, 0, n, n, version=1).tolist()) not in orders


def test_a_billion_images_cost_what_a_batch_does():
    tracemalloc.start()
    batch_indices(1, 10**12, 128, 10**9, version=2)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_windows_are_uniform_fractions_of_the_example_number():
    whole = crop_windows(4, 0, 6000)
    values = np.array(whole)
    assert values.shape == (6000, 3) and values.min() >= 0 and values.max() < 1
    assert np.abs(values.mean(0) - 0.5).max() < 5 / (12 * 6000) ** 0.5
    assert np.abs(np.corrcoef(values.T) - np.eye(3)).max() < 5 / 6000**0.5
    state = 0
    for part in (4, 3, 0):
        state = mixed(state ^ part, 0)
    assert whole[123] == tuple((mixed(state, 3 * 123 + j) >> 11) / 2**53 for j in range(3))
    assert crop_windows(4, 100, 50) == whole[100:150] and crop_windows(5, 0, 1) != whole[:1]


@pytest.mark.parametrize(
    "call, words",
    [
        pytest.param(lambda: batch_indices(0, 0, 1, 0), "at least one image, got n=0", id="empty dataset"),
        pytest.param(lambda: batch_indices(0, -1, 1, 5), "not be negative, got start=-1", id="negative start"),
        pytest.param(lambda: batch_indices(0, 0, 1, 5, 3), r"the versions \(1, 2\), got 3", id="unknown version"),
        pytest.param(lambda: flip_mask(0, 0, -2), "not be negative, .*count=-2", id="negative count"),
    ],
)
def test_order_refuses(call, words):
    with pytest.raises(InputError, match=words):
        call()
