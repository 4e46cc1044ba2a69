"""Tests of ddpm_fast.data.order: the order of examples against plain counting, flips as fair bits."""

import numpy as np
import pytest
import torch

from ddpm_fast.data import batch_indices, flip_mask
from ddpm_fast.data.order import splitmix64
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
        assert sorted(batch_indices(3, epoch * n, n, n).tolist()) == list(range(n))


@pytest.mark.parametrize("batch", [1, 3, 10, 17, 64], ids=["one", "three", "an epoch", "over", "six epochs"])
def test_order_does_not_depend_on_the_batch_size(batch):
    n, total = 10, 100
    whole = batch_indices(5, 0, total, n)
    parts = [batch_indices(5, k, min(batch, total - k), n) for k in range(0, total, batch)]
    assert whole.dtype == torch.int64 and torch.equal(torch.cat(parts), whole)


def test_resuming_anywhere_continues_the_same_order():
    whole = batch_indices(9, 0, 300, 37)
    for start in (290, 36, 37, 38, 150, 0):  # out of order: nothing remembered may leak
        assert torch.equal(batch_indices(9, start, 10, 37), whole[start : start + 10])


def test_orders_differ_by_seed_and_epoch_and_are_uniform():
    n = 50
    orders = {tuple(batch_indices(s, e * n, n, n).tolist()) for s in range(20) for e in range(20)}
    assert len(orders) == 400
    # Chi-square of the first image over 6,000 seeds and epochs: 49 degrees of freedom, 99.99% below 97.
    firsts = np.bincount([int(batch_indices(s, e * n, 1, n)) for s in range(100) for e in range(60)], minlength=n)
    assert ((firsts - 120) ** 2 / 120).sum() < 97


def test_returned_indices_may_be_changed_without_harm():
    first = batch_indices(1, 0, 10, 10)
    kept = first.clone()
    first.zero_()
    assert torch.equal(batch_indices(1, 0, 10, 10), kept)


def test_empty_batches_and_large_seeds():
    assert batch_indices(0, 5, 0, 3).shape == (0,) and flip_mask(0, 5, 0).shape == (0,)
    assert sorted(batch_indices(2**63 + 5, 2**40 * 4, 4, 4).tolist()) == [0, 1, 2, 3]
    assert sorted(batch_indices(-1, 0, 4, 4).tolist()) == [0, 1, 2, 3]


def test_flips_are_fair_bits_of_the_example_number():
    whole = flip_mask(4, 0, 20000)
    assert whole.dtype == torch.bool
    assert abs(whole.double().mean() - 0.5) < 4 * 0.5 / 20000**0.5  # four standard deviations
    agree = (whole[1:] == whole[:-1]).double().mean()
    assert abs(agree - 0.5) < 4 * 0.5 / 19999**0.5
    for start, count in ((0, 7), (7, 5), (12345, 678)):
        assert torch.equal(flip_mask(4, start, count), whole[start : start + count])
    assert not torch.equal(flip_mask(5, 0, 100), whole[:100])


@pytest.mark.parametrize(
    "call, words",
    [
        pytest.param(lambda: batch_indices(0, 0, 1, 0), "at least one image, got n=0", id="empty dataset"),
        pytest.param(lambda: batch_indices(0, -1, 1, 5), "not be negative, got start=-1", id="negative start"),
        pytest.param(lambda: flip_mask(0, 0, -2), "not be negative, .*count=-2", id="negative count"),
    ],
)
def test_order_refuses(call, words):
    with pytest.raises(InputError, match=words):
        call()
