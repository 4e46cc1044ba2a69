"""How training draws its timesteps, compared with the rules in plain Python, with exact expectations, and with what the
whole batch would draw."""

from collections import deque
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from support.recording import NoSync

from ddpm_fast.errors import InputError
from ddpm_fast.loops.timesteps import TIMESTEP_SAMPLINGS, LossSecondMoment, Stratified, Uniform
from ddpm_fast.noise import NoiseKey, Stream, random_words, uniform_integers

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def key(n, first=0, seed=7, device="cpu"):
    return NoiseKey.of(seed, n, first_sample_id=first, stream=Stream.TIMESTEP, device=device)


def warmed(losses, rounds=10):
    """A LossSecondMoment whose every t has had the loss losses[t], `rounds` times."""
    sampler = LossSecondMoment(len(losses))
    for _ in range(rounds):
        sampler.update(torch.arange(len(losses)), losses)
    return sampler


def test_uniform_draws_are_the_noise_streams_integers():
    t, weights, *_ = Uniform(1000).sample(key(64, first=128))
    assert torch.equal(t, uniform_integers(key(64, first=128), 1000))
    words = random_words(key(64, first=128), 1)[:, 0, 0].tolist()
    assert t.tolist() == [1000 * word // 2**32 for word in words]
    assert torch.equal(weights, torch.ones(64)) and weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("T", "n", "first"),
    [
        pytest.param(1000, 8, 0, id="N divides T"),
        pytest.param(1000, 8, 80, id="a later batch"),
        pytest.param(1000, 7, 0, id="N does not divide T"),
        pytest.param(4000, 4096, 0, id="more samples than timesteps"),
        pytest.param(10, 64, 0, id="several of each timestep"),
        pytest.param(1000, 8, 3, id="ids begin inside a batch"),
        pytest.param(1000, 1, 5, id="a batch of one"),
        pytest.param(4000, 64, 2**50, id="a long run"),
    ],
)
def test_stratified_is_the_rule_in_exact_fractions(T, n, first):
    t, weights, *_ = Stratified(T).sample(key(n, first))
    words = random_words(key(n, first), 1)[:, 0, 0].tolist()
    expected = [int(T * ((first + j) % n + Fraction(word, 2**32)) / n) for j, word in enumerate(words)]
    assert t.tolist() == expected
    assert torch.equal(weights, torch.ones(n))


@pytest.mark.parametrize(("T", "n"), [(1000, 8), (1000, 1000), (12, 4)])
def test_stratified_has_one_timestep_in_each_stratum(T, n):
    for step in range(20):
        t, *_ = Stratified(T).sample(key(n, first=step * n))
        assert sorted((t // (T // n)).tolist()) == list(range(n))


@pytest.mark.parametrize("kind", [Uniform, Stratified, LossSecondMoment])
@pytest.mark.parametrize("n", [8, 64, 7])
def test_every_timestep_is_as_likely(kind, n):
    T, batches = 20, 8000 // n
    drawn = torch.cat([kind(T).sample(key(n, first=step * n)).t for step in range(batches)])
    assert scipy.stats.chisquare(np.bincount(drawn, minlength=T)).pvalue > 1e-4


def test_stratified_batches_vary_less():
    f = torch.linspace(0, 1, 1000).square()
    means = {
        kind: torch.stack([f[kind(1000).sample(key(16, first=16 * k)).t].mean() for k in range(300)])
        for kind in (Uniform, Stratified)
    }
    for values in means.values():
        assert abs(values.mean() - f.mean()) < 5 * values.std() / 300**0.5
    assert means[Stratified].var() < means[Uniform].var() / 50  # of order 1/N^2


def test_importance_probabilities_are_the_published_rule():
    # [N eq. 18] with a plain loop: p_t ~ sqrt(mean of the last 10 squared losses), 0.1% of it uniform.
    T, rng = 6, np.random.default_rng(0)
    sampler, remembered, kinds = LossSecondMoment(T), [deque(maxlen=10) for _ in range(T)], set()
    for n in [0, 1, 5, 16, 16, 40, 40, 100, 3, 200, 16, 16]:  # 100 and 200 of 6 timesteps: more than 10 of each
        t, losses = rng.integers(0, T, n), rng.lognormal(0, 2, n).astype(np.float32)
        losses[::7] = rng.choice([np.nan, np.inf, -np.inf], len(losses[::7]))
        sampler.update(torch.from_numpy(t), torch.from_numpy(losses))
        for which, loss in zip(t, losses, strict=True):
            if np.isfinite(loss):
                remembered[which].append(float(loss))

        if min(map(len, remembered)) < 10:
            p = np.full(T, 1 / T)
        else:
            p = np.array([np.sqrt(sum(loss**2 for loss in losses) / 10) for losses in remembered])
            p = p / p.sum() * (1 - 0.001) + 0.001 / T
        kinds.add(len(set(p)) > 1)
        found = sampler.probabilities()
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found, p, rtol=1e-12)
        for ring, losses in zip(sampler.history, remembered, strict=True):
            assert sorted(ring[: len(losses)].tolist()) == sorted(losses)
    assert kinds == {True, False}


def test_importance_draws_are_the_inverse_of_the_cumulative_probability():
    sampler = warmed(torch.tensor([0.1, 5.0, 0.0, 1.0, 0.3]))
    t, weights, *_ = sampler.sample(key(500))
    p = sampler.probabilities().tolist()
    for drawn, weight, (word0, word1, _, _) in zip(t, weights, random_words(key(500), 1)[:, 0].tolist(), strict=True):
        u = Fraction(word0 * 2**21 + word1 // 2**11, 2**53)
        expected = next(k for k in range(5) if u < sum(map(Fraction, p[: k + 1])))
        assert drawn == expected
        assert weight.item() == pytest.approx(1 / (5 * p[expected]), rel=1e-6)


def test_uniform_until_every_timestep_has_ten_losses():
    sampler = warmed(torch.tensor([1.0, 2.0, 3.0, 4.0]), rounds=9)
    sampler.update(torch.tensor([0, 1, 3, 3]), torch.tensor([1.0, 2.0, 4.0, 4.0]))  # t = 2 still has nine
    assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    assert torch.equal(sampler.sample(key(100)).weights, torch.ones(100))
    sampler.update(torch.tensor([2]), torch.tensor([3.0]))
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) / 10 * 0.999 + 0.001 / 4
    torch.testing.assert_close(sampler.probabilities(), expected, rtol=1e-14, atol=0)


def test_losses_that_are_all_zero_leave_it_uniform():
    weights = warmed(torch.zeros(5)).sample(key(100)).weights
    torch.testing.assert_close(weights, torch.ones(100), rtol=1e-6, atol=0)


SKEWED = torch.exp(torch.linspace(3, -6, 50))  # as the bound's terms: most of it in a few timesteps


def test_weighted_expectation_is_the_uniform_one():
    sampler = warmed(SKEWED)
    p = sampler.probabilities()
    t, weights, *_ = sampler.sample(key(200_000))
    weight_of = torch.full((50,), float("nan"), dtype=torch.float64).scatter_(0, t, weights.double())
    f = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Exactly: the draws' weights, their probabilities, any f.
    torch.testing.assert_close((p * weight_of * f).sum(), f.mean(), rtol=1e-6, atol=1e-8)
    # And as drawn.
    values = weights.double() * f[t]
    assert abs(values.mean() - f.mean()) < 5 * values.std() / 200_000**0.5
    assert scipy.stats.chisquare(np.bincount(t, minlength=50), 200_000 * p.numpy()).pvalue > 1e-4


def test_importance_estimates_skewed_losses_with_less_variance():
    noisy = SKEWED * torch.empty(4000, 50).uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    sampler = LossSecondMoment(50)
    for row in noisy[:10]:
        sampler.update(torch.arange(50), row)
    rows = torch.arange(4000)
    t, weights, *_ = sampler.sample(key(4000))
    estimates, plain = weights * noisy[rows, t], noisy[rows, Uniform(50).sample(key(4000)).t]
    assert abs(estimates.mean() - SKEWED.mean()) < 5 * estimates.std() / 4000**0.5
    assert estimates.var() < plain.var() / 20


@pytest.mark.parametrize("name", TIMESTEP_SAMPLINGS)
def test_state_continues_bit_for_bit(name):
    sampler, generator = TIMESTEP_SAMPLINGS[name](8), torch.Generator().manual_seed(0)

    def train(sampler, steps):
        generator.manual_seed(steps.start)
        out = []
        for step in steps:
            t, weights, *_ = sampler.sample(key(16, first=16 * step))
            sampler.update(t, torch.rand(16, generator=generator) * (t + 1))
            out += [t, weights]
        return torch.stack([x.double() for x in out])

    train(sampler, range(20))
    resumed = TIMESTEP_SAMPLINGS[name](8)
    resumed.load_state_dict({k: v.clone() for k, v in sampler.state_dict().items()})
    assert torch.equal(train(resumed, range(20, 30)), train(sampler, range(20, 30)))
    if name == "loss_second_moment":
        assert (sampler.counts >= 10).all()
        assert {k: v.dtype for k, v in sampler.state_dict().items()} == {
            "history": torch.float32,
            "counts": torch.int64,
        }


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (LossSecondMoment(9).state_dict(), r"\[9, 10\].*expected.*\[8, 10\].*number of timesteps"),
        ({}, "is empty; expected"),
        ({**LossSecondMoment(8).state_dict(), "counts": torch.zeros(8)}, "counts.*float32.*expected.*int64"),
    ],
    ids=["another T", "of uniform sampling", "another dtype"],
)
def test_foreign_state_is_refused_with_nothing_changed(saved, expected):
    sampler = warmed(torch.arange(8.0))
    before = sampler.history.clone()
    with pytest.raises(InputError, match=expected):
        sampler.load_state_dict(saved)
    assert torch.equal(sampler.history, before)
    with pytest.raises(InputError, match=r"history.*expected none"):
        Uniform(8).load_state_dict(sampler.state_dict())


def test_no_timesteps():
    with pytest.raises(InputError, match="num_timesteps is 0; expected at least 1"):
        LossSecondMoment(0)


@pytest.mark.parametrize("name", TIMESTEP_SAMPLINGS)
def test_empty_batch(name):
    sampler = TIMESTEP_SAMPLINGS[name](8)
    t, weights, *_ = sampler.sample(key(0))
    sampler.update(t, weights)
    assert t.shape == weights.shape == (0,) and t.dtype == torch.int64


@pytest.mark.parametrize(
    "read",
    [lambda x: x.item(), lambda x: int(x), lambda x: bool(x), lambda x: x[x > 0], lambda x: x.nonzero()],
    ids=["item", "int", "bool", "mask", "nonzero"],
)
def test_the_guard_against_reading_back_works(read):
    with pytest.raises(RuntimeError, match="waits for the device"), NoSync():
        read(torch.ones(()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TIMESTEP_SAMPLINGS)
def test_nothing_waits_for_the_device(name, device):
    sampler, k = TIMESTEP_SAMPLINGS[name](4, device), key(64, device=device)
    losses = torch.rand(64, device=device)
    losses[3] = float("nan")
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoSync():
            for _ in range(3):  # past the first ten losses of each
                t, *_ = sampler.sample(k)
                sampler.update(t, losses)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert t.device.type == device
    if name == "loss_second_moment":
        assert len(set(sampler.probabilities().tolist())) == 4


def run(sampler, parts):
    """Twelve steps of 16 samples, drawn in so many parts: the draws and the final state."""
    size, draws = 16 // parts, []
    for step in range(12):
        drawn = [sampler.sample(key(size, first=16 * step + part * size)) for part in range(parts)]
        t, weights = (torch.cat([getattr(one, name) for one in drawn]) for name in ("t", "weights"))
        sampler.update(t, (t + 1.0) * weights.sqrt())
        draws.append(torch.stack([t.double(), weights.double()]))
    return torch.stack(draws), sampler.state_dict()


@pytest.mark.parametrize("name", TIMESTEP_SAMPLINGS)
def test_the_parts_of_a_batch_draw_what_the_batch_would(name):
    """The parts are micro-batches, or those of several processes (test_distributed.py)."""
    draws, state = run(TIMESTEP_SAMPLINGS[name](4), 1)
    for parts in (2, 8):
        in_parts = run(TIMESTEP_SAMPLINGS[name](4, batch_size=16), parts)
        assert torch.equal(in_parts[0], draws)
        assert all(torch.equal(in_parts[1][entry], state[entry]) for entry in state)
    if name == "loss_second_moment":
        assert (state["counts"] >= 10).all() and not torch.equal(draws[:, 1], torch.ones(12, 16).double())
