"""Whole trajectories against diffusers' schedulers: the same network, the same timesteps, the same noise.

diffusers computes in float32 from float32 tables, ours here in float64, hence the tolerance. Its DPM-Solver is asked
for final_sigmas_type "zero", where like ours it ends at the image, with a step of first order.
"""

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.samplers import make_table
from ddpm_fast.schedule import Schedule

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # numpy 2 on their tensors
]
diffusers = pytest.importorskip("diffusers")

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def network(x, t):
    return torch.sin(1.5 * x + t / 400) + 0.2 * x


def gaussian(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def our_trajectory(table, x, noise):
    """The state after each step."""
    states, x0 = [], None
    for i, (t, z) in enumerate(zip(table.timesteps, noise, strict=True)):
        step = ops.reverse_step(
            x, network(x, t), table.coefficients, torch.tensor(i), z, x0_previous=x0, return_x0=True
        )
        x, x0 = step.x, step.x0
        states.append(x)
    return states


def their_trajectory(scheduler, timesteps, x, noise, monkeypatch, **options):
    """The state after each step; the scheduler is given `noise` where it would draw."""
    states, x = [], x.float()
    for t, z in zip(timesteps, noise, strict=True):
        for module in ("ddpm", "ddim", "dpmsolver_multistep"):
            name = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
            monkeypatch.setattr(name, lambda *_, z=z, **__: z.float())
        x = scheduler.step(network(x, t), int(t), x, **options).prev_sample
        states.append(x)
    return states


def assert_same(ours, theirs):
    for i, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        error = ((mine - yours).abs().max() / yours.abs().max()).item()
        assert error < 1e-4, f"after step {i}: off by {error:.2g} of the largest value"


def pair(scheduler_class, prediction, **options):
    """One chain, linear-1000, as they make it and as we do (betas in float64 for both, then float32 for theirs)."""
    schedule = Schedule.linear(1000)
    scheduler = scheduler_class(
        num_train_timesteps=1000,
        trained_betas=schedule.betas.tolist(),
        prediction_type=PREDICTIONS[prediction],
        **options,
    )
    return scheduler, GaussianDiffusion(schedule, prediction, variance="fixed_small")


@pytest.mark.pairwise
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["even", "quadratic"])
@pytest.mark.parametrize("steps", [5, 14, 15, 50])  # theirs lowers more orders than the last one's below 15 steps
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        pytest.param("dpmpp_1", {"solver_order": 1, "algorithm_type": "dpmsolver++"}, id="first order"),
        pytest.param("dpmpp_2m", {"solver_order": 2, "algorithm_type": "dpmsolver++"}, id="2M"),
        pytest.param("dpmpp_2m_sde", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}, id="SDE-2M"),
    ],
)
def test_dpm_solver_pp(sampler, options, steps, spacing, prediction, monkeypatch):
    options = {"solver_type": "midpoint", "final_sigmas_type": "zero", **options}
    scheduler, diffusion = pair(diffusers.DPMSolverMultistepScheduler, prediction, **options)
    table = make_table(diffusion, sampler, steps, spacing=spacing, clip=False)
    scheduler.set_timesteps(timesteps=table.timesteps.tolist())
    x, noise = gaussian(2, 3, 8, seed=0), gaussian(steps, 2, 3, 8, seed=1)
    theirs = their_trajectory(scheduler, table.timesteps, x, noise, monkeypatch)
    assert_same(our_trajectory(table, x, noise), theirs)


@pytest.mark.pairwise
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_ddim_where_the_steps_divide_the_chain(steps, eta, clip, prediction, monkeypatch):
    options = {"timestep_spacing": "trailing", "clip_sample": clip}
    scheduler, diffusion = pair(diffusers.DDIMScheduler, prediction, **options)
    scheduler.set_timesteps(steps)
    table = make_table(diffusion, "ddim", scheduler.timesteps.flip(0).tolist(), eta=eta, clip=clip)
    x, noise = gaussian(2, 3, 8, seed=0), gaussian(steps, 2, 3, 8, seed=1)
    # use_clipped_model_output: eps from the clipped x0, as the papers' code has it; off by default in theirs.
    options = {"eta": eta, "use_clipped_model_output": True}
    theirs = their_trajectory(scheduler, table.timesteps, x, noise, monkeypatch, **options)
    assert_same(our_trajectory(table, x, noise), theirs)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("steps", [5, 18, 50])
def test_ddpm(steps, clip, prediction, monkeypatch):
    scheduler, diffusion = pair(diffusers.DDPMScheduler, prediction, clip_sample=clip, variance_type="fixed_small")
    table = make_table(diffusion, "ddpm", steps, clip=clip)
    scheduler.set_timesteps(timesteps=table.timesteps.tolist())
    x, noise = gaussian(2, 3, 8, seed=0), gaussian(steps, 2, 3, 8, seed=1)
    theirs = their_trajectory(scheduler, table.timesteps, x, noise, monkeypatch)
    assert_same(our_trajectory(table, x, noise), theirs)


def test_ddim_takes_its_successor_from_the_list_where_diffusers_subtracts_a_stride(monkeypatch):
    # Pitfall: "previous t" as t - T//N. Where the network always predicts c, x_t stays on sqrt(ab) c + sqrt(1-ab) eps.
    steps, c, eps = 299, 0.3, gaussian(2, 3, 8, seed=2)
    scheduler, diffusion = pair(diffusers.DDIMScheduler, "x0", timestep_spacing="linspace", clip_sample=False)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    stride_is_wrong = (timesteps[:-1] - timesteps[1:]) != 1000 // steps
    assert stride_is_wrong.sum() > 90

    table = make_table(diffusion, "ddim", timesteps.flip(0).tolist())
    ab = diffusion.schedule.alphas_cumprod[timesteps]
    line = [a.sqrt() * c + (1 - a).sqrt() * eps for a in ab]
    x0 = torch.full_like(eps, c)
    for i, after in enumerate(line[1:]):
        ours = ops.reverse_step(line[i], x0, table.coefficients, torch.tensor(i), torch.zeros_like(eps)).x
        theirs = scheduler.step(x0.float(), int(timesteps[i]), line[i].float()).prev_sample.double()
        torch.testing.assert_close(ours, after, rtol=1e-9, atol=1e-9)
        off = (theirs - after).abs().max() / after.abs().max()
        assert (off > 1e-5) == stride_is_wrong[i], f"step {i}, t = {timesteps[i]}: {off:.2g}"
