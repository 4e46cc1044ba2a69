"""The samplers' tables: the golden steps of the papers' code, and the papers' equations written out in float64."""

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.samplers import SAMPLERS, ddim_encode_table, ddim_table, ddpm_table, dpmpp_table, make_table
from ddpm_fast.schedule import Schedule

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "steps.npz")
CHAINS = sorted({name.split("/")[0] for name in GOLDEN.files})
PREDICTIONS = {"epsilon": "eps", "start_x": "x0"}
VARIANCES = ["fixed_small", "fixed_large", "learned_range", "learned"]


@cache
def golden_diffusion(chain, prediction, variance):
    kind, steps = chain.split("_")
    schedule = {"linear": Schedule.linear, "cosine": Schedule.cosine}[kind](int(steps))
    loss = "hybrid" if variance.startswith("learned") else "simple"
    return GaussianDiffusion(schedule, prediction=PREDICTIONS[prediction], variance=variance, loss=loss)


def golden(chain, name):
    return torch.from_numpy(GOLDEN[f"{chain}/{name}"])


def ddim_step(x, x0, eps, ab, ab_next, eta=0.0, z=0.0):
    """[S eq. 12, 16], the coefficients in the dtype of ab and ab_next (scalar tensors)."""
    sigma = eta * ((1 - ab_next) / (1 - ab)).sqrt() * (1 - ab / ab_next).sqrt() if eta else 0.0
    return ab_next.sqrt() * x0 + (1 - ab_next - sigma**2).sqrt() * eps + sigma * z


def assert_equals_golden(table, chain, prediction, variance, key, rows, correct=None):
    """Each of the file's samples, stepped with its row of the table, to 1e-5 of the sample's largest value.

    At t <= 1 correct(i, x0) is added to the golden step: see float32_coefficients.
    """
    output = golden(chain, "model_output_2c" if variance.startswith("learned") else "model_output")
    expected, pred_x0 = (golden(chain, f"{prediction}/{variance}/{name}") for name in (key, "clip/pred_x0"))
    for i, (t, row) in enumerate(zip(golden(chain, "t").tolist(), rows, strict=True)):
        assert table.timesteps[row] == t
        # The golden step starts from q_sample, as the files' description says.
        x, z = golden(chain, "q_sample")[i : i + 1], golden(chain, "z")[i : i + 1]
        step = ops.reverse_step(x, output[i : i + 1], table.coefficients.float(), torch.tensor(row), z, return_x0=True)
        torch.testing.assert_close(step.x0[0], pred_x0[i], rtol=1e-5, atol=1e-5)
        reference = expected[i] if correct is None or t > 1 else expected[i] + correct(i, pred_x0[i])
        error = (step.x[0] - reference).abs().max() / expected[i].abs().max()
        assert error < 1e-5, f"{key} at t = {t}: {error:.2g} of the largest value"


def float32_coefficients(chain, abs_, abs_next, eta=0.0):
    """What to add to a golden DDIM step because it forms 1 - alpha_bar and sigma in float32 (eps from float64 tables).

    Where 1 - alpha_bar is near 1e-5 that costs up to 0.3% of the step's largest value; from the middle on nothing.
    """

    def correction(i, x0):
        x, x0, z = (data.double() for data in (golden(chain, "q_sample")[i], x0, golden(chain, "z")[i]))
        ab, ab_next = abs_[i], abs_next[i]
        eps = (x - ab.sqrt() * x0) / (1 - ab).sqrt()
        exact, rounded = (
            ddim_step(x, x0, eps, *pair, eta, z) for pair in ((ab, ab_next), (ab.float(), ab_next.float()))
        )
        return (exact - rounded).float()

    return correction


@pytest.mark.pairwise
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("chain", CHAINS)
def test_ancestral_step_equals_the_golden_p_sample(chain, prediction, variance, backend):
    diffusion = golden_diffusion(chain, prediction, variance)
    rows = diffusion.num_timesteps - 1 - golden(chain, "t")
    assert_equals_golden(ddpm_table(diffusion), chain, prediction, variance, "p_sample", rows.tolist())


@pytest.mark.pairwise
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("chain", CHAINS)
def test_ddim_step_equals_the_golden_one(chain, prediction, variance, eta, backend):
    diffusion, t = golden_diffusion(chain, prediction, variance), golden(chain, "t")
    rows = diffusion.num_timesteps - 1 - t
    abs_, abs_next = diffusion.schedule.alphas_cumprod[t], diffusion.schedule.alphas_cumprod_prev[t]
    correct = float32_coefficients(chain, abs_, abs_next, eta)
    table = ddim_table(diffusion, eta)
    assert_equals_golden(table, chain, prediction, variance, f"ddim_eta{eta}", rows.tolist(), correct)


@pytest.mark.pairwise
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("chain", CHAINS)
def test_ddim_encoding_step_equals_the_golden_one(chain, prediction, variance, backend):
    diffusion, t = golden_diffusion(chain, prediction, variance), golden(chain, "t")
    assert len(ddim_encode_table(diffusion).timesteps) == diffusion.num_timesteps - 1
    # The golden step from T-1 goes to alpha_bar = 0, beyond the chain: here one step further, to 1e-14 of its last.
    betas = torch.cat([diffusion.schedule.betas, torch.tensor([1 - 1e-14], dtype=torch.float64)])
    further = GaussianDiffusion(Schedule.from_betas(betas), **diffusion.objective.to_dict())
    abs_, abs_next = further.schedule.alphas_cumprod[t], further.schedule.alphas_cumprod[t + 1]
    correct = float32_coefficients(chain, abs_, abs_next)
    table = ddim_encode_table(further)
    assert_equals_golden(table, chain, prediction, variance, "ddim_reverse", t.tolist(), correct)
    torch.testing.assert_close(ddim_encode_table(diffusion).coefficients, table.coefficients[:-1], rtol=0, atol=0)


# --- the equations, written out in float64


def apply(row, x, out, x0_previous=0.0, z=0.0):
    """A row as the kernels read it."""
    a_x, a_out, b_x, b_x0, b_previous, sigma, clip, _ = row.tolist()
    x0 = (a_x * x + a_out * out).clamp(-clip, clip)
    return b_x * x + b_x0 * x0 + b_previous * x0_previous + sigma * z, x0


def network(x, t):
    """Some smooth function of both, that makes x0 go beyond [-1, 1] now and then."""
    return torch.sin(2 * x + t / 300) + 0.3 * x


def states(shape=(3, 50), seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def steps_of(table, x, noise):
    """The states that the table's rows give, one after each."""
    x0 = torch.zeros_like(x)
    for row, t, z in zip(table.coefficients, table.timesteps, noise, strict=True):
        x, x0 = apply(row, x, network(x, t), x0, z)
        yield x


def alpha_bars(schedule, timesteps):
    """alpha_bar at the given steps, first to last, and the 1 that the last one goes to: float64 [S + 1]."""
    return torch.cat([schedule.alphas_cumprod[timesteps], torch.ones(1, dtype=torch.float64)])


@pytest.mark.pairwise
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 299])
def test_ddim_takes_eps_from_the_clipped_x0_and_its_successor_from_the_list(steps, eta, clip):
    # Pitfalls: eps from before the clip, and "previous t" as t - T//N, which for 299 steps is wrong at 100 of them.
    diffusion = GaussianDiffusion(Schedule.cosine(1000), "v")
    table = make_table(diffusion, "ddim", steps, eta=eta, clip=clip)
    x, noise = states(), states((steps, 3, 50), seed=1)
    abs_ = alpha_bars(diffusion.schedule, table.timesteps)
    got = steps_of(table, x, noise)
    for ab, ab_next, t, z in zip(abs_[:-1], abs_[1:], table.timesteps, noise, strict=True):
        x0 = ab.sqrt() * x - (1 - ab).sqrt() * network(x, t)
        x0 = x0.clamp(-1, 1) if clip else x0
        x = ddim_step(x, x0, (x - ab.sqrt() * x0) / (1 - ab).sqrt(), ab, ab_next, eta, z)
        torch.testing.assert_close(next(got), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sde", [False, True], ids=["ode", "sde"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_dpm_solver_pp_equals_its_algorithm(steps, order, sde):
    diffusion = GaussianDiffusion(Schedule.linear(1000), "eps")
    kept = make_table(diffusion, "ddpm", steps).timesteps
    table = dpmpp_table(diffusion.respace(kept.flip(0).tolist()), order=order, sde=sde)
    x, noise = states(), states((steps, 3, 50), seed=1)
    abs_ = alpha_bars(diffusion.schedule, kept).tolist()
    lambdas = [math.log(math.sqrt(ab) / math.sqrt(1 - ab)) for ab in abs_[:-1]] + [math.inf]
    got, x0_previous = steps_of(table, x, noise), None
    for i, (t, z) in enumerate(zip(kept, noise, strict=True)):
        ab, ab_next, h = abs_[i], abs_[i + 1], lambdas[i + 1] - lambdas[i]
        x0 = ((x - math.sqrt(1 - ab) * network(x, t)) / math.sqrt(ab)).clamp(-1, 1)
        D = x0
        if order == 2 and 0 < i < steps - 1:
            r = (lambdas[i] - lambdas[i - 1]) / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_previous
        scale = math.sqrt((1 - ab_next) / (1 - ab))
        if sde:
            x = scale * math.exp(-h) * x + math.sqrt(ab_next) * (1 - math.exp(-2 * h)) * D
            x = x + math.sqrt(1 - ab_next) * math.sqrt(1 - math.exp(-2 * h)) * z
        else:
            x = scale * x - math.sqrt(ab_next) * (math.exp(-h) - 1) * D
        torch.testing.assert_close(next(got), x, rtol=1e-9, atol=1e-9)
        x0_previous = x0


PLANS = {
    "ddpm": {"sampler": "ddpm"},
    "ddim": {"sampler": "ddim"},
    "ddim, eta 0.4": {"sampler": "ddim", "eta": 0.4},
    "ddim, eta 1": {"sampler": "ddim", "eta": 1},
    "dpmpp_1": {"sampler": "dpmpp_1"},
    "dpmpp_2m": {"sampler": "dpmpp_2m"},
    "dpmpp_2m_sde": {"sampler": "dpmpp_2m_sde"},
}


@pytest.mark.parametrize("zero_terminal", [False, True], ids=["some signal at T-1", "zero terminal SNR"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_row_keeps_the_marginals(plan, zero_terminal):
    # q(x_t | x_0) = N(sqrt(ab) x_0, 1 - ab) must become q(x_t' | x_0) when the network knows x_0 [S lemma 1].
    schedule = Schedule.cosine(1000)
    schedule = schedule.zero_terminal_snr() if zero_terminal else schedule
    diffusion = GaussianDiffusion(schedule, "v", variance="fixed_small")
    for steps in (1, 2, 3, 10, 1000):
        table = make_table(diffusion, steps=steps, **PLANS[plan])
        b_x, b_x0, b_previous, sigma, clip, spread = table.coefficients[:, 2:].unbind(1)
        assert table.coefficients.isfinite().all() and (clip == 1).all() and (spread == 0).all()
        abs_ = alpha_bars(schedule, table.timesteps)
        ab, ab_next = abs_[:-1], abs_[1:]
        torch.testing.assert_close(b_x * ab.sqrt() + b_x0 + b_previous, ab_next.sqrt(), rtol=0, atol=1e-12)
        torch.testing.assert_close(b_x**2 * (1 - ab) + sigma**2, 1 - ab_next, rtol=0, atol=1e-12)
        assert table.coefficients[-1, 2:6].tolist() == [0, 1, 0, 0]  # the last step gives x_0, without noise


@pytest.mark.parametrize("chain", ["linear", "cosine"])
def test_equal_samplers_have_equal_rows(chain):
    diffusion = GaussianDiffusion(getattr(Schedule, chain)(1000), variance="fixed_small").respace(20)

    def rows(table):
        return table.coefficients

    # DDIM with eta = 1 is ancestral sampling with the posterior's variance [S sec. 4.1], and so is the first-order SDE.
    torch.testing.assert_close(rows(ddim_table(diffusion, 1.0)), rows(ddpm_table(diffusion)), rtol=1e-9, atol=1e-12)
    ancestral = rows(dpmpp_table(diffusion, order=1, sde=True))
    torch.testing.assert_close(ancestral, rows(ddpm_table(diffusion)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rows(dpmpp_table(diffusion, order=1)), rows(ddim_table(diffusion)), rtol=0, atol=0)


def test_second_order_starts_and_ends_in_first_order():
    diffusion = GaussianDiffusion(Schedule.linear(1000))
    for sampler, first_order in (("dpmpp_2m", "dpmpp_1"), ("dpmpp_2m_sde", "ddim")):
        eta = 1.0 if first_order == "ddim" else None
        second, first = (
            make_table(diffusion, name, 8, eta=e, spacing="quadratic")
            for name, e in ((sampler, None), (first_order, eta))
        )
        b_previous = second.coefficients[:, 4]
        assert b_previous[0] == b_previous[-1] == 0 and (b_previous[1:-1] < 0).all()
        torch.testing.assert_close(second.coefficients[[0, -1]], first.coefficients[[0, -1]], rtol=1e-12, atol=0)
        assert not make_table(diffusion, sampler, 2).coefficients[:, 4].any()


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_second_order_from_zero_terminal_snr_extrapolates_from_its_third_step_on(sampler):
    # The first step comes from lambda = -inf: its h is infinite, and the second step's 1/(2r) is 0.
    diffusion = GaussianDiffusion(Schedule.linear(1000).zero_terminal_snr(), "v")
    b_previous = make_table(diffusion, sampler, 6).coefficients[:, 4]
    assert (b_previous != 0).tolist() == [False, False, True, True, True, False]


def test_encoding_and_decoding_follow_the_line_of_a_constant_x0():
    # When the network always predicts c, x_t = sqrt(ab) c + sqrt(1-ab) eps with one eps for all t: both are exact.
    diffusion = GaussianDiffusion(Schedule.cosine(1000), "x0").respace(25)
    ab = diffusion.schedule.alphas_cumprod
    c, eps = states(seed=3).clamp(-1, 1), states(seed=4)
    line = [a.sqrt() * c + (1 - a).sqrt() * eps for a in ab]
    encode, decode = ddim_encode_table(diffusion), ddim_table(diffusion)
    assert encode.timesteps.tolist() == diffusion.schedule.timesteps[:-1].tolist()
    x = line[0]
    for row, expected in zip(encode.coefficients, line[1:], strict=True):
        x, _ = apply(row, x, c)
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)
    for row, expected in zip(decode.coefficients, [*line[-2::-1], c], strict=True):
        x, _ = apply(row, x, c)
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)


# --- pitfalls


@pytest.mark.parametrize("spacing", ["even", "quadratic"])
def test_first_step_is_always_at_the_last_timestep(spacing):
    # Pitfall: "leading" spacing starts from pure noise at a step that expects less of it.
    for T, counts in ((40, range(1, 41)), (1000, (1, 2, 3, 7, 50, 299, 600, 999, 1000))):
        diffusion = GaussianDiffusion(Schedule.cosine(T))
        for steps in counts:
            timesteps = make_table(diffusion, "ddim", steps, spacing=spacing).timesteps
            assert timesteps[0] == T - 1 and len(timesteps) == steps
            assert (timesteps.diff() < 0).all()


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        pytest.param(None, 1000, id="all"),
        pytest.param("10,15,20", 45, id="sections"),
        pytest.param("10,15,1", 26, id="a section of one step, its first"),
        pytest.param("ddim50", 50, id="strides from 0"),
        pytest.param([0, 3, 700, 999], 4, id="a list"),
        pytest.param(torch.tensor([5, 999]), 2, id="a tensor"),
    ],
)
def test_every_way_to_say_the_steps_starts_at_the_last_timestep(steps, count):
    timesteps = make_table(GaussianDiffusion(Schedule.cosine(1000)), "dpmpp_2m", steps).timesteps
    assert timesteps[0] == 999 and len(timesteps) == count and (timesteps.diff() < 0).all()


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_1", "dpmpp_2m"])
def test_without_eta_no_noise_is_drawn(sampler, backend):
    # Pitfall: a step without noise must not pay for it. NaN shows whether it was looked at.
    table = make_table(GaussianDiffusion(Schedule.cosine(1000)), sampler, 10)
    assert (table.coefficients[:, 5] == 0).all()
    x, x0 = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    for i in range(10):
        step = ops.reverse_step(
            x,
            torch.ones_like(x),
            table.coefficients.float(),
            torch.tensor(i),
            torch.full_like(x, math.nan),
            x0_previous=x0,
        )
        assert step.x.isfinite().all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_last_step_adds_no_noise(variance):
    for plan in PLANS.values():
        diffusion = golden_diffusion("linear_1000", "epsilon", variance)
        sigma, spread = make_table(diffusion, steps=10, **plan).coefficients[:, [5, 7]].unbind(1)
        assert sigma[-1] == 0 and spread[-1] == 0
        if plan["sampler"] == "ddpm":
            assert (sigma[:-1] > 0).all() and (spread[:-1] != 0).all() == variance.startswith("learned")
        else:
            assert (spread == 0).all()  # these set the variance themselves


def test_a_respaced_chain_tells_the_network_the_original_steps():
    diffusion = GaussianDiffusion(Schedule.cosine(1000)).respace([0, 100, 500, 999])
    assert make_table(diffusion, "ddim").timesteps.tolist() == [999, 500, 100, 0]
    assert make_table(diffusion, "ddim", 2).timesteps.tolist() == [999, 0]
    assert make_table(diffusion, "ddim", [1, 3]).timesteps.tolist() == [999, 100]


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"sampler": "euler"}, r"'euler' is unknown; there are ddpm, ddim, dpmpp_1", id="unknown sampler"),
        pytest.param({"sampler": ["ddim"]}, r"\['ddim'\] is unknown", id="a list for a sampler"),
        pytest.param({"steps": 0}, r"T = 100; ask for 1..100", id="no steps"),
        pytest.param({"steps": 101}, r"T = 100; ask for 1..100", id="more steps than the chain has"),
        pytest.param({"steps": -3}, r"-3 steps.*ask for 1..100", id="negative steps"),
        pytest.param({"steps": [0, 50]}, r"ends at 50.*end the list with 99", id="a list without the last step"),
        pytest.param({"steps": 2.5}, r"cannot read the respacing 2.5", id="a fraction of a step"),
        pytest.param({"spacing": "leading"}, r"'leading' is unknown; there are even, quadratic", id="unknown spacing"),
        pytest.param({"sampler": "ddim", "eta": 1.5}, r"eta is 1.5; expected a number from 0", id="eta above 1"),
        pytest.param({"sampler": "ddim", "eta": -0.1}, r"eta is -0.1; expected a number from 0", id="eta below 0"),
        pytest.param({"sampler": "ddim", "eta": math.nan}, r"eta is nan; expected", id="eta not a number"),
        pytest.param({"sampler": "ddim", "eta": math.inf}, r"eta is inf; expected", id="infinite eta"),
        pytest.param({"sampler": "ddim", "eta": "0.5"}, r"eta is '0.5'; expected", id="eta as text"),
        pytest.param({"sampler": "ddim", "eta": True}, r"eta is True; expected", id="eta as a switch"),
        pytest.param({"sampler": "ddpm", "eta": 0.5}, r"eta belongs to ddim, and ddpm has none", id="eta for ddpm"),
        pytest.param({"sampler": "dpmpp_2m", "eta": 0.0}, r"eta belongs to ddim, and dpmpp_2m", id="eta 0 for dpmpp"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_table(GaussianDiffusion(Schedule.linear(100)), **arguments)


def test_an_order_beyond_the_second_is_refused():
    with pytest.raises(InputError, match=r"order = 3: expected 1 or 2"):
        dpmpp_table(GaussianDiffusion(Schedule.linear(100)), order=3)


def test_the_samplers_names():
    assert list(SAMPLERS) == ["ddpm", "ddim", "dpmpp_1", "dpmpp_2m", "dpmpp_2m_sde"]
