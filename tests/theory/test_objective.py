"""Objective's tables against the equations, written out here in float64, and against the papers' code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.objective import Objective
from ddpm_fast.schedule import Schedule

GOLDEN = Path(__file__).parents[1] / "golden"
PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
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


def test_x0_target_is_x0(schedule):
    objective = Objective(prediction="x0")
    c_x0, c_noise, weight = objective.loss_table(schedule).unbind(1)
    assert (c_x0 == 1).all() and (c_noise == 0).all() and (weight == 1).all()
    a_x, a_out = objective.x0_table(schedule).unbind(1)
    assert (a_x == 0).all() and (a_out == 1).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
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


@pytest.mark.pairwise
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_tables_are_float64_with_a_finite_row_per_step(prediction, variance, schedule):
    objective = Objective(prediction, variance, "hybrid")
    for table, columns in (
        (objective.loss_table(schedule), 3),
        (objective.x0_table(schedule), 2),
        (objective.log_variance_table(schedule), 2),
        (objective.bound_table(schedule)[:, :8], 8),
        (objective.bound_table(schedule), 9),
        (objective.hybrid_table(schedule), 11),
    ):
        assert table.dtype == torch.float64 and table.shape == (len(schedule), columns)
        assert table.isfinite().all() or columns == 11  # whose clip is infinity


# --- learned variances


def log_variances(schedule):
    """(log beta~, log beta) by their definitions, beta~ at t = 0 being that of t = 1."""
    ab, beta = schedule.alphas_cumprod, schedule.betas
    tilde = (1 - schedule.alphas_cumprod_prev) / (1 - ab) * beta
    first = tilde[1:2] if len(beta) > 1 else beta
    return torch.cat([first, tilde[1:]]).log(), beta.log()


def test_learned_range_interpolates_between_the_fixed_logarithms(schedule):
    small, large = log_variances(schedule)
    base, slope = Objective(variance="learned_range", loss="hybrid").log_variance_table(schedule).unbind(1)
    for v in (-1.0, -0.3, 0.0, 1.0, 4.0):
        fraction = (v + 1) / 2
        expected = fraction * large + (1 - fraction) * small
        torch.testing.assert_close(base + slope * v, expected, rtol=1e-12, atol=1e-12)


def test_learned_is_the_log_variance_itself(schedule):
    base, slope = Objective(variance="learned", loss="vlb").log_variance_table(schedule).unbind(1)
    assert (base == 0).all() and (slope == 1).all()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_fixed_log_variance_has_no_slope(variance, schedule):
    objective = Objective(variance=variance)
    base, slope = objective.log_variance_table(schedule).unbind(1)
    assert torch.equal(base, objective.variance_table(schedule)[:, 1]) and (slope == 0).all()


def test_a_fixed_large_log_variance_at_0_is_the_posteriors_of_1():
    # log beta_0 would do for sampling, where no noise is added at t = 0, but costs likelihood of x_0.
    schedule = Schedule.cosine(1000)
    small, large = log_variances(schedule)
    table = Objective(variance="fixed_large").log_variance_table(schedule)
    assert table[0, 0].item() == pytest.approx(small[1].item(), rel=1e-14)
    torch.testing.assert_close(table[1:, 0], large[1:], rtol=1e-14, atol=0)


@pytest.mark.parametrize("variance, learned", list(zip(VARIANCES, (False, False, True, True), strict=True)))
def test_learned_tells_of_the_second_group_of_channels(variance, learned):
    assert Objective(variance=variance, loss="hybrid").learned is learned


# --- the bound's table


@pytest.mark.pairwise
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bound_table_columns_are_their_definitions(prediction, variance, schedule):
    objective = Objective(prediction, variance, "vlb")
    table = objective.bound_table(schedule, clip=True, decoder="paper")
    c_x0, c_noise, a_out, pull, log_beta, delta, slope, decoder, clip = table.unbind(1)
    ab, prev, beta = schedule.alphas_cumprod, schedule.alphas_cumprod_prev, schedule.betas
    # The error of x_0 for an error of 1 in the output, from x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps.
    expected = {"eps": -(1 / ab - 1).sqrt(), "x0": torch.ones_like(ab), "v": -(1 - ab).sqrt()}[prediction]
    torch.testing.assert_close(a_out, expected, rtol=1e-9, atol=0)
    assert torch.equal(torch.stack([c_x0, c_noise], 1), objective.loss_table(schedule)[:, :2])
    small, _ = log_variances(schedule)
    torch.testing.assert_close(log_beta, small, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pull, prev.sqrt() * beta / (1 - ab) / small.exp().sqrt(), rtol=1e-12, atol=0)
    base, expected_slope = objective.log_variance_table(schedule).unbind(1)
    torch.testing.assert_close(log_beta + delta, base, rtol=1e-12, atol=1e-12)
    assert torch.equal(slope, expected_slope)
    assert decoder[0] == 1 and (decoder[1:] == 0).all() and (clip == 1).all()


def test_bound_tables_choices():
    schedule = Schedule.cosine(10)
    objective = Objective(loss="vlb")
    assert (objective.bound_table(schedule, clip=False)[:, 8] == math.inf).all()
    assert objective.bound_table(schedule, decoder="exact")[0, 7] == 2
    with pytest.raises(InputError, match="decoder = 'tanh' does not exist: choose one of 'paper', 'exact'"):
        objective.bound_table(schedule, decoder="tanh")


def test_hybrid_table_is_the_bounds_unclipped_and_the_two_weights(schedule):
    objective = Objective("x0", "learned_range", "hybrid", "min_snr", min_snr_gamma=2.0, vlb_weight=0.01)
    table = objective.hybrid_table(schedule)
    assert torch.equal(table[:, :9], objective.bound_table(schedule, clip=False, decoder="paper"))
    assert torch.equal(table[:, 9], objective.loss_table(schedule)[:, 2])
    torch.testing.assert_close(table[:, 10], torch.full_like(table[:, 10], 0.01 * len(schedule)), rtol=1e-15, atol=0)


# --- weightings


def weights(prediction, weighting, schedule, **choices):
    return Objective(prediction, loss_weighting=weighting, **choices).loss_table(schedule)[:, 2]


SNR_WEIGHTS = {
    ("eps", "snr"): lambda snr, g: torch.ones_like(snr),
    ("x0", "snr"): lambda snr, g: snr,
    ("v", "snr"): lambda snr, g: snr / (snr + 1),
    ("eps", "truncated_snr"): lambda snr, g: torch.maximum(snr, torch.ones_like(snr)) / snr,
    ("x0", "truncated_snr"): lambda snr, g: torch.maximum(snr, torch.ones_like(snr)),
    ("v", "truncated_snr"): lambda snr, g: torch.maximum(snr, torch.ones_like(snr)) / (snr + 1),
    ("eps", "min_snr"): lambda snr, g: torch.minimum(snr, torch.full_like(snr, g)) / snr,
    ("x0", "min_snr"): lambda snr, g: torch.minimum(snr, torch.full_like(snr, g)),
    ("v", "min_snr"): lambda snr, g: torch.minimum(snr, torch.full_like(snr, g)) / (snr + 1),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("gamma", [1, 5.0])
@pytest.mark.parametrize("prediction, weighting", SNR_WEIGHTS)
def test_weights_are_the_papers(prediction, weighting, gamma, schedule):
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    expected = SNR_WEIGHTS[prediction, weighting](snr, gamma)
    actual = weights(prediction, weighting, schedule, min_snr_gamma=gamma)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def test_every_snr_weighted_loss_is_the_eps_loss(schedule):
    """An output wrong by so much that eps is wrong by 1, whatever is predicted: the losses are equal."""
    ab = schedule.alphas_cumprod
    error = {"eps": torch.ones_like(ab), "x0": -((1 - ab) / ab).sqrt(), "v": 1 / ab.sqrt()}
    for prediction, off in error.items():
        loss = weights(prediction, "snr", schedule) * off**2
        torch.testing.assert_close(loss, torch.ones_like(ab), rtol=1e-9, atol=0)


def test_snr_weights_for_x0_are_unbounded_and_min_snr_caps_them():
    for chain, largest in ((Schedule.linear(1000), 9_999), (Schedule.cosine(1000), 24_221)):
        assert weights("x0", "snr", chain).max().item() == pytest.approx(largest, rel=1e-3)
        assert weights("x0", "truncated_snr", chain).max().item() == pytest.approx(largest, rel=1e-3)
        for prediction in PREDICTIONS:
            assert weights(prediction, "min_snr", chain).max() <= 5


def test_min_snr_at_zero_snr_has_a_defined_limit():
    schedule = Schedule.cosine(1000).zero_terminal_snr()
    for prediction in ("v", "x0"):
        weight = weights(prediction, "min_snr", schedule)
        assert weight.isfinite().all() and weight[-1] == 0 and (weight[:-1] > 0).all()
        # Below the cap it is the SNR's, which goes to 0 in the same way.
        torch.testing.assert_close(weight[-9:], weights(prediction, "snr", schedule)[-9:], rtol=1e-12, atol=0)
        assert weights(prediction, "truncated_snr", schedule)[-1] == 1


def test_eps_with_zero_terminal_snr_is_refused():
    schedule = Schedule.linear(100).zero_terminal_snr()
    objective = Objective("eps", "learned_range", "hybrid")
    for ask in (
        objective.check_schedule,
        objective.x0_table,
        objective.bound_table,
        objective.hybrid_table,
        Objective("eps", loss_weighting="min_snr").loss_table,
    ):
        with pytest.raises(InputError, match=r"zero-terminal-SNR.*divide by 0.*Choose prediction = 'v'.*or 'x0'"):
            ask(schedule)
    for prediction in ("x0", "v"):
        objective = Objective(prediction, "learned_range", "hybrid")
        objective.check_schedule(schedule)
        assert objective.hybrid_table(schedule)[:, :8].isfinite().all()


# --- bad choices


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"prediction": "epsilon"}, "prediction = 'epsilon' does not exist: choose one of 'eps', 'x0', 'v'"),
        (
            {"variance": "large"},
            "variance = 'large' does not exist: choose one of 'fixed_small', 'fixed_large', 'learned', 'learned_range'",
        ),
        ({"loss": "mse"}, "loss = 'mse' does not exist: choose one of 'simple', 'hybrid', 'vlb', 'rescaled_vlb'"),
        (
            {"loss_weighting": "p2"},
            "loss_weighting = 'p2' does not exist: choose one of 'none', 'snr', 'truncated_snr', 'min_snr'",
        ),
        ({"loss": ["simple"]}, "does not exist"),
    ],
)
def test_unknown_choices_are_refused_with_those_that_exist(choice, message):
    with pytest.raises(InputError, match=message):
        Objective(**choice)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_needs_a_loss_that_trains_it(variance):
    with pytest.raises(InputError, match=f"bound trains variance = '{variance}'.*'simple' does not.*'hybrid'"):
        Objective(variance=variance)
    for loss in ("hybrid", "vlb", "rescaled_vlb"):
        assert Objective(variance=variance, loss=loss).learned


@pytest.mark.parametrize("weighting", ["snr", "min_snr"])
@pytest.mark.parametrize("loss", ["vlb", "rescaled_vlb"])
def test_the_bound_has_its_own_weights(loss, weighting):
    with pytest.raises(InputError, match=f"'{weighting}' is for a regression.*'{loss}' is the variational.*'none'"):
        Objective(loss=loss, loss_weighting=weighting)
    assert Objective(loss=loss).is_bound and not Objective(loss="hybrid").is_bound


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "5", None], ids=repr)
@pytest.mark.parametrize("what", ["min_snr_gamma", "vlb_weight"])
def test_weights_that_are_no_positive_number_are_refused(what, value):
    with pytest.raises(InputError) as error:
        Objective(**{what: value})
    assert f"{what} is {value!r}; expected a positive number" in str(error.value)


def test_to_dict_makes_it_again():
    objective = Objective("v", "learned_range", "hybrid", "min_snr", 3.0, 0.01)
    assert objective.to_dict() == {
        "prediction": "v",
        "variance": "learned_range",
        "loss": "hybrid",
        "loss_weighting": "min_snr",
        "min_snr_gamma": 3.0,
        "vlb_weight": 0.01,
    }
    assert Objective(**objective.to_dict()) == objective
