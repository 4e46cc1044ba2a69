"""The loss by quarter of t, of training steps and of held-out images, against loops in float64."""

import math

import pytest
import torch
from support import two_ranks
from support.recording import recorded

import ddpm_fast as df
from ddpm_fast.data import Dataset, split_held_out
from ddpm_fast.loops import training_step
from ddpm_fast.loops.held_out import EVALUATIONS, evaluate_losses, mean_loss, plan
from ddpm_fast.loops.metrics import Metrics
from ddpm_fast.noise import NoiseKey, Stream, normals

STEPS = 6
TRAININGS = {
    "uniform": {},
    "micro-batches, importance sampling": {
        "timestep_sampling": "loss_second_moment",
        "diffusion": two_ranks.SHORT,
        "micro_batch": 2,
    },
    "stratified, replayed": {"timestep_sampling": "stratified", "cuda_graph": None},
}


def means(batches, T):
    """The mean loss of each quarter: a loop over the samples."""
    sums, weights = [0.0] * 4, [0.0] * 4
    for t, losses, w in batches:
        for each_t, loss, weight in zip(t.tolist(), losses.double().tolist(), w.double().tolist(), strict=True):
            sums[int(4 * each_t / T)] += weight * loss
            weights[int(4 * each_t / T)] += weight
    return [total / weight if weight else math.nan for total, weight in zip(sums, weights, strict=True)]


@pytest.mark.parametrize("name", ["uniform", "micro-batches, importance sampling"])
def test_the_training_loss_by_quarter_is_that_of_a_loop_over_the_samples(monkeypatch, name):
    seen, by_quarter = [], training_step.by_quarter
    monkeypatch.setattr(
        training_step,
        "by_quarter",
        lambda t, losses, weights, table: (
            seen.append([t.clone(), losses.clone(), weights.clone()]),
            by_quarter(t, losses, weights, table),
        )[1],
    )
    subject = two_ranks.trainer(**TRAININGS[name])
    metrics, steps = Metrics(0), 15 if name != "uniform" else STEPS  # importance sampling begins after 10 of each t
    for _ in range(steps):
        loss, norm = subject.train_step()
        metrics.add(loss, norm, subject.quarters)
    (look,) = metrics.look(wait=True)
    expected = means(seen, subject.diffusion.num_timesteps)
    assert len(seen) == steps * (4 if "micro" in name else 1) and look.steps == steps
    torch.testing.assert_close(torch.tensor(look.quarters), torch.tensor(expected), rtol=1e-5, atol=0)
    if name == "uniform":
        assert len({round(value, 3) for value in look.quarters}) == 4, "all quarters were alike"
    else:
        assert any((weights != 1).any() for _, _, weights in seen), "the draws were still uniform"


def test_replayed_steps_say_the_same_and_do_not_overwrite_it():
    with recorded():
        replayed = two_ranks.trainer(**TRAININGS["stratified, replayed"])
        found = [two_ranks.numbers_of(replayed) for _ in range(STEPS)]
    eager = two_ranks.trainer(timestep_sampling="stratified")
    for numbers in found:
        assert torch.equal(numbers, two_ranks.numbers_of(eager))
    assert len({tuple(numbers[2:].tolist()) for numbers in found}) == STEPS
    # Of the 8 samples of a batch, two are in each quarter.
    assert all(numbers[6:].tolist() == [2.0] * 4 for numbers in found)


def test_a_quarter_that_no_t_was_drawn_of_has_no_mean():
    table = training_step.quarters_of(8, torch.device("cpu"))
    assert table.argmax(1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and table.sum() == 8
    metrics = Metrics(0)
    for t in (1, 4):
        ones = torch.ones(1)
        sums = training_step.by_quarter(torch.tensor([t]), 3.0 * ones, ones, table)
        metrics.add(torch.tensor(3.0), torch.tensor(1.0), sums)
    (look,) = metrics.look(wait=True)
    assert look.quarters[0] == look.quarters[2] == 3.0 and math.isnan(look.quarters[1]) and math.isnan(look.quarters[3])


@pytest.mark.parametrize("T", [3, 100, 1000])
@pytest.mark.parametrize("n", [7, 512, 700])
def test_the_plan_uses_all_timesteps_and_images_evenly(n, T):
    places, t = plan(n, T, seed=1)
    counts = torch.bincount(t, minlength=T)
    assert counts.max() - counts.min() <= 1 and len(t) == len(places) == EVALUATIONS
    used = torch.bincount(places, minlength=n)
    assert used.max() - used.min() <= 1
    assert not torch.equal(plan(n, T, seed=2)[0], places)
    # An image and its timestep have nothing to do with each other: 512 pairs correlate by 0.044 at random.
    assert abs(torch.corrcoef(torch.stack([places.double(), t.double()]))[0, 1]) < 0.2


@pytest.mark.parametrize("classes", [0, 3])
def test_the_held_out_loss_is_that_of_a_float64_loop(classes):
    """Written with the formulas of Ho et al. 2020, eq. 4 and 14."""
    schedule = df.Schedule.linear(100)
    diffusion = df.GaussianDiffusion(schedule, prediction="eps")
    network = df.UNetConfig(
        image_size=8, in_channels=1, model_channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4,
        attention_resolutions=(), num_classes=classes, dropout=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = df.UNet(network)
    with torch.no_grad():
        for parameter in model.parameters():  # the last layer begins with zeros
            parameter.add_(0.05 * torch.randn_like(parameter))
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    _, held_out = split_held_out(Dataset(images, torch.arange(40) % 3, None, "noise"), 11)
    parts = [evaluate_losses(model.train(), diffusion, held_out, slice(a, b), 5) for a, b in ((0, 200), (200, 512))]
    assert model.training
    found = mean_loss(torch.cat(parts), 100)

    places, t = plan(11, 100, 5)
    eps = normals(NoiseKey.of(5, 512, stream=Stream.EVALUATION), 64).double().view(512, 1, 8, 8)
    x0 = held_out.images[places].double() / 127.5 - 1
    bar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
    with torch.no_grad():
        predicted = model.double().eval()(x_t, t, *([held_out.labels[places]] if classes else []))
    losses = [(each - noise).square().mean().item() for each, noise in zip(predicted, eps, strict=True)]
    assert found.loss == pytest.approx(sum(losses) / 512, rel=1e-5)
    ones = torch.ones(512)
    expected = means([(t, torch.tensor(losses, dtype=torch.float64), ones)], 100)
    assert found.quarters == pytest.approx(expected, rel=1e-5)


def test_a_quarter_without_timesteps_has_no_held_out_loss():
    found = mean_loss(torch.arange(512.0), 2)
    assert [math.isnan(quarter) for quarter in found.quarters] == [False, True, False, True]
    assert found.quarters[0] == 127.5 and found.quarters[2] == 383.5 and found.loss == 255.5
