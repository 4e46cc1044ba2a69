"""Schedule against the tables of the papers' code (tests/golden), exact arithmetic, and bad input."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.schedule import Schedule

GOLDEN = Path(__file__).parent / "golden"
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


# --- pitfalls


@pytest.mark.parametrize("T, recip", [(1000, 20_291), (4000, 81_165)])
def test_cosine_hits_the_cap_at_exactly_one_step(T, recip):
    schedule = Schedule.cosine(T)
    assert (schedule.betas == 0.999).nonzero().flatten().tolist() == [T - 1]
    assert round(schedule.sqrt_recip_alphas_cumprod[-1].item()) == recip


@pytest.mark.parametrize("T", [1, 19, 20])
def test_linear_refuses_t_of_20_or_less_with_the_t_that_works(T):
    with pytest.raises(InputError, match=rf"T = {T} steps .* use T >= 21"):
        Schedule.linear(T)
    assert all(getattr(Schedule.linear(21), table).isfinite().all() for table in TABLES)


@pytest.mark.parametrize("T", [50, 1000, 8000])
def test_linear_is_scaled_so_that_total_noise_does_not_depend_on_t(T):
    schedule = Schedule.linear(T)
    close(schedule.betas[[0, -1]] * T / 1000, [1e-4, 0.02])
    # -log alpha_bar_T = sum beta + sum beta^2 / 2 + ..., whose first term is 10.05 for every T.
    assert schedule.betas.sum().item() == pytest.approx(10.05)


@pytest.mark.parametrize("T, off", [(1000, 4.9e-4), (4000, 2.4e-3)])
def test_tables_are_float64_because_float32_loses_the_betas(T, off):
    schedule = Schedule.linear(T)
    assert all(getattr(schedule, table).dtype == torch.float64 for table in TABLES)

    def recomputed(ab):
        return 1 - ab / torch.cat([ab.new_ones(1), ab[:-1]])

    float32 = recomputed(torch.cumprod(1 - schedule.betas.float(), 0))
    assert (float32 / schedule.betas - 1).abs().max().item() == pytest.approx(off, rel=0.05)
    close(recomputed(schedule.alphas_cumprod), schedule.betas, rtol=1e-10)


def test_posterior_log_variance_at_0_is_that_of_1():
    schedule = Schedule.linear(1000)
    assert schedule.posterior_variance[0] == 0
    close(schedule.posterior_log_variance_clipped[0], schedule.posterior_variance[1].log())


def test_respaced_chain_rebuilds_its_betas_from_alphas_cumprod():
    schedule = Schedule.cosine(1000)
    respaced = schedule.respace(50)
    close(respaced.alphas_cumprod, schedule.alphas_cumprod[respaced.timesteps], rtol=1e-11)
    assert not torch.allclose(respaced.betas, schedule.betas[respaced.timesteps])


# --- respacing


@pytest.mark.parametrize(
    "T, spec",
    [
        (1000, "25"),
        (1000, "100"),
        (1000, "250"),
        (4000, "400"),
        (1000, "10,15,20"),
        (300, "10,15,20"),
        (1000, "ddim50"),
        (1000, "ddim25"),
    ],
)
def test_respacing_matches_the_papers_code(T, spec):
    golden = np.load(GOLDEN / "respacing.npz")
    schedule = Schedule.cosine(T).respace(spec)
    assert schedule.timesteps.dtype == torch.int64
    assert schedule.timesteps.tolist() == golden[f"{T}/{spec}/timesteps"].tolist()
    close(schedule.betas, golden[f"{T}/{spec}/cosine_betas"])


@pytest.mark.parametrize(
    "spec, expected",
    [
        pytest.param(3, [0, 4, 9], id="both ends; 4.5 rounds to even, as in the paper's code"),
        pytest.param(1, [9], id="a single step is where sampling starts"),
        pytest.param("1,1", [0, 5], id="a section's single step is its first"),
        pytest.param("0,2", [5, 9], id="an empty section"),
        pytest.param(10, list(range(10)), id="all"),
        pytest.param("ddim5", [0, 2, 4, 6, 8], id="stride 2"),
        pytest.param("ddim4", [0, 3, 6, 9], id="a stride that does not divide T"),
        pytest.param([0, 7, 9], [0, 7, 9], id="a list"),
        pytest.param(torch.tensor([2, 3]), [2, 3], id="a tensor"),
        pytest.param(np.array([2, 3]), [2, 3], id="an array"),
    ],
)
def test_respace_keeps(spec, expected):
    assert Schedule.cosine(10).respace(spec).timesteps.tolist() == expected


def test_respacing_composes():
    schedule = Schedule.cosine(1000)
    twice = schedule.respace("ddim100").respace([0, 5, 99])
    once = schedule.respace([0, 50, 990])
    assert twice.timesteps.tolist() == [0, 50, 990]
    assert torch.equal(twice.betas, once.betas)
    assert twice.to_dict() == once.to_dict()


def test_respacing_to_every_step_changes_nothing():
    schedule = Schedule.linear(100)
    assert torch.equal(schedule.respace(100).betas, schedule.betas)


@pytest.mark.parametrize(
    "spec, message",
    [
        (101, "cannot keep 101 timesteps where the schedule has 100"),
        ("60,30", "cannot keep 60 timesteps where section 0 of 2 has 50"),
        (0, "keeps no timesteps"),
        (-3, "keeps no timesteps"),
        ("ddim37", "no integer stride leaves 37 of 100 timesteps; 'ddim34' or 'ddim50' or '37' would do"),
        ("ddim101", "no integer stride leaves 101 of 100 timesteps; 'ddim100' would do"),
        ("ddim", "cannot read the respacing 'ddim'"),
        ("", "cannot read the respacing ''"),
        ("10,x", "cannot read the respacing '10,x'"),
        (25.0, "cannot read the respacing 25.0"),
        (True, "cannot read the respacing True"),
        ([], "the list of timesteps is empty"),
        ([0, 5, 3], r"timesteps\[2\] = 3 is below timesteps\[1\] = 5"),
        ([0, 5, 5], r"timesteps\[2\] = 5 repeats timesteps\[1\] = 5"),
        ([0, 100], r"timesteps\[1\] = 100 is outside 0..99"),
        ([-1, 5], r"timesteps\[0\] = -1 is outside 0..99"),
        ([0.0, 5.0], "must be a list of ints"),
    ],
)
def test_respace_refuses(spec, message):
    with pytest.raises(InputError, match=message):
        Schedule.cosine(100).respace(spec)


# --- construction


@pytest.mark.parametrize(
    "betas, message",
    [
        pytest.param([0.1, -2.0, 1.5], r"2 of 3 betas .* the worst betas\[1\] = -2.0", id="the farthest outside"),
        pytest.param([0.1, 9.0, float("nan")], r"2 of 3 betas .* betas\[2\] = nan", id="NaN is worse than 9"),
        pytest.param([0.1, float("inf")], r"betas\[1\] = inf", id="infinite"),
        pytest.param([0.0, 0.1], r"betas\[0\] = 0.0", id="zero"),
        pytest.param([0.1, 1.0], r"betas\[1\] = 1.0", id="one"),
        pytest.param([1e-17], r"betas\[0\] = 1e-17", id="lost in 1 - beta"),
        pytest.param([], r"not empty, got shape \[0\]", id="empty"),
        pytest.param([[0.1]], r"must be 1-D .* \[1, 1\]", id="two dimensions"),
        pytest.param(0.1, r"must be 1-D .* \[\]", id="a scalar"),
        pytest.param(["a"], "must be a 1-D tensor, array or list of numbers", id="not numbers"),
        pytest.param([0.9] * 100, r"falls to 1e-78 at t = 77 \(of T = 100\)", id="x_0 would overflow float32"),
    ],
)
def test_from_betas_refuses(betas, message):
    with pytest.raises(InputError, match=message):
        Schedule.from_betas(betas)


@pytest.mark.parametrize("make", [Schedule.linear, Schedule.cosine])
@pytest.mark.parametrize("T", [0, -1, 10.0, "10", True])
def test_a_number_of_steps_is_a_positive_int(make, T):
    with pytest.raises(InputError, match=r"T = .* is not a number of steps"):
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
        ({"kind": "square", "T": 10}, r"'kind' is one of \['linear', 'cosine', 'betas'\]"),
        ("cosine", "describes no schedule"),
        ({"kind": "cosine"}, r"'kind', 'T' and, if respaced, 'timesteps'; got \['kind'\]"),
        ({"kind": "cosine", "T": 10, "s": 1}, r"got \['T', 'kind', 's'\]"),
        ({"kind": "cosine", "T": 10, "timesteps": [3, 10]}, r"timesteps\[1\] = 10 is outside 0..9"),
    ],
)
def test_from_dict_refuses(described, message):
    with pytest.raises(InputError, match=message):
        Schedule.from_dict(described)
