"""Objective's tables against the equations, written out here in float64, and against the papers' code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.objective import Objective
from ddpm_fast.schedule import Schedule

GOLDEN = Path(__file__).parent / "golden"
SCHEDULES = [
    Schedule.linear(1000),
    Schedule.cosine(1000),
    Schedule.cosine(4000).respace(50),
    Schedule.cosine(1),
]


@pytest.fixture(params=SCHEDULES, ids=lambda s: s.name)
def schedule(request) -> Schedule:
    return request.param


def test_eps_target_is_the_noise(schedule):
    c_x0, c_noise, weight = Objective(prediction="eps").loss_table(schedule).unbind(1)
    assert (c_x0 == 0).all() and (c_noise == 1).all() and (weight == 1).all()


def test_v_target_is_the_definition(schedule):
    c_x0, c_noise, weight = Objective(prediction="v").loss_table(schedule).unbind(1)
    torch.testing.assert_close(c_x0, -((1 - schedule.alphas_cumprod) ** 0.5), rtol=1e-15, atol=0)
    torch.testing.assert_close(c_noise, schedule.alphas_cumprod**0.5, rtol=1e-15, atol=0)
    assert (weight == 1).all()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_target_gives_back_x0_and_eps(prediction, schedule):
    """x_0 -> target -> x_0 -> eps, all in float64."""
    objective = Objective(prediction)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, len(schedule), 16, dtype=torch.float64, generator=generator)
    ab = schedule.alphas_cumprod[:, None]
    x_t = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    c_x0, c_noise, _ = objective.loss_table(schedule)[:, :, None].unbind(1)
    a_x, a_out = objective.x0_table(schedule)[:, :, None].unbind(1)
    again = a_x * x_t + a_out * (c_x0 * x0 + c_noise * eps)
    # x_0 from eps is a difference of numbers up to sqrt(1/alpha_bar_T) = 81,165 times larger; from v not.
    condition = schedule.sqrt_recip_alphas_cumprod[:, None] if prediction == "eps" else 1.0
    assert ((again - x0).abs() / condition).max() < 5e-15
    if prediction == "v":
        eps_again = ab.sqrt() * (c_x0 * x0 + c_noise * eps) + (1 - ab).sqrt() * x_t
        torch.testing.assert_close(eps_again, eps, rtol=0, atol=5e-15)


def test_the_largest_x0_coefficient_of_eps_survives_in_float64():
    a_x, a_out = Objective("eps").x0_table(Schedule.cosine(1000))[-1].tolist()
    assert round(a_x) == 20_291
    assert a_x**2 - a_out**2 == pytest.approx(1, rel=1e-6)  # 1/ab - (1/ab - 1)


@pytest.mark.parametrize("kind, T", [("linear", 1000), ("cosine", 1000), ("cosine", 4000)])
def test_fixed_small_is_the_posterior_variance(kind, T):
    golden = np.load(GOLDEN / "schedules.npz")
    table = Objective(variance="fixed_small").variance_table(getattr(Schedule, kind)(T)).numpy()
    np.testing.assert_allclose(table[:, 0], golden[f"{kind}_{T}/posterior_variance"], rtol=1e-12)
    np.testing.assert_allclose(table[:, 1], golden[f"{kind}_{T}/posterior_log_variance_clipped"], rtol=1e-12)


@pytest.mark.parametrize("kind, T", [("linear", 1000), ("cosine", 1000), ("cosine", 4000)])
def test_fixed_large_is_beta_with_the_posterior_variance_of_1_at_0(kind, T):
    golden = np.load(GOLDEN / "schedules.npz")
    table = Objective(variance="fixed_large").variance_table(getattr(Schedule, kind)(T)).numpy()
    expected = golden[f"{kind}_{T}/betas"].copy()
    expected[0] = golden[f"{kind}_{T}/posterior_variance"][1]
    np.testing.assert_allclose(table[:, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(table[:, 1], np.log(expected), rtol=1e-12)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_log_variance_is_finite_everywhere(variance, schedule):
    assert Objective(variance=variance).variance_table(schedule)[:, 1].isfinite().all()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_tables_are_float64_with_a_row_per_step(prediction, schedule):
    objective = Objective(prediction)
    for table, columns in (
        (objective.loss_table(schedule), 3),
        (objective.x0_table(schedule), 2),
        (objective.variance_table(schedule), 2),
    ):
        assert table.dtype == torch.float64 and table.shape == (len(schedule), columns)


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"prediction": "epsilon"}, "prediction = 'epsilon' does not exist: choose one of 'eps', 'v'"),
        (
            {"variance": "large"},
            "variance = 'large' does not exist: choose one of 'fixed_small', 'fixed_large'",
        ),
        ({"loss": "mse"}, "loss = 'mse' does not exist: choose one of 'simple'"),
        ({"loss": ["simple"]}, "does not exist"),
    ],
)
def test_unknown_choices_are_refused_with_those_that_exist(choice, message):
    with pytest.raises(InputError, match=message):
        Objective(**choice)


def test_to_dict_makes_it_again():
    objective = Objective("v", "fixed_small")
    assert objective.to_dict() == {"prediction": "v", "variance": "fixed_small", "loss": "simple"}
    assert Objective(**objective.to_dict()) == objective
