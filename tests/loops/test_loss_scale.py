"""The loss scale of fp16 beside torch.amp.GradScaler, what a skipped step must leave alone, and when to give up."""

import copy
import itertools
import math

import pytest
import torch
from support.recording import NoSync
from torch import nn

from ddpm_fast.errors import InputError
from ddpm_fast.loops import loss_scale as module
from ddpm_fast.loops.loss_scale import LossScale
from ddpm_fast.loops.metrics import MOST_SKIPPED, Metrics, NonFiniteLoss

CPU = torch.device("cpu")
CLIP = 0.05


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 3))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)


def batches(count, bad=()):
    """Inputs; where the step is bad, some so large that the scaled gradient overflows fp16 and the loss does not."""
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        yield torch.randn(8, 6, generator=generator) * (300.0 if i in bad else 1.0)


def loss_of(model, x):
    with torch.autocast("cpu", torch.float16):
        return model(x).float().square().mean()


def test_scales_and_weights_are_those_of_torchs_grad_scaler(monkeypatch):
    """Growth every 5 steps, overflows in between, clipping in force: step by step beside GradScaler."""
    monkeypatch.setattr(module, "GROWTH_INTERVAL", 5)
    ours, theirs = network(), network()
    our_optimizer, their_optimizer = adamw(ours), adamw(theirs)
    scale = LossScale(CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=module.FIRST, growth_interval=5)
    scales, clipped = [], 0
    for x in batches(30, bad=(0, 3, 14, 15)):
        our_optimizer.zero_grad()
        scale.backward(loss_of(ours, x))
        gradient = scale.clip(ours.parameters(), CLIP)
        scale.step(our_optimizer, gradient)

        their_optimizer.zero_grad()
        scaler.scale(loss_of(theirs, x)).backward()
        scaler.unscale_(their_optimizer)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        scaler.step(their_optimizer)
        scaler.update()

        assert scale.scale.item() == scaler.get_scale()
        assert bool(gradient.overflowed) == (not math.isfinite(norm))
        if math.isfinite(norm):
            torch.testing.assert_close(gradient.norm, norm, rtol=1e-5, atol=0)
            clipped += norm.item() > CLIP
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        scales.append(scale.scale.item())
    assert len(set(scales)) >= 3 and any(b > a for a, b in itertools.pairwise(scales))
    assert clipped, "clipping was never in force"


def test_an_overflow_leaves_weights_and_moments_and_their_counts_as_they_were():
    model = network()
    optimizer, scale = adamw(model), LossScale(CPU)
    for x in batches(2):
        optimizer.zero_grad()
        scale.backward(loss_of(model, x))
        scale.step(optimizer, scale.clip(model.parameters(), 1.0))
    before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()["state"]))
    optimizer.zero_grad()
    scale.backward(loss_of(model, next(batches(1, bad=(0,)))))
    gradient = scale.clip(model.parameters(), 1.0)
    assert gradient.overflowed and not gradient.norm.isfinite()
    scale.step(optimizer, gradient)
    assert scale.scale == module.FIRST / 2 and scale.good_steps == 0
    for a, b in zip(before[0], model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], before[1][name][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert "found_inf" not in vars(optimizer)  # or a later step without a scale would hear it


def test_nothing_waits_for_the_device():
    model = network()
    optimizer, scale = adamw(model), LossScale(CPU)
    loss = loss_of(model, next(batches(1)))
    with NoSync():
        scale.backward(loss)
        scale.step(optimizer, scale.clip(model.parameters(), 1.0))


def test_the_scale_stays_finite(monkeypatch):
    monkeypatch.setattr(module, "GROWTH_INTERVAL", 1)
    model = nn.Linear(2, 2)
    optimizer, scale = adamw(model), LossScale(CPU)
    for _ in range(130):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        scale.step(optimizer, scale.clip(model.parameters(), 1.0))
    assert scale.scale.isfinite() and scale.scale > 2.0**100


@pytest.mark.parametrize(
    "state",
    [
        {"scale": torch.tensor(1.0)},
        {"scale": torch.tensor(1.0), "good_steps": torch.tensor(3.0)},
        {"scale": torch.tensor([1.0]), "good_steps": torch.tensor(3)},
        {"scale": torch.tensor(math.nan), "good_steps": torch.tensor(3)},
        {"scale": torch.tensor(-1.0), "good_steps": torch.tensor(3)},
        {"scale": torch.tensor(1.0), "good_steps": torch.tensor(-3)},
    ],
    ids=["incomplete", "of another dtype", "of another shape", "NaN", "negative", "of a negative count"],
)
def test_a_saved_scale_that_is_none_is_refused(state):
    scale = LossScale(CPU)
    with pytest.raises(InputError, match="the saved loss scale is"):
        scale.load_state_dict(state)
    assert scale.scale == module.FIRST and scale.good_steps == 0


# The metrics


def look(norms, losses=None):
    metrics = Metrics(step=10, scaled=True)
    for norm, loss in zip(norms, losses or [1.0] * len(norms), strict=True):
        metrics.add(torch.tensor(loss), torch.tensor(norm))
    return metrics.look(wait=True)[0]


def test_skipped_steps_are_counted_and_left_out_of_the_mean_norm():
    found = look([1.0, math.inf, 3.0, math.nan])
    assert (found.step, found.steps, found.norm, found.skipped) == (14, 4, 2.0, 2)
    assert math.isnan(look([math.inf]).norm)


def test_a_loss_that_is_not_finite_stops_a_scaled_training_too():
    with pytest.raises(NonFiniteLoss, match="step 12 gave the loss nan and the gradient norm nan") as caught:
        look([1.0, math.nan, 1.0], [1.0, math.nan, 1.0])
    assert caught.value.weights_of == 11


def test_a_gradient_that_overflows_at_every_scale_stops_the_training():
    assert look([math.inf] * MOST_SKIPPED).skipped == MOST_SKIPPED
    with pytest.raises(NonFiniteLoss, match=f"like {MOST_SKIPPED} training steps before it"):
        look([math.inf] * (MOST_SKIPPED + 1))
    look(([math.inf] * MOST_SKIPPED + [1.0]) * 2)  # what comes in between begins a new count
