"""Which timesteps a respaced chain keeps and a sampler visits: the papers' code (tests/golden), cases, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.respacing import sampling_timesteps
from ddpm_fast.schedule import Schedule

GOLDEN = Path(__file__).parents[1] / "golden"


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
    betas = torch.from_numpy(golden[f"{T}/{spec}/cosine_betas"])
    torch.testing.assert_close(schedule.betas, betas, rtol=1e-12, atol=0)


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
        ("ddim37", "no integer stride leaves 37 of 100 timesteps; use 'ddim34' or 'ddim50' or '37'"),
        ("ddim101", "no integer stride leaves 101 of 100 timesteps; use 'ddim100'"),
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


# --- what a sampler visits


@pytest.mark.parametrize(
    "spec, spacing, expected",
    [
        pytest.param(None, "even", list(range(10)), id="all steps"),
        pytest.param(None, "quadratic", list(range(10)), id="all steps, which no spacing changes"),
        pytest.param(3, "even", [0, 4, 9], id="a number: both ends"),
        pytest.param("3", "even", [0, 4, 9], id="a number as text"),
        pytest.param(1, "even", [9], id="one step, from pure noise"),
        pytest.param(4, "quadratic", [0, 1, 4, 9], id="squares"),
        pytest.param("4", "quadratic", [0, 1, 4, 9], id="squares, a number as text"),
        pytest.param(7, "quadratic", [0, 1, 2, 3, 4, 6, 9], id="squares 0, .25, 1, 2.25, 4, 6.25, 9: 1 moves to 2"),
        pytest.param(1, "quadratic", [9], id="one square"),
        pytest.param("2,2", "even", [0, 4, 5, 9], id="sections"),
        pytest.param("1,1", "even", [0, 9], id="sections: 5 moves to the end"),
        pytest.param("2,0", "even", [0, 9], id="an empty last section: 4 moves to the end"),
        pytest.param("ddim5", "even", [0, 2, 4, 6, 9], id="strides: 8 moves to the end"),
        pytest.param("ddim4", "even", [0, 3, 6, 9], id="strides that reach the end"),
        pytest.param([2, 9], "even", [2, 9], id="a list"),
        pytest.param(torch.tensor([2, 9]), "even", [2, 9], id="a tensor"),
    ],
)
def test_a_sampler_visits(spec, spacing, expected):
    visited = sampling_timesteps(spec, 10, spacing)
    assert visited == expected
    assert all(type(t) is int for t in visited)


def test_leading_spacing_is_not_used_it_never_visits_the_last_step():
    leading = np.arange(600) * (1000 // 600)
    assert leading[-1] == 599
    for spec in (600, "600", "300,300", "ddim500"):
        assert sampling_timesteps(spec, 1000)[-1] == 999
    assert sampling_timesteps("ddim50", 1000)[-2:] == [960, 999]


@pytest.mark.parametrize("spacing", ["even", "quadratic"])
def test_any_number_of_steps_visits_both_ends_and_nothing_twice(spacing):
    for T in range(1, 70):
        for N in range(1, T + 1):
            visited = sampling_timesteps(N, T, spacing)
            assert len(visited) == len(set(visited)) == N
            assert visited == sorted(visited)
            assert visited[-1] == T - 1
            assert N == 1 or visited[0] == 0


def test_quadratic_spacing_follows_the_curve_where_its_steps_are_apart():
    visited = np.array(sampling_timesteps(50, 1000, "quadratic"))
    curve = (np.arange(50) / 49) ** 2 * 999
    collide = curve < np.arange(50)
    assert collide.sum() == 2  # 0.42 and 1.66 leave 1 and 2 as they are
    assert np.abs(visited - curve)[~collide].max() <= 0.5
    assert visited[:4].tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize(
    "spec, spacing, message",
    [
        (1200, "even", r"^cannot take 1200 steps: the model's chain has T = 1000; ask for 1..1000$"),
        ("1200", "even", "cannot take 1200 steps"),
        (1200, "quadratic", "cannot take 1200 steps"),
        (0, "even", "cannot take 0 steps"),
        (-3, "quadratic", "cannot take -3 steps"),
        (True, "even", "cannot read the respacing True"),
        (25.0, "even", "cannot read the respacing 25.0"),
        ("many", "even", "cannot read the respacing 'many'"),
        ("600,10", "even", "cannot keep 600 timesteps where section 0 of 2 has 500"),
        ("ddim37", "even", "no integer stride leaves 37 of 1000"),
        ([0, 980], "even", r"ends at 980, .* pure noise, which is step T-1 = 999: end the list with 999"),
        ([999, 0], "even", r"timesteps\[1\] = 0 is below timesteps\[0\] = 999"),
        ([], "even", "the list of timesteps is empty"),
        ("10,15", "quadratic", "quadratic spacing needs a number of steps, got '10,15', .* ask for 25 steps"),
        ("ddim50", "quadratic", "quadratic spacing needs a number of steps, got 'ddim50'"),
        ([0, 999], "quadratic", r"quadratic spacing needs a number of steps, got \[0, 999\]"),
        (25, "cubic", "spacing 'cubic' is unknown; there are even, quadratic"),
        (None, ["even"], r"spacing \['even'\] is unknown"),
    ],
)
def test_sampling_timesteps_refuses(spec, spacing, message):
    with pytest.raises(InputError, match=message):
        sampling_timesteps(spec, 1000, spacing)
