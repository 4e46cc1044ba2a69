"""The power-function average is compared with its closed form in float64, and its decays and exponents with EDM2's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_fast.errors import InputError
from ddpm_fast.nn.block import lay_out
from ddpm_fast.nn.power_average import PowerAverage, gamma_of, width_of
from tests.nn.test_reconstruction import STEPS, WIDTHS


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "edm2.npz") as file:
        return dict(file)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(3, 2))


def walk(net):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))


def test_exponents_are_those_of_edm2_and_lead_back_to_their_widths(golden):
    np.testing.assert_allclose([gamma_of(width) for width in WIDTHS], golden["exponents"], rtol=1e-10, atol=1e-10)
    for width in WIDTHS:
        assert width_of(gamma_of(width)) == pytest.approx(width, rel=1e-12)


def test_the_width_is_the_standard_deviation_of_the_profile():
    """Of tau^gamma on [0, 1], by the midpoint rule."""
    tau = (np.arange(10**5) + 0.5) / 10**5
    for gamma in (0.2, 3.0, 17.0):
        share = tau**gamma / (tau**gamma).sum()
        mean = share @ tau
        assert width_of(gamma) == pytest.approx(np.sqrt(share @ (tau - mean) ** 2), rel=1e-6)


def test_updates_weigh_what_edm2s_do(golden):
    for column, width in enumerate(WIDTHS):
        average = PowerAverage(model(), width)
        for row, step in enumerate(STEPS):
            (weight,) = average._share(step - 1, torch.device("cpu"))[None].double().tolist()
            assert weight == pytest.approx(1 - golden["decays"][row, column], rel=1e-6), (width, step)


@pytest.mark.parametrize("in_block", [False, True], ids=["apart", "in one block"])
@pytest.mark.parametrize("width", [0.05, 0.1, 0.28])
def test_against_the_closed_form_in_float64(width, in_block):
    """Weights of step tau count for (tau^(gamma+1) - (tau-1)^(gamma+1)) / t^(gamma+1), the initial ones for nothing."""
    net, steps = model(), 60
    if in_block:
        lay_out(net)
    average, history = PowerAverage(net, width), []
    for step in range(steps):
        walk(net)
        average.update(step)
        history.append({name: p.detach().double().clone() for name, p in net.named_parameters()})
    edges = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** (gamma_of(width) + 1)
    for name, value in average.state_dict().items():
        stacked = torch.stack([weights[name] for weights in history])
        expected = (edges.diff().view(-1, *(1,) * value.dim()) * stacked).sum(0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_step_in_a_tensor_counts_as_the_number_does_and_what_is_kept_stays_bit_for_bit():
    net, step = model(), torch.tensor(0)
    by_number, by_tensor = PowerAverage(net, 0.1), PowerAverage(net, 0.1)
    for number in [*range(5), 10**6]:
        walk(net)
        by_number.update(number)
        by_tensor.update(step.fill_(number), torch.tensor(False))
        before = {name: value.clone() for name, value in by_tensor.state_dict().items()}
        for name, value in by_number.state_dict().items():
            assert torch.equal(value, before[name]), (number, name)
        walk(net)
        by_tensor.update(step, torch.tensor(True))
        assert all(torch.equal(value, before[name]) for name, value in by_tensor.state_dict().items())


@pytest.mark.parametrize("width", [0, 0.0005, 0.289, -0.1, float("nan"), "0.1", True])
def test_bad_width(width):
    with pytest.raises(InputError, match=r"expected a width from 0.001 to 0.288"):
        PowerAverage(model(), width)
