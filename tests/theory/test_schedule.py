"""Schedule against the papers' code (tests/golden), exact and 50-digit arithmetic, diffusers, and bad input."""

import json
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.schedule import SCHEDULES, Schedule

GOLDEN = Path(__file__).parents[1] / "golden"
TABLES = (
    "betas",
    "alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def close(actual: torch.Tensor, expected, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=0)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("T", [100, 1000, 4000])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_tables_match_the_papers_code(kind, T, table):
    golden = np.load(GOLDEN / "schedules.npz")[f"{kind}_{T}/{table}"]
    close(getattr(getattr(Schedule, kind)(T), table), golden)


def test_derived_tables_match_exact_arithmetic():
    betas = [Fraction(1, 64), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)]  # exact in binary
    ab = [Fraction(1)]
    for beta in betas:
        ab.append(ab[-1] * (1 - beta))
    prev, ab = ab[:-1], ab[1:]
    schedule = Schedule.from_betas([float(beta) for beta in betas])
    variance = [b * (1 - p) / (1 - a) for b, p, a in zip(betas, prev, ab, strict=True)]
    close(schedule.alphas_cumprod_prev, [float(p) for p in prev])
    close(schedule.posterior_variance, [float(v) for v in variance])
    close(schedule.sqrt_alphas_cumprod**2, [float(a) for a in ab])
    close(schedule.sqrt_one_minus_alphas_cumprod**2, [float(1 - a) for a in ab])
    close(schedule.sqrt_recip_alphas_cumprod**2, [float(1 / a) for a in ab])
    close(schedule.sqrt_recipm1_alphas_cumprod**2, [float(1 / a - 1) for a in ab])
    close(schedule.snr, [float(a / (1 - a)) for a in ab])
    close(
        schedule.posterior_mean_coef1**2,
        [float(p * (b / (1 - a)) ** 2) for b, p, a in zip(betas, prev, ab, strict=True)],
    )
    close(
        schedule.posterior_mean_coef2**2,
        [float((1 - b) * ((1 - p) / (1 - a)) ** 2) for b, p, a in zip(betas, prev, ab, strict=True)],
    )


def test_tables_for_ops_hold_the_named_columns():
    s = Schedule.cosine(10)
    assert torch.equal(s.q_sample_table(), torch.stack([s.sqrt_alphas_cumprod, s.sqrt_one_minus_alphas_cumprod], 1))
    assert torch.equal(s.posterior_table()[:, 0], s.posterior_mean_coef1)
    assert torch.equal(s.posterior_table()[:, 1], s.posterior_mean_coef2)
    assert torch.equal(s.posterior_table()[:, 2], s.posterior_variance)
    assert torch.equal(s.posterior_table()[:, 3], s.posterior_log_variance_clipped)


@pytest.mark.parametrize("T", [1, 2, 10, 1000, 4000])
def test_sigmoid_matches_its_formula_in_50_digits(T):
    with localcontext() as context:
        context.prec = 50

        def sig(x):
            return 1 / (1 + (-x).exp())

        ab = [(sig(Decimal(3)) - sig(Decimal(6 * t) / T - 3)) / (sig(Decimal(3)) - sig(Decimal(-3))) for t in range(T)]
        ab.append(Decimal(0))
        betas = [float(min(1 - b / a, Decimal("0.999"))) for a, b in pairwise(ab)]
    schedule = Schedule.sigmoid(T)
    close(schedule.betas, betas, rtol=1e-14)
    close(schedule.alphas_cumprod[:-1], [float(a) for a in ab[1:-1]])
    assert (schedule.betas == 0.999).nonzero().flatten().tolist() == [T - 1]


@pytest.mark.peers
def test_scaled_linear_matches_diffusers():
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    close(Schedule.scaled_linear(1000).betas, peer.betas.double(), rtol=1e-6)  # a float32 table


@pytest.mark.parametrize("T", [13, 100, 4000])
def test_scaled_linear_is_even_in_sqrt_beta_between_the_scaled_ends(T):
    roots = Schedule.scaled_linear(T).betas.sqrt()
    close(roots[[0, -1]] ** 2 * T / 1000, [0.00085, 0.012])
    index = torch.arange(T, dtype=torch.float64)
    close(roots, roots[0] + (roots[-1] - roots[0]) * index / (T - 1))


# --- pitfalls


@pytest.mark.parametrize("T, recip", [(1000, 20_291), (4000, 81_165)])
def test_cosine_hits_the_cap_at_exactly_one_step(T, recip):
    schedule = Schedule.cosine(T)
    assert (schedule.betas == 0.999).nonzero().flatten().tolist() == [T - 1]
    assert round(schedule.sqrt_recip_alphas_cumprod[-1].item()) == recip


@pytest.mark.parametrize(
    "kind, T, works",
    [
        pytest.param("linear", 1, 21, id="linear, one step"),
        pytest.param("linear", 19, 21, id="linear, beta above 1"),
        pytest.param("linear", 20, 21, id="linear, beta of 1"),
        pytest.param("scaled_linear", 1, 13, id="scaled_linear, one step"),
        pytest.param("scaled_linear", 12, 13, id="scaled_linear, beta of 1"),
    ],
)
def test_linear_with_few_steps_is_refused_with_the_t_that_works(kind, T, works):
    with pytest.raises(InputError, match=rf"{kind} schedule of T = {T} steps .* use T >= {works}"):
        SCHEDULES[kind](T)
    assert all(getattr(SCHEDULES[kind](works), table).isfinite().all() for table in TABLES)


@pytest.mark.parametrize("T", [50, 1000, 8000])
def test_unscaled_linear_would_change_the_total_noise_with_t(T):
    schedule = Schedule.linear(T)
    close(schedule.betas[[0, -1]] * T / 1000, [1e-4, 0.02])
    # -log alpha_bar_T = sum beta + sum beta^2 / 2 + ..., whose first term is 10.05 for every T.
    assert schedule.betas.sum().item() == pytest.approx(10.05)
    assert torch.linspace(1e-4, 0.02, T).sum().item() == pytest.approx(10.05 * T / 1000)


@pytest.mark.parametrize("T, off", [(1000, 4.9e-4), (4000, 2.4e-3)])
def test_tables_are_float64_and_cast_last_because_float32_loses_the_betas(T, off):
    schedule = Schedule.linear(T)
    assert all(getattr(schedule, table).dtype == torch.float64 for table in TABLES)
    assert schedule.snr.dtype == torch.float64

    def recomputed(ab):
        return 1 - ab / torch.cat([ab.new_ones(1), ab[:-1]])

    float32 = recomputed(torch.cumprod(1 - schedule.betas.float(), 0))
    assert (float32 / schedule.betas - 1).abs().max().item() == pytest.approx(off, rel=0.05)
    close(recomputed(schedule.alphas_cumprod), schedule.betas, rtol=1e-10)


def test_log_of_the_first_posterior_variance_is_that_of_the_second():
    schedule = Schedule.linear(1000)
    assert schedule.posterior_variance[0] == 0
    close(schedule.posterior_log_variance_clipped[0], schedule.posterior_variance[1].log())
    assert schedule.posterior_log_variance_clipped[0] > math.log(1e-20) + 30  # what clamping would put there


def test_a_respaced_chain_rebuilds_its_betas_and_tells_the_original_timesteps():
    schedule = Schedule.cosine(1000)
    respaced = schedule.respace(50)
    close(respaced.alphas_cumprod, schedule.alphas_cumprod[respaced.timesteps], rtol=1e-11)
    assert not torch.allclose(respaced.betas, schedule.betas[respaced.timesteps])
    assert respaced.timesteps[[0, 1, -1]].tolist() == [0, 20, 999]


@pytest.mark.parametrize("kind, snr", [("linear", 9_999), ("cosine", 24_221)])
def test_snr_at_the_first_step_is_so_high_that_weights_need_a_cap(kind, snr):
    assert round(SCHEDULES[kind](1000).snr[0].item()) == snr


# --- zero terminal SNR


@pytest.mark.parametrize("T", [21, 1000, 4000])
@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_zero_terminal_snr_shifts_and_scales_the_root_of_alphas_cumprod(kind, T):
    schedule = SCHEDULES[kind](T)
    rescaled = schedule.zero_terminal_snr()
    root = schedule.alphas_cumprod.sqrt()
    close(rescaled.alphas_cumprod, ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.alphas_cumprod[0] == schedule.alphas_cumprod[0]
    assert rescaled.betas[-1] == 1
    assert rescaled.snr[-1] == 0
    assert (rescaled.has_zero_terminal_snr, schedule.has_zero_terminal_snr) == (True, False)


@pytest.mark.peers
@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_zero_terminal_snr_matches_diffusers(kind):
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    schedule = SCHEDULES[kind](1000)
    close(schedule.zero_terminal_snr().betas, scheduling.rescale_zero_terminal_snr(schedule.betas), rtol=1e-10)


ZERO_TERMINAL = [
    pytest.param(Schedule.linear(1000).zero_terminal_snr(), id="all steps"),
    pytest.param(Schedule.cosine(1000).zero_terminal_snr().respace(50), id="respaced"),
    pytest.param(Schedule.cosine(1000).zero_terminal_snr().respace([0, 999]), id="two steps"),
    pytest.param(Schedule.cosine(1000).zero_terminal_snr().respace(1), id="the last step alone"),
    pytest.param(Schedule.from_betas([0.1, 0.2]).zero_terminal_snr(), id="given betas"),
]


@pytest.mark.parametrize("schedule", ZERO_TERMINAL)
def test_a_zero_terminal_step_has_finite_tables_but_for_x0_from_eps(schedule):
    tables = {name: value for name, value in vars(schedule).items() if isinstance(value, torch.Tensor)}
    infinite = {"sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"}
    assert all(table.isfinite().all() for name, table in tables.items() if name not in infinite)
    for name in infinite:
        assert tables[name][:-1].isfinite().all()
        assert tables[name][-1] == math.inf
    # x_t says nothing of x_0 there: q(x_{t-1} | x_t, x_0) is q(x_{t-1} | x_0).
    assert schedule.posterior_mean_coef1[-1] == schedule.alphas_cumprod_prev[-1].sqrt()
    assert schedule.posterior_mean_coef2[-1] == 0
    assert schedule.posterior_variance[-1] == 1 - schedule.alphas_cumprod_prev[-1]


@pytest.mark.parametrize("schedule", ZERO_TERMINAL)
def test_a_zero_terminal_schedule_round_trips_through_json_and_stays_when_rescaled_again(schedule):
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    for name, table in vars(schedule).items():
        if isinstance(table, torch.Tensor):
            assert torch.equal(table, getattr(again, name)), name
    assert again.source == schedule.source
    assert schedule.zero_terminal_snr() is schedule


def test_respacing_a_zero_terminal_chain_keeps_its_alphas_cumprod():
    rescaled = Schedule.linear(1000).zero_terminal_snr()
    for spec in (25, "10,15", [3, 500, 999], "ddim50"):
        respaced = rescaled.respace(spec)
        close(respaced.alphas_cumprod, rescaled.alphas_cumprod[respaced.timesteps], rtol=1e-11)
        assert respaced.has_zero_terminal_snr == (999 in respaced.timesteps.tolist())


def test_rescaling_a_respaced_chain_rescales_the_original_and_keeps_the_same_steps():
    schedule = Schedule.cosine(1000)
    for spec in (20, [5, 400, 999]):
        first, last = schedule.zero_terminal_snr().respace(spec), schedule.respace(spec).zero_terminal_snr()
        assert torch.equal(first.betas, last.betas)
        assert first.to_dict() == last.to_dict()


@pytest.mark.parametrize(
    "schedule, message",
    [
        pytest.param(Schedule.cosine(1), "a chain of one step .* use T >= 2", id="one step"),
        pytest.param(
            Schedule.cosine(1000).respace("ddim50"),
            "cosine-1000/50 ends at step 980 .* only at step 999: respace to steps that include it",
            id="without the last step",
        ),
        pytest.param(
            Schedule.cosine(1000).zero_terminal_snr().respace("ddim50"),
            "cosine-1000-zero-snr/50 ends at step 980",
            id="without the last step, rescaled before",
        ),
        pytest.param(
            # Five alpha_bar within 2e-16 have at most three roots among them, however the root is rounded.
            Schedule.from_betas([0.5, *[1.2e-16] * 4]),
            r"the worst betas\[\d\] = (0\.0|1\.0|nan): .*would be 1$",
            id="steps lost in rounding",
        ),
    ],
)
def test_zero_terminal_snr_refuses(schedule, message):
    with pytest.raises(InputError, match=message):
        schedule.zero_terminal_snr()


# --- construction


@pytest.mark.parametrize(
    "betas, message",
    [
        pytest.param([0.1, -2.0, 1.5], r"2 of 3 betas .* the worst betas\[1\] = -2.0", id="the farthest outside"),
        pytest.param([0.1, 9.0, float("nan")], r"2 of 3 betas .* betas\[2\] = nan", id="NaN is worse than 9"),
        pytest.param([0.1, float("inf")], r"betas\[1\] = inf", id="infinite"),
        pytest.param([0.0, 0.1], r"betas\[0\] = 0.0", id="zero"),
        pytest.param([0.1, 1.0], r"betas\[1\] = 1.0.*.zero_terminal_snr\(\) makes a chain", id="one, at the end"),
        pytest.param([1.0, 0.1], r"betas\[0\] = 1.0.*or 1 - beta would be 1$", id="one, elsewhere"),
        pytest.param([1e-17], r"betas\[0\] = 1e-17", id="lost in 1 - beta"),
        pytest.param([], r"not empty, got shape \[0\]", id="empty"),
        pytest.param([[0.1]], r"must be 1-D .* \[1, 1\]", id="two dimensions"),
        pytest.param(0.1, r"must be 1-D .* \[\]", id="a scalar"),
        pytest.param(["a"], "must be a 1-D tensor, array or list of numbers", id="not numbers"),
        pytest.param([0.9] * 100, r"falls to 1e-78 at t = 77 \(of T = 100\)", id="x_0 would overflow float32"),
        pytest.param(
            [0.9] * 78, r"falls to 1e-78 at t = 77 \(of T = 78\)", id="x_0 would overflow at the last step alone"
        ),
        pytest.param([0.9] * 400, r"falls to 1e-78 at t = 77 \(of T = 400\)", id="the product falls to 0"),
    ],
)
def test_from_betas_refuses(betas, message):
    with pytest.raises(InputError, match=message):
        Schedule.from_betas(betas)


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("T", [0, -1, 10.0, "10", True, 10**6 + 1, 10**30])
def test_a_number_of_steps_is_a_positive_int_of_at_most_a_million(make, T):
    with pytest.raises(InputError, match=r"T is .*; expected an integer in 1..1000000"):
        make(T)


def test_from_betas_keeps_float64_and_copies():
    for betas in ([0.1, 0.2], np.array([0.1, 0.2]), torch.tensor([0.1, 0.2], dtype=torch.float64)):
        schedule = Schedule.from_betas(betas)
        betas[0] = 0.5
        assert schedule.betas.tolist() == [0.1, 0.2]


def test_attributes_cannot_be_replaced():
    with pytest.raises(AttributeError):
        Schedule.cosine(10).betas = torch.ones(10)


@pytest.mark.parametrize(
    "schedule", [Schedule.cosine(1), Schedule.from_betas([0.3]), Schedule.cosine(1000).respace([7])]
)
def test_a_chain_of_one_step_has_finite_tables(schedule):
    beta = schedule.betas.item()
    assert schedule.posterior_variance.tolist() == [0.0]
    close(schedule.posterior_log_variance_clipped, schedule.betas.log())
    # q(x_0 | x_1, x_0) is x_0 itself.
    assert schedule.posterior_mean_coef1.item() == pytest.approx(1)
    assert schedule.posterior_mean_coef2.item() == 0
    assert schedule.alphas_cumprod.item() == pytest.approx(1 - beta)


@pytest.mark.parametrize(
    "schedule, described, name",
    [
        (Schedule.cosine(1000), {"kind": "cosine", "T": 1000}, "cosine-1000"),
        (Schedule.linear(100), {"kind": "linear", "T": 100}, "linear-100"),
        (Schedule.sigmoid(100), {"kind": "sigmoid", "T": 100}, "sigmoid-100"),
        (Schedule.scaled_linear(100), {"kind": "scaled_linear", "T": 100}, "scaled_linear-100"),
        (
            Schedule.cosine(100).zero_terminal_snr().respace([3, 99]),
            {"kind": "cosine", "T": 100, "zero_terminal_snr": True, "timesteps": [3, 99]},
            "cosine-100-zero-snr/2",
        ),
        (Schedule.from_betas([0.1, 0.7]), {"kind": "betas", "betas": [0.1, 0.7]}, "betas-2"),
        (
            Schedule.linear(100).respace([3, 9]),
            {"kind": "linear", "T": 100, "timesteps": [3, 9]},
            "linear-100/2",
        ),
        (
            Schedule.from_betas([0.1, 0.7]).respace([1]),
            {"kind": "betas", "betas": [0.1, 0.7], "timesteps": [1]},
            "betas-2/1",
        ),
    ],
)
def test_to_dict_round_trips_through_json(schedule, described, name):
    assert schedule.to_dict() == described
    assert schedule.name == name
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert torch.equal(again.betas, schedule.betas)
    assert torch.equal(again.timesteps, schedule.timesteps)
    assert again.num_timesteps == len(again) == len(schedule.betas)


@pytest.mark.parametrize(
    "described, message",
    [
        ({"kind": "square", "T": 10}, r"'kind' is one of \['linear', 'cosine', 'sigmoid', 'scaled_linear', 'betas'\]"),
        ("cosine", "does not describe a schedule"),
        ({"kind": "cosine"}, r"'kind' and 'T' and, if they apply, .*; got \['kind'\]"),
        ({"kind": "cosine", "T": 10, "s": 1}, r"got \['T', 'kind', 's'\]"),
        ({"kind": "cosine", "T": 10, "zero_terminal_snr": 1}, "'zero_terminal_snr' must be true or false, got 1"),
        ({"kind": "cosine", "T": 10, "timesteps": [3, 10]}, r"timesteps\[1\] = 10 is outside 0..9"),
    ],
)
def test_from_dict_refuses(described, message):
    with pytest.raises(InputError, match=message):
        Schedule.from_dict(described)
