"""GaussianDiffusion against the papers' code (tests/golden), the Markov chain whose closed form q_sample is,
Bayes' rule for Gaussians, and bad input. The losses and variances: see test_diffusion_losses.py."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.schedule import Schedule

GOLDEN = Path(__file__).parents[1] / "golden"
CHAINS = ["linear_1000", "cosine_1000", "cosine_4000"]


@cache
def golden(chain: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "steps.npz") as file:
        return {key.split("/", 1)[1]: torch.from_numpy(file[key]) for key in file.files if key.startswith(chain)}


def diffusion_of(chain: str, **choices) -> GaussianDiffusion:
    kind, T = chain.split("_")
    return GaussianDiffusion(getattr(Schedule, kind)(int(T)), **choices)


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5) -> None:
    """Within rtol of each sample's largest value: x_0 at t = T-1 is a difference of numbers of that size."""
    assert actual.shape == expected.shape
    scale = expected.flatten(1).abs().amax(1) if expected.ndim > 1 else expected.abs()
    error = (actual - expected).abs()
    worst = error.flatten(1).amax(1) if expected.ndim > 1 else error
    assert (worst <= rtol * scale).all(), f"per sample, relative: {(worst / scale).tolist()}"


# --- the papers' code


@pytest.mark.parametrize("chain", CHAINS)
def test_q_sample_matches_the_papers_code(chain):
    g = golden(chain)
    close(diffusion_of(chain).q_sample(g["x0"], g["t"], g["noise"]), g["q_sample"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chain", CHAINS)
def test_q_posterior_matches_the_papers_code(chain, dtype):
    g = golden(chain)
    posterior = diffusion_of(chain).q_posterior(g["x0"].to(dtype), g["q_sample"].to(dtype), g["t"])
    assert all(part.dtype == dtype for part in posterior)
    close(posterior.mean, g["q_posterior_mean"].to(dtype))
    close(posterior.log_variance, g["q_posterior_log_variance"].to(dtype))
    # The posterior's variance is its logarithm's exponential except at t = 0, where it is 0.
    close(posterior.variance[1:], g["q_posterior_log_variance"][1:].to(dtype).exp())
    assert (posterior.variance[0] == 0).all()


def test_v_losses_are_those_of_the_definition():
    g = golden("cosine_1000")
    ab = Schedule.cosine(1000).alphas_cumprod[g["t"]][:, None, None, None]
    v = ab.sqrt() * g["noise"].double() - (1 - ab).sqrt() * g["x0"].double()
    losses = diffusion_of("cosine_1000", prediction="v").training_losses(g["model_output"], g["x0"], g["t"], g["noise"])
    close(losses.double(), ((g["model_output"].double() - v) ** 2).mean((1, 2, 3)))


def test_v_prediction_finds_x0_and_the_posterior_of_it():
    g = golden("cosine_1000")
    diffusion = diffusion_of("cosine_1000", prediction="v")
    x0, noise = g["x0"].double(), g["noise"].double()
    ab = diffusion.schedule.alphas_cumprod[g["t"]][:, None, None, None]
    x_t, v = ab.sqrt() * x0 + (1 - ab).sqrt() * noise, ab.sqrt() * noise - (1 - ab).sqrt() * x0
    p = diffusion.p_mean_variance(v, x_t, g["t"], clip=False)
    close(p.pred_x0, x0, rtol=1e-14)
    close(p.mean, diffusion.q_posterior(x0, x_t, g["t"]).mean, rtol=1e-13)


# --- pitfalls


@pytest.mark.parametrize("chain", CHAINS)
def test_x0_is_clipped_before_the_posterior_mean(chain):
    g = golden(chain)
    diffusion = diffusion_of(chain)
    p = diffusion.p_mean_variance(g["model_output"], g["q_sample"], g["t"])
    free = diffusion.p_mean_variance(g["model_output"], g["q_sample"], g["t"], clip=False)
    assert p.pred_x0.abs().max() == 1 and free.pred_x0.abs().max() > 1
    close(p.mean, diffusion.q_posterior(p.pred_x0, g["q_sample"], g["t"]).mean)
    clipped_after = free.mean.clamp(-1, 1)
    assert (p.mean - clipped_after).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_x0_from_half_precision_is_formed_in_float32(dtype):
    diffusion = GaussianDiffusion(Schedule.cosine(4000))
    x_t, output = torch.full((1, 1, 2), 3.0, dtype=dtype), torch.full((1, 1, 2), -3.0, dtype=dtype)
    p = diffusion.p_mean_variance(output, x_t, torch.tensor([3999]), clip=False)
    assert p.pred_x0.dtype == torch.float32
    # (x + sqrt(1 - ab) 3) sqrt(1/ab) = 486,990, beyond float16's 65,504.
    torch.testing.assert_close(p.pred_x0, torch.full((1, 1, 2), 6 * 81_165.0), rtol=1e-5, atol=0)


def test_fixed_large_variance_at_0_is_the_posterior_variance_of_1():
    schedule = Schedule.cosine(1000)
    x = torch.zeros(2, 1, dtype=torch.float64)
    p = GaussianDiffusion(schedule, variance="fixed_large").p_mean_variance(x, x, torch.tensor([0, 1]))
    expected = torch.stack([schedule.posterior_variance[1], schedule.betas[1]])[:, None]
    torch.testing.assert_close(p.variance, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(p.log_variance, expected.log(), rtol=1e-13, atol=0)


# --- the chain behind the closed form


@pytest.mark.parametrize("chain", [Schedule.linear(40), Schedule.cosine(1000).respace(20)], ids=["linear", "respaced"])
def test_q_sample_has_the_moments_of_the_markov_chain(chain):
    """x_t drawn at once, against steps of q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)."""
    n, generator = 100_000, torch.Generator().manual_seed(0)
    x0 = torch.tensor([0.8, -0.3]).repeat(n, 1)
    diffusion = GaussianDiffusion(chain)
    x = x0.double()
    for t, beta in enumerate(chain.betas):
        z = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = (1 - beta).sqrt() * x + beta.sqrt() * z
        if t % 5 in (0, 4):
            noise = torch.randn(x0.shape, generator=generator)
            at_once = diffusion.q_sample(x0, torch.full((n,), t), noise).double()
            std = x.std(0)
            # 6 standard errors of the difference of two means, and of two standard deviations.
            assert ((x.mean(0) - at_once.mean(0)).abs() < 6 * std * (2 / n) ** 0.5).all()
            assert ((std - at_once.std(0)).abs() < 6 * std * n**-0.5).all()


def test_q_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add, means weigh by them."""
    schedule = Schedule.linear(100)
    t = torch.arange(1, 100)
    x0, x_t = torch.randn(2, 99, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    beta, ab_prev = schedule.betas[t, None], schedule.alphas_cumprod[t - 1, None]
    likelihood, prior = (1 - beta) / beta, 1 / (1 - ab_prev)
    mean = (likelihood * x_t / (1 - beta).sqrt() + prior * ab_prev.sqrt() * x0) / (likelihood + prior)
    posterior = GaussianDiffusion(schedule).q_posterior(x0, x_t, t)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(posterior.variance, (1 / (likelihood + prior)).expand(99, 3), rtol=1e-10, atol=0)


# --- shapes, dtypes, memory formats, transforms


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((3, 5), id="vectors"),
        pytest.param((3, 2, 7), id="sequences"),
        pytest.param((3, 1, 2, 3, 4), id="volumes"),
        pytest.param((0, 3, 4, 4), id="empty batch"),
    ],
)
def test_any_number_of_trailing_dimensions(shape):
    diffusion = GaussianDiffusion(Schedule.cosine(10))
    x, t = torch.rand(shape), torch.arange(shape[0])
    p, posterior = diffusion.p_mean_variance(x, x, t), diffusion.q_posterior(x, x, t)
    assert all(part.shape == shape for part in (*p, *posterior))
    assert diffusion.q_sample(x, t, x).shape == shape
    assert diffusion.training_losses(x, x, t, x).shape == shape[:1]


def test_uint8_images_mean_minus_one_to_one():
    diffusion = GaussianDiffusion(Schedule.cosine(10))
    pixels = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    x0, t, noise = torch.tensor([[-1, -0.6, 1]]), torch.tensor([5]), torch.tensor([[0.5, -1, 2]])
    torch.testing.assert_close(diffusion.q_sample(pixels, t, noise), diffusion.q_sample(x0, t, noise))
    torch.testing.assert_close(
        diffusion.training_losses(noise, pixels, t, x0), diffusion.training_losses(noise, x0, t, x0)
    )
    torch.testing.assert_close(diffusion.q_posterior(pixels, noise, t), diffusion.q_posterior(x0, noise, t))


def test_q_sample_in_another_dtype():
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    noise = torch.zeros(2, 3, 4, 4)
    diffusion = GaussianDiffusion(Schedule.cosine(10))
    assert diffusion.q_sample(pixels, torch.tensor([0, 9]), noise).dtype == torch.float32
    assert diffusion.q_sample(pixels, torch.tensor([0, 9]), noise, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_channels_last_is_kept():
    x = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    t = torch.tensor([0, 9])
    diffusion = GaussianDiffusion(Schedule.cosine(10))
    p = diffusion.p_mean_variance(x, x, t)
    for part in (p.mean, p.pred_x0, diffusion.q_posterior(x, x, t).mean):
        assert part.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "ask",
    [
        lambda d, x, t: d.p_mean_variance(x, x, t).mean,
        lambda d, x, t: d.q_posterior(x, x, t).mean,
        lambda d, x, t: d.training_losses(d.q_sample(x, t, x), x, t, x),
    ],
    ids=["p_mean_variance", "q_posterior", "training"],
)
def test_compiles_into_one_graph(ask):
    diffusion = GaussianDiffusion(Schedule.cosine(10))
    x, t = torch.rand(2, 3, 4, 4), torch.tensor([0, 9])
    compiled = torch.compile(lambda x, t: ask(diffusion, x, t), fullgraph=True, backend="eager")
    expected = ask(diffusion, x, t)
    torch.testing.assert_close(compiled(x, t), expected)


def test_training_after_sampling_under_inference_mode():
    diffusion = GaussianDiffusion(Schedule.cosine(10))
    x, t = torch.rand(2, 3, 4, 4), torch.tensor([0, 9])
    with torch.inference_mode():
        diffusion.p_mean_variance(x, x, t)
    output = x.clone().requires_grad_()
    (diffusion.training_losses(output, x, t, x).sum() + diffusion.p_mean_variance(output, x, t).mean.sum()).backward()
    assert output.grad.isfinite().all()


def test_tables_are_made_once_per_device_and_dtype():
    diffusion = GaussianDiffusion(Schedule.cosine(10))
    table = diffusion.table("bound", torch.device("cpu"), clip=True, decoder="exact")
    assert diffusion.table("bound", torch.device("cpu"), clip=True, decoder="exact") is table
    assert diffusion.table("bound", torch.device("cpu"), clip=False) is not table
    assert table.dtype == torch.float32
    assert diffusion.table("loss", torch.device("cpu"), torch.float64).dtype == torch.float64
    assert diffusion.table("loss", torch.device("meta")).device.type == "meta"


# --- bad input


@pytest.mark.parametrize("t", [7, np.int64(7)])
def test_one_t_for_all_samples(t):
    diffusion, key = GaussianDiffusion(Schedule.cosine(10)), NoiseKey.of(0, 2)
    x = torch.randn(2, 3, 4, 4)
    calls = (
        lambda t: diffusion.q_sample(x, t, key),
        lambda t: diffusion.training_losses(x, x, t, key),
        lambda t: diffusion.vlb_terms(x, x, t, key).bits_per_dim,
        lambda t: diffusion.p_mean_variance(x, x, t).mean,
        lambda t: diffusion.q_posterior(x, x, t).mean,
    )
    for call in calls:
        assert torch.equal(call(t), call(torch.full((2,), 7)))


@pytest.mark.parametrize("x0", [[[0.5]], None, np.zeros((2, 3, 4, 4)), torch.zeros(2, 3, 4, 4).to_sparse()])
def test_images_that_are_no_dense_tensor_are_refused(x0):
    diffusion, key, output = GaussianDiffusion(Schedule.cosine(10)), NoiseKey.of(0, 2), torch.zeros(2, 3, 4, 4)
    t = torch.tensor([0, 1])
    for call in (
        lambda: diffusion.q_sample(x0, t, key),
        lambda: diffusion.q_sample(x0, 1, key),
        lambda: diffusion.training_losses(output, x0, t, key),
        lambda: diffusion.vlb_terms(output, x0, t, key),
        lambda: diffusion.prior_bits_per_dim(x0),
        lambda: diffusion.q_posterior(x0, output, t),
    ):
        with pytest.raises(InputError, match=r"x0 is a .*: expected a tensor|x0 is a torch.sparse_coo tensor"):
            call()


X = torch.zeros(2, 3, 4, 4)
T = torch.tensor([0, 9])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"t": torch.tensor([0, 10])}, r"t\[1\] = 10 is outside 0..9 \(1 of 2 values are\)"),
        ({"t": torch.tensor([-1, 10])}, r"t\[0\] = -1 is outside 0..9 \(2 of 2 values are\)"),
        ({"t": T.int()}, r"t is torch.int32 \[2\]: expected int64 \[2\]"),
        ({"t": T[:1]}, r"t is torch.int64 \[1\]: expected int64 \[2\]"),
        ({"t": 10}, r"t is 10; expected an integer in 0\.\.9"),
        ({"t": True}, "t is True, a bool; expected an integer"),
        ({"t": 3.0}, r"t is 3.0, a float: expected an int64 tensor \[2\], or one int for all samples"),
        ({"t": [0, 9]}, r"t is \[0, 9\], a list: expected an int64 tensor \[2\]"),
        ({"x_t": X.to_sparse()}, r"x_t is a torch.sparse_coo tensor: expected a dense one"),
        ({"t": T.to("meta")}, "t is on meta but x_t on cpu"),
        ({"x_t": X.to(torch.uint8)}, "x_t is torch.uint8: expected a floating dtype"),
        ({"x_t": X.numpy()}, "x_t is a ndarray: expected a tensor"),
        ({"x_t": X[0, 0, 0], "output": X[0, 0, 0]}, r"x_t has shape \[4\]: expected \[N, C, ...\]"),
        ({"output": X.long()}, "output is torch.int64: expected a floating dtype"),
        (
            {"output": X.repeat(1, 2, 1, 1)},
            r"output has shape \[2, 6, 4, 4\]: expected \[2, 3, 4, 4\], because x_t has .*= 'learned_range'",
        ),
        ({"output": X.to("meta")}, "output is on meta but x_t on cpu"),
    ],
)
def test_p_mean_variance_refuses(change, message):
    arguments = {"output": X, "x_t": X, "t": T, **change}
    with pytest.raises(InputError, match=message):
        GaussianDiffusion(Schedule.cosine(10)).p_mean_variance(**arguments)


def test_q_posterior_refuses_integers_other_than_uint8():
    with pytest.raises(InputError, match=r"x0 is torch.int64: expected a floating dtype or uint8"):
        GaussianDiffusion(Schedule.cosine(10)).q_posterior(X.long(), X, T)


@pytest.mark.parametrize("t", [torch.tensor([0, 10]), torch.tensor([-1, 0])])
def test_q_sample_and_training_losses_refuse_t_outside_the_schedule(t):
    diffusion = GaussianDiffusion(Schedule.cosine(10))
    with pytest.raises(InputError, match=r"(10|-1)\b.*\b9\b"):
        diffusion.q_sample(X, t, X)
    with pytest.raises(InputError, match=r"(10|-1)\b.*\b9\b"):
        diffusion.training_losses(X, X, t, X)


def test_q_sample_and_training_losses_refuse_shapes_that_do_not_fit():
    diffusion = GaussianDiffusion(Schedule.cosine(10))
    for call in (
        lambda: diffusion.q_sample(X, T, X[:, :1]),
        lambda: diffusion.q_sample(X, T[:1], X),
        lambda: diffusion.training_losses(X[:, :1], X, T, X),
    ):
        with pytest.raises(InputError, match="shape"):
            call()


def test_an_unknown_choice_or_a_missing_schedule_is_refused():
    with pytest.raises(InputError, match="choose one of 'eps', 'x0', 'v'"):
        GaussianDiffusion(Schedule.cosine(10), prediction="score")
    with pytest.raises(InputError, match="expected a Schedule, got str"):
        GaussianDiffusion("cosine")


# --- respacing and checkpoints


def test_respacing_keeps_the_marginals_and_the_objective():
    diffusion = GaussianDiffusion(Schedule.cosine(1000), "v", "fixed_small")
    respaced = diffusion.respace(10)
    assert respaced.num_timesteps == 10
    assert respaced.objective == diffusion.objective
    x = torch.rand(10, 2, dtype=torch.float64)
    kept = respaced.schedule.timesteps
    torch.testing.assert_close(
        respaced.p_mean_variance(x, x, torch.arange(10), clip=False).pred_x0,
        diffusion.p_mean_variance(x, x, kept, clip=False).pred_x0,
        rtol=1e-12,
        atol=1e-12,
    )


def test_to_dict_round_trips():
    diffusion = GaussianDiffusion(Schedule.linear(100), "v", "fixed_small").respace(10)
    described = diffusion.to_dict()
    assert described["prediction"] == "v" and described["schedule"]["kind"] == "linear"
    again = GaussianDiffusion.from_dict(described)
    assert again.to_dict() == described
    assert torch.equal(again.schedule.betas, diffusion.schedule.betas)


@pytest.mark.parametrize("described", [None, {}, {"schedule": {"kind": "cosine", "T": 10}, "prediction": "eps"}])
def test_from_dict_refuses(described):
    with pytest.raises(InputError, match="a diffusion is described by a dict with the keys"):
        GaussianDiffusion.from_dict(described)
