"""DDPMFastScheduler takes the steps of diffusers' own schedulers: in every spacing, prediction and variance.

Both walk in float64, theirs with tables that were made exact (support/diffusers_steps.py), so that they agree to 1e-10.
Its DPM-Solver casts its state to float32 in each step, hence DPM_SOLVER: the rounding of x, times sqrt(1/alpha_bar) =
157 at the first step where epsilon is predicted.
"""

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from support.diffusers_steps import SHAPE, drawing, in_float64, largest_error, network, normals, states

from ddpm_fast.errors import InputError
from ddpm_fast.formats.diffusers_scheduler import DDPMFastScheduler

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # numpy 2 on their tensors
]
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
X, *NOISE = normals(51)


DPM_SOLVER = {"epsilon": 5e-5, "sample": 2e-6, "v_prediction": 2e-6}


def compare(peer, steps, *, groups=1, **options):
    """The largest error of our loop against theirs, both in float64 with the same noise."""
    ours = DDPMFastScheduler.from_config(peer.config)
    ours.set_timesteps(steps)
    exact = in_float64(peer, steps)
    assert ours.timesteps.tolist() == exact.timesteps.tolist()
    call, noise = network(peer, groups), NOISE[: len(ours.timesteps)]
    return largest_error(states(ours, call, X, noise, **options), states(exact, call, X, noise, **options))


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_walks_as_theirs(prediction, spacing, steps):
    for alpha_to_one, offset, clipped in ((True, 0, False), (False, 1, True)):
        peer = DDIMScheduler(
            prediction_type=prediction,
            timestep_spacing=spacing,
            set_alpha_to_one=alpha_to_one,
            steps_offset=offset,
            beta_schedule="scaled_linear",
        )
        assert compare(peer, steps, use_clipped_model_output=clipped) < 1e-10


@pytest.mark.parametrize(
    "options",
    [{"clip_sample": False}, {"clip_sample_range": 0.7}, {"thresholding": True, "sample_max_value": 1.1}],
    ids=str,
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_limits_x0_as_theirs(prediction, options):
    for clipped in (False, True):
        peer = DDIMScheduler(prediction_type=prediction, **options)
        assert compare(peer, 6, use_clipped_model_output=clipped) < 1e-10


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_adds_noise_as_theirs(prediction, spacing):
    for eta, options in ((0.3, {"thresholding": True}), (1.0, {})):
        peer = DDIMScheduler(prediction_type=prediction, timestep_spacing=spacing, **options)
        assert compare(peer, 6, eta=eta) < 1e-10


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_walks_as_theirs(spacing, variance):
    for prediction, steps, options in (
        ("epsilon", 6, {}),
        ("epsilon", 4, {"thresholding": True}),
        ("sample", 6, {"steps_offset": 1}),
        ("sample", 1, {}),
        ("v_prediction", 3, {"clip_sample": False}),
    ):
        peer = DDPMScheduler(prediction_type=prediction, timestep_spacing=spacing, variance_type=variance, **options)
        assert compare(peer, steps, groups=2 if variance.startswith("learned") else 1) < 1e-10


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_a_chain_from_pure_noise_is_walked_as_theirs(prediction, kind):
    peer = kind(prediction_type=prediction, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    assert compare(peer, 7) < (DPM_SOLVER[prediction] if kind is DPMSolverMultistepScheduler else 1e-10)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_walks_as_theirs(prediction, algorithm):
    for steps, spacing, options in (
        (1, "linspace", {}),
        (7, "trailing", {"solver_type": "heun"}),
        (10, "leading", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        (14, "linspace", {"final_sigmas_type": "sigma_min"}),
        (16, "trailing", {"final_sigmas_type": "sigma_min", "solver_type": "heun"}),
        (16, "leading", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        (16, "leading", {"thresholding": True, "steps_offset": 1}),
        (16, "linspace", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    ):
        peer = DPMSolverMultistepScheduler(
            prediction_type=prediction, timestep_spacing=spacing, algorithm_type=algorithm, **options
        )
        assert compare(peer, steps) < DPM_SOLVER[prediction], options


@pytest.mark.parametrize("sigmas", ["use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"])
def test_dpm_solver_takes_sigmas_as_theirs(sigmas):
    for algorithm in ("dpmsolver++", "sde-dpmsolver++"):
        peer = DPMSolverMultistepScheduler(algorithm_type=algorithm, beta_schedule="scaled_linear", **{sigmas: True})
        assert compare(peer, 8) < DPM_SOLVER["epsilon"]


def test_order_1_is_dpm_solver_of_order_1():
    assert compare(DPMSolverMultistepScheduler(solver_order=1), 10) < DPM_SOLVER["epsilon"]


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_float32_is_as_exact_as_theirs(kind, latents):
    """On the same outputs. As Stable Diffusion is configured, theirs and ours are 1e-5 from each other as well."""
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    peer = kind.from_config(options if latents else {})
    ours, exact = DDPMFastScheduler.from_config(peer.config), kind.from_config(peer.config)
    exact = in_float64(exact, 20)
    for scheduler in (peer, ours):
        scheduler.set_timesteps(20)
    call = network(peer)
    outputs = iter([call(x, t).float() for x, t in zip(NOISE, peer.timesteps, strict=False)] * 3)
    again = {
        scheduler: states(scheduler, lambda x, t: next(outputs).to(x.dtype), x, NOISE[:20])
        for scheduler, x in ((peer, X.float()), (ours, X.float()), (exact, X.float().double()))
    }
    mine, yours = (largest_error(again[scheduler], again[exact]) for scheduler in (ours, peer))
    assert mine <= 2 * yours + 1e-6
    assert not latents or largest_error(again[ours], again[peer]) < 1e-5


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_x0_is_theirs(kind):
    peer = kind()
    ours = DDPMFastScheduler.from_config(peer.config)
    for scheduler in (peer, ours):
        scheduler.set_timesteps(10)
    t, x = peer.timesteps[4], X.float()
    with drawing(NOISE[0].float()):
        theirs = peer.step(network(peer)(x, t), t, x)
    found = ours.step(network(peer)(x, t), t, x)
    torch.testing.assert_close(found.pred_original_sample, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)


def test_fixed_large_log_is_fixed_large():
    """Theirs takes the root of a logarithm, which is NaN."""
    for variance in ("fixed_large_log", "fixed_large"):
        ours = DDPMFastScheduler(variance_type=variance)
        ours.set_timesteps(5)
        call = network(ours)
        last = states(ours, call, X.float(), NOISE[:5])[-1]
        if variance == "fixed_large_log":
            expected = last
    assert torch.equal(last, expected) and last.isfinite().all()


def test_dpm_solver_survives_a_timestep_that_is_there_twice():
    """linspace over 50 of 50 timesteps repeats one; theirs divides by the step of length 0."""
    ours = DDPMFastScheduler(sampler="dpmpp_2m", num_train_timesteps=50)
    ours.set_timesteps(50)
    assert len(set(ours.timesteps.tolist())) < 50
    call, x = network(ours), X.float()
    for t in ours.timesteps:
        x = ours.step(call(x, t), t, x).prev_sample
    assert x.isfinite().all() and ours.step_index == 50


def test_a_loop_that_begins_in_the_middle_begins_with_order_1():
    peer = DPMSolverMultistepScheduler()
    ours = DDPMFastScheduler.from_config(peer.config)
    for scheduler in (in_float64(peer, 20), ours):
        if scheduler is ours:
            scheduler.set_timesteps(20)
        scheduler.set_begin_index(8)
    call, found = network(peer), []
    for scheduler, x in ((peer, X), (ours, X.float())):
        for t in scheduler.timesteps[8:]:
            x = scheduler.step(call(x, t), t, x).prev_sample
        found.append(x)
    assert ours.begin_index == 8 and ours.step_index == peer.step_index == 20
    torch.testing.assert_close(found[1].double(), found[0].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("peer", [DDPMScheduler(), DDIMScheduler(), DPMSolverMultistepScheduler()])
def test_half_precision_is_rounded_once(peer, dtype):
    ours = DDPMFastScheduler.from_config(peer.config)
    exact = in_float64(peer, 10)
    ours.set_timesteps(10)
    t = exact.timesteps[6]
    x, output, z = X.to(dtype), network(exact)(X, t).to(dtype), NOISE[0].to(dtype)
    with drawing(z.double()):
        theirs = exact.step(output.double(), t, x.double()).prev_sample
    found = ours.step(output, t, x, variance_noise=z).prev_sample
    assert found.dtype == dtype
    # One rounding is off by half a unit in the last place; 1e-6 is for what float32 loses before it.
    limit = 0.5 * torch.finfo(dtype).eps * theirs.double().abs() + 1e-6
    assert ((found.double() - theirs.double()).abs() <= limit).all()


def test_a_float32_state_beside_a_half_output_keeps_its_dtype():
    ours = DDPMFastScheduler(sampler="dpmpp_2m")
    ours.set_timesteps(10)
    made = ours.step(X.half(), ours.timesteps[0], X.float())
    assert made.prev_sample.dtype == made.pred_original_sample.dtype == torch.float32


@pytest.mark.parametrize("peer", [DDPMScheduler(), DDIMScheduler(prediction_type="v_prediction")])
def test_noise_is_added_as_theirs(peer):
    ours = DDPMFastScheduler.from_config(peer.config)
    x, z = X.float(), NOISE[0].float()
    for t in (torch.tensor([0, 999]), torch.tensor([500]), torch.tensor(3), torch.tensor([7, 8], dtype=torch.int32)):
        torch.testing.assert_close(ours.add_noise(x, z, t), peer.add_noise(x, z, t), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.get_velocity(x, z, t), peer.get_velocity(x, z, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "linear", "beta_end": 0.03},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid", "num_train_timesteps": 200},
        {"beta_schedule": "laplace"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    ],
    ids=str,
)
def test_the_betas_are_theirs_bit_for_bit(options):
    ours, theirs = DDPMFastScheduler(**options), DDPMScheduler(**options)
    assert torch.equal(ours.betas, theirs.betas)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=3e-5, atol=0)


def test_a_gradient_passes_the_step_as_theirs():
    peer = DDIMScheduler()
    ours, found = DDPMFastScheduler.from_config(peer.config), []
    for scheduler in (peer, ours):
        scheduler.set_timesteps(10)
        x, output = X.float().requires_grad_(), NOISE[1].float().requires_grad_()
        scheduler.step(output, scheduler.timesteps[5], x).prev_sample.sin().sum().backward()
        found.append((x.grad, output.grad))
    for mine, yours in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-5)


def test_channels_last_changes_no_number():
    ours = DDPMFastScheduler(sampler="ddim")
    ours.set_timesteps(10)
    t, x, output = ours.timesteps[2], X.float(), NOISE[2].float()
    plain = ours.step(output, t, x).prev_sample
    other = ours.step(output, t, x.contiguous(memory_format=torch.channels_last)).prev_sample
    assert torch.equal(plain, other) and plain.shape == SHAPE


@pytest.mark.parametrize("shape", [(2, 4, 9), (1, 2, 3, 4, 5)])
def test_signals_and_videos_are_stepped_too(shape):
    ours, peer = DDPMFastScheduler(sampler="ddim"), DDIMScheduler()
    x, output = (z.float() for z in normals(2, shape))
    for scheduler in (ours, peer):
        scheduler.set_timesteps(10)
    t = peer.timesteps[3]
    theirs = peer.step(output, t, x).prev_sample
    torch.testing.assert_close(ours.step(output, t, x).prev_sample, theirs, rtol=1e-5, atol=1e-5)


def test_epsilon_from_pure_noise_is_refused():
    ours = DDPMFastScheduler(sampler="ddim", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(InputError, match="pure noise"):
        ours.set_timesteps(10)
