"""The moving average of weights is compared with its closed form in float64; its warm-up; its errors."""

import math

import pytest
import torch
from torch import nn

from ddpm_fast.errors import InputError
from ddpm_fast.nn.ema import EMA


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(3, 2)).to(dtype)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999], ids=["copy", "capped early", "capped late", "warming up"])
def test_against_the_closed_form_in_float64(decay):
    """shadow_n = sum_k p_k (1 - d_k) prod_{j>k} d_j + p_init prod_j d_j."""
    net = model()
    ema = EMA(net, decay)
    history = [{name: p.detach().double().clone() for name, p in net.named_parameters()}]
    decays = []
    for step in range(100):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
        ema.update(step)
        history.append({name: p.detach().double().clone() for name, p in net.named_parameters()})
        decays.append(min(decay, (1 + step) / (10 + step)))
    weights = [math.prod(decays)] + [(1 - d) * math.prod(decays[k + 1 :]) for k, d in enumerate(decays)]
    assert sum(weights) == pytest.approx(1)
    for name, shadow in ema.state_dict().items():
        expected = sum(w * values[name] for w, values in zip(weights, history, strict=True))
        torch.testing.assert_close(shadow.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999], ids=["copy", "capped early", "warming up"])
def test_a_step_in_a_tensor_counts_as_the_number_does_bit_for_bit(decay):
    net, step = model(), torch.tensor(0)
    by_number, by_tensor = EMA(net, decay), EMA(net, decay)
    for number in [*range(30), 10**6, 2**53 + 1]:
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
        by_number.update(number)
        by_tensor.update(step.fill_(number))
        for name, shadow in by_number.state_dict().items():
            assert torch.equal(shadow, by_tensor.state_dict()[name]), (number, name)


def test_parameters_whose_memory_format_changed_since():
    """The average and the parameter then differ in their strides."""
    net = model()
    ema = EMA(net, 0.5)
    before = {name: v.clone() for name, v in ema.state_dict().items()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    net.to(memory_format=torch.channels_last)
    assert net[0].weight.stride() != before["0.weight"].stride()
    live = {name: p.detach().clone() for name, p in net.named_parameters()}
    ema.update(10**6)
    for name, p in net.named_parameters():
        torch.testing.assert_close(ema.state_dict()[name], (before[name] + p.detach()) / 2)
        assert torch.equal(p, live[name])


def test_pitfall_ema_of_0_9999_from_step_0_is_noise_for_10k_steps():
    """Weights that are 1 after an initial 0: warmed up, the average has forgotten the start at once; at a
    fixed decay 37% of it is left after 10,000 steps.
    """
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = EMA(net, 0.9999)
    nn.init.ones_(net.weight)
    for step in range(1000):
        ema.update(step)
    assert 1 - ema.state_dict()["weight"].item() < 1e-5
    assert pytest.approx(0.368, abs=1e-3) == 0.9999**10_000
    assert ema.decay_at(0) == 0.1
    assert ema.decay_at(10**6) == 0.9999


def test_bf16_weights_are_averaged_in_fp32():
    """A step of 1e-4 of the difference is lost in bf16's 8 bits."""
    net = model(torch.bfloat16)
    ema = EMA(net, 0.9999)
    before = {name: v.clone() for name, v in ema.state_dict().items()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    ema.update(10**6)
    for name, p in net.named_parameters():
        shadow = ema.state_dict()[name]
        assert shadow.dtype == torch.float32
        expected = before[name] + 1e-4 * (p.detach().float() - before[name])
        torch.testing.assert_close(shadow, expected, rtol=1e-6, atol=1e-7)


def test_shadows_are_not_the_model_and_named_as_in_it():
    net = model().to(memory_format=torch.channels_last)
    ema = EMA(net)
    before = {name: v.clone() for name, v in ema.state_dict().items()}
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert set(before) == set(dict(net.named_parameters())) <= set(net.state_dict())
    assert all(torch.equal(ema.state_dict()[name], value) for name, value in before.items())
    assert ema.state_dict()["0.weight"].stride() == net[0].weight.stride()
    assert not any(v.requires_grad for v in ema.state_dict().values())


def test_copy_to_and_round_trip():
    net = model()
    ema = EMA(net)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    ema.update(50)
    fresh = EMA(model(torch.bfloat16))
    fresh.load_state_dict(ema.state_dict())
    target = model(torch.bfloat16)
    fresh.copy_to(target)
    for name, p in target.named_parameters():
        assert p.requires_grad
        assert torch.equal(p, ema.state_dict()[name].bfloat16())
    ema.update(51)  # the loaded one keeps its own values
    assert not torch.equal(fresh.state_dict()["0.weight"], ema.state_dict()["0.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda s: s.pop("0.weight"), "lacks parameter.* 0.weight", id="missing"),
        pytest.param(lambda s: s.update(extra=torch.zeros(1)), "unknown parameter.* extra", id="unknown"),
        pytest.param(
            lambda s: s.update({"2.bias": torch.zeros(5)}),
            r"2.bias of shape \[5\], the average \[2\]",
            id="shape",
        ),
    ],
)
def test_a_state_of_another_model_changes_nothing(change, message):
    ema = EMA(model())
    before = {name: v.clone() for name, v in ema.state_dict().items()}
    state = {name: v + 1 for name, v in before.items()}
    change(state)
    with pytest.raises(InputError, match=message):
        ema.load_state_dict(state)
    assert all(torch.equal(ema.state_dict()[name], value) for name, value in before.items())


def test_copy_to_another_model():
    with pytest.raises(InputError, match=r"the model has 0.weight of shape"):
        EMA(model()).copy_to(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(3, 2)))


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_bad_decay(decay):
    with pytest.raises(InputError, match=r"expected a number in \[0, 1\)"):
        EMA(model(), decay)
