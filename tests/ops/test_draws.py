"""draw_timesteps and record_losses on every backend: known answers of Philox, the rules in exact fractions, and a plain
loop over the losses."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey, Stream, random_words
from ddpm_fast.ops import LabelDrop, draw_timesteps, record_losses

KEYS = {
    "small ids": NoiseKey.of(7, 67, first_sample_id=60, stream=Stream.TIMESTEP),
    "ids beyond 32 bits": NoiseKey.of(-3, 67, first_sample_id=2**32 - 30, step=2**32 - 1, stream=Stream.TIMESTEP),
    "the largest ids": NoiseKey.of(2**64 - 1, 67, first_sample_id=2**56 - 67, step=5, stream=Stream.TIMESTEP),
}


@pytest.fixture(params=KEYS)
def key(request):
    return KEYS[request.param]


def first_words(key, stream=Stream.TIMESTEP):
    """The first two random words of each sample."""
    key = NoiseKey(key.seed, key.sample_id, key.step, stream)
    return random_words(key, 1)[:, 0, :2].tolist()


def test_known_answers_of_philox(backend):
    # Random123's: counter and key all zeros, and all ones but for the element, which is 0 here.
    zeros = NoiseKey.of(0, 1, stream=0)
    assert draw_timesteps(zeros, 2**31).t.item() == 0x6627E8D5 >> 1
    assert draw_timesteps(zeros, 1000).t.item() == 1000 * 0x6627E8D5 >> 32


@pytest.mark.parametrize("T", [1, 10, 1000, 4000, 2**31])
def test_uniform_timesteps_are_the_first_word_scaled(backend, key, T):
    drawn = draw_timesteps(key, T)
    assert drawn.t.tolist() == [T * word >> 32 for word, _ in first_words(key)]
    assert torch.equal(drawn.weights, torch.ones(67)) and drawn.weights.dtype == torch.float32
    assert drawn.network_t is drawn.t and drawn.labels is None


@pytest.mark.parametrize(("T", "parts"), [(1000, 67), (10, 67), (4000, 3 * 67), (1000, 1), (2**31, 2**31)])
def test_parts_are_the_rule_in_exact_fractions(backend, key, T, parts):
    words, ids = first_words(key), key.sample_id.tolist()
    expected = [int(T * (i % parts + Fraction(word, 2**32)) / parts) for i, (word, _) in zip(ids, words, strict=True)]
    assert draw_timesteps(key, T, parts=parts).t.tolist() == expected


@pytest.mark.parametrize("T", [1, 5, 8, 1000])
def test_importance_is_the_inverse_of_the_cumulative_probability(backend, key, T):
    p = torch.rand(T, generator=torch.Generator().manual_seed(T), dtype=torch.float64) ** 4
    p[T // 2 :: 7] = 0.0
    p[0] = 0.01
    p /= p.sum()
    drawn = draw_timesteps(key, T, probabilities=p)
    sums = p.cumsum(0).numpy()
    u = np.array([(w0 * 2**21 + w1 // 2**11) / 2**53 for w0, w1 in first_words(key)])
    t = np.searchsorted(sums, u * sums[-1], side="right").clip(max=T - 1)
    assert drawn.t.tolist() == t.tolist()
    assert np.array_equal(drawn.weights.numpy(), (1 / (T * p.numpy()[t])).astype(np.float32))


def test_the_network_has_names_of_its_own(backend, key):
    names = torch.arange(0, 1000, 37)
    for options in ({}, {"parts": 67}, {"probabilities": torch.full((28,), 1 / 28, dtype=torch.float64)}):
        drawn = draw_timesteps(key, 28, network_timesteps=names, **options)
        assert drawn.network_t.tolist() == [37 * t for t in drawn.t.tolist()]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_labels_are_dropped_by_a_stream_of_their_own(backend, key, share):
    labels = torch.arange(67) % 10
    drawn = draw_timesteps(key, 1000, label_drop=LabelDrop(labels, share, 10))
    dropped = [word >> 8 < round(share * 2**24) for word, _ in first_words(key, Stream.LABEL)]
    assert drawn.labels.tolist() == [10 if drop else i % 10 for i, drop in enumerate(dropped)]
    assert torch.equal(drawn.t, draw_timesteps(key, 1000).t)
    assert torch.equal(labels, torch.arange(67) % 10)


def test_a_sample_draws_the_same_in_any_batch(backend, key):
    labels = torch.zeros(67, dtype=torch.int64)
    whole = draw_timesteps(key, 1000, parts=67, label_drop=LabelDrop(labels, 0.5, 1))
    part = NoiseKey(key.seed, key.sample_id[::3], key.step, key.stream)  # strided ids
    some = draw_timesteps(part, 1000, parts=67, label_drop=LabelDrop(labels[::3], 0.5, 1))
    assert all(torch.equal(a[::3], b) for a, b in zip(whole, some, strict=True))


def test_no_samples(backend):
    drawn = draw_timesteps(NoiseKey.of(0, 0), 10, label_drop=LabelDrop(torch.zeros(0, dtype=torch.int64), 0.1, 3))
    assert [x.shape for x in drawn] == [(0,)] * 4


def remembered(history, counts, t, losses):
    """The rule in a plain loop."""
    history, counts = history.clone(), counts.clone()
    for i, loss in zip(t.tolist(), losses.tolist(), strict=True):
        if np.isfinite(loss):
            history[i, counts[i] % history.shape[1]] = loss
            counts[i] += 1
    return history, counts


@pytest.mark.parametrize(("T", "slots", "n"), [(5, 10, 130), (300, 10, 64), (1, 3, 50), (7, 1, 20), (4, 10, 0)])
def test_losses_are_remembered_in_the_order_of_the_batch(backend, T, slots, n):
    generator = torch.Generator().manual_seed(T)
    history, counts = torch.zeros(T, slots), torch.randint(0, 100, (T,), generator=generator)
    for _ in range(3):
        t, losses = torch.randint(0, T, (n,), generator=generator), torch.rand(n, generator=generator)
        losses[::7], losses[3::11] = torch.nan, torch.inf
        expected = remembered(history, counts, t, losses)
        record_losses(history, counts, t, losses)
        assert torch.equal(history, expected[0]) and torch.equal(counts, expected[1])


def test_what_is_remembered_counts_as_a_change(backend):
    history, counts = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    before = history._version, counts._version
    record_losses(history, counts, torch.tensor([1]), torch.tensor([0.5]))
    assert history._version > before[0] and counts._version > before[1]


def test_a_timestep_outside_is_refused_with_nothing_changed(host_backend):
    history, counts = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    for wrong in (-1, 3):
        with pytest.raises(InputError, match=rf"record_losses: t\[1\] is {wrong}, outside the table's range 0..2"):
            record_losses(history, counts, torch.tensor([0, wrong]), torch.ones(2))
    assert not history.any() and not counts.any()


P = torch.full((4,), 0.25, dtype=torch.float64)
LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_timesteps": 0}, r"num_timesteps is 0; expected an integer in 1..2147483648"),
        ({"num_timesteps": 2**31 + 1}, r"num_timesteps is 2147483649"),
        ({"parts": -1}, r"parts is -1; expected an integer in 0"),
        ({"probabilities": P.float()}, r"probabilities is torch.float32 .* expected torch.float64 \[4\]"),
        ({"probabilities": P[:3]}, r"probabilities is torch.float64 of shape \(3,\)"),
        ({"probabilities": [0.25] * 4}, r"probabilities is a list; expected a tensor"),
        (
            {"network_timesteps": LABELS},
            r"network_timesteps is .*\(2,\); expected torch.int64 \[4\]",
        ),
        ({"label_drop": LabelDrop(LABELS.int(), 0.1, 3)}, r"labels is torch.int32"),
        ({"label_drop": LabelDrop(LABELS, 1.5, 3)}, r"1.5 of the labels are to be dropped; expected a share in"),
        ({"label_drop": LabelDrop(LABELS.to("meta"), 0.5, 3)}, r"labels is on meta and the NoiseKey on cpu"),
        ({"label_drop": LABELS}, r"label_drop is a Tensor; expected a LabelDrop"),
        ({"key": 3}, r"key is a int; expected a NoiseKey"),
    ],
)
def test_draws_that_are_refused(options, message):
    with pytest.raises(InputError, match=f"draw_timesteps: {message}"):
        draw_timesteps(**{"key": NoiseKey.of(0, 2), "num_timesteps": 4, **options})


def test_memory_that_is_shared_is_refused():
    numbers, losses = torch.zeros(4, dtype=torch.int64), torch.zeros(8)
    for counts, t, history, message in (
        (numbers[:3], numbers[2:], torch.zeros(3, 2), "t shares memory with counts"),
        (numbers[:3], LABELS, losses[:6].view(3, 2), "losses shares memory with history"),
    ):
        with pytest.raises(InputError, match=f"record_losses: {message}, which is written to"):
            record_losses(history, counts, t, losses[5:7])


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(3, 2).double(), r"history is torch.float64 .* expected contiguous float32 \[T, slots\]"),
        (0, torch.zeros(2, 3).T, r"history is torch.float32 of shape \(3, 2\) and strides \(1, 3\)"),
        (0, torch.zeros(3, 0), r"history is torch.float32 of shape \(3, 0\)"),
        (1, torch.zeros(3), r"counts is torch.float32 of shape \(3,\); expected torch.int64 \[3\]"),
        (1, torch.zeros(6, dtype=torch.int64)[::2], r"counts is not contiguous"),
        (2, torch.zeros(3, dtype=torch.int64), r"t is torch.int64 of shape \(3,\); expected torch.int64 \[2\]"),
        (3, torch.zeros(2).half(), r"losses is torch.float16"),
        (3, 3.0, r"losses is a float; expected a tensor"),
    ],
)
def test_records_that_are_refused(position, wrong, message):
    arguments = [torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), LABELS, torch.ones(2)]
    arguments[position] = wrong
    with pytest.raises(InputError, match=f"record_losses: {message}"):
        record_losses(*arguments)
