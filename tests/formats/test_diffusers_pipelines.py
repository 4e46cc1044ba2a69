"""DDPMFastScheduler inside diffusers' pipelines, the noise that it draws there, and how it is saved with them."""

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)

import ddpm_fast as df
from ddpm_fast.formats.diffusers_scheduler import DDPMFastScheduler
from ddpm_fast.noise import Stream
from ddpm_fast.samplers import make_table

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # numpy 2 on their tensors
]


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).eval()


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(np.asarray(pipe(output_type="np", **{"num_inference_steps": 5, **options}).images))


def fast(unet, kind=DDPMScheduler, **options):
    pipe = DDPMPipeline(unet, kind())
    pipe.scheduler = DDPMFastScheduler.from_config(pipe.scheduler.config, **options)
    return pipe


# The noise


def normals(seed, n, step, first=0):
    key = df.NoiseKey.of(seed, n, first_sample_id=first, step=step, stream=Stream.REVERSE)
    return df.ops.normal(key, (3, 4, 4))


def noise_of(scheduler, i, n=2, **options):
    """What the step adds to a state of zeros by a network of zeros, in standard deviations."""
    zeros = torch.zeros(n, 3, 4, 4)
    made = scheduler.step(zeros, scheduler.timesteps[i], zeros, **options).prev_sample
    scale = scheduler.step(zeros, scheduler.timesteps[i], zeros, variance_noise=torch.ones_like(zeros)).prev_sample
    return made / scale


def test_noise_is_that_of_seed_place_and_step():
    scheduler = DDPMFastScheduler()
    scheduler.set_timesteps(10)
    g = generator(7)
    for i in (0, 4):
        torch.testing.assert_close(
            noise_of(scheduler, i, n=3, generator=g), normals(7, 3, step=i), rtol=1e-5, atol=1e-6
        )


def test_each_generator_of_a_list_is_a_sample_of_its_own():
    scheduler = DDPMFastScheduler()
    scheduler.set_timesteps(10)
    z = noise_of(scheduler, 2, generator=[generator(3), generator(-4)])
    expected = torch.cat([normals(seed, 1, step=2) for seed in (3, 2**64 - 4)])
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6)


def test_one_generator_that_is_there_twice_gives_two_noises():
    scheduler, g = DDPMFastScheduler(), generator(3)
    scheduler.set_timesteps(10)
    z = noise_of(scheduler, 2, generator=[g, g])
    torch.testing.assert_close(z, torch.cat([normals(3, 1, step=2), normals(3, 1, step=12)]), rtol=1e-5, atol=1e-6)


def test_a_step_that_is_taken_again_gets_new_noise():
    scheduler, g = DDPMFastScheduler(), generator(3)
    scheduler.set_timesteps(10)
    first, again = (noise_of(scheduler, 2, generator=g) for _ in range(2))
    torch.testing.assert_close(first, normals(3, 2, step=2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, normals(3, 2, step=12), rtol=1e-5, atol=1e-6)


def test_a_seed_that_is_set_anew_counts_at_once():
    scheduler, g = DDPMFastScheduler(), generator(3)
    scheduler.set_timesteps(10)
    first = noise_of(scheduler, 2, generator=g)
    assert torch.equal(noise_of(scheduler, 2, generator=g.manual_seed(3)), first)
    assert not torch.allclose(noise_of(scheduler, 2, generator=g.manual_seed(4)), first)


def test_a_generator_that_is_used_again_gives_other_images_and_the_same_after_its_seed_was_set(unet):
    pipe, g = fast(unet), generator(3)
    first, second = draw(pipe, generator=g), draw(pipe, generator=g)
    assert not torch.allclose(first, second, atol=0.1)
    assert torch.equal(draw(pipe, generator=g.manual_seed(3)), first)
    assert torch.equal(draw(pipe, generator=generator(3)), first)


def test_a_deterministic_sampler_leaves_the_generator_alone(unet):
    pipe, g = fast(unet, DPMSolverMultistepScheduler), generator(3)
    draw(pipe, generator=g)
    assert g.initial_seed() == 3


def test_without_a_generator_torchs_global_seed_counts(unet):
    pipe, found = fast(unet), []
    for seed in (1, 1, 2, None):
        if seed is not None:
            torch.manual_seed(seed)
        found.append(draw(pipe))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[1], found[2], atol=0.1) and not torch.allclose(found[2], found[3], atol=0.1)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m_sde"])
def test_an_image_does_not_depend_on_its_batch(unet, sampler):
    pipe = fast(unet, sampler=sampler)
    together = draw(pipe, batch_size=3, generator=[generator(seed) for seed in (5, 6, 7)])
    for i, seed in enumerate((5, 6, 7)):
        torch.testing.assert_close(draw(pipe, generator=generator(seed)), together[i : i + 1], rtol=0, atol=1e-4)


def test_the_same_noise_meets_every_dtype():
    made = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        scheduler = DDPMFastScheduler()
        scheduler.set_timesteps(10)
        zeros = torch.zeros(2, 3, 4, 4, dtype=dtype)
        made[dtype] = scheduler.step(zeros, scheduler.timesteps[1], zeros, generator=generator(1)).prev_sample
    torch.testing.assert_close(made[torch.float32].double(), made[torch.float64], rtol=1e-6, atol=1e-7)
    assert torch.equal(made[torch.bfloat16], made[torch.float32].bfloat16())


def test_a_loop_is_that_of_sample(unet):
    """From the same start and seed: what df.sample draws with a network, its scheduler's betas and its timesteps."""
    scheduler = DDPMFastScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    schedule = df.Schedule.from_betas(scheduler.betas.double())
    diffusion = df.GaussianDiffusion(schedule, variance="fixed_small")
    table = make_table(diffusion, "ddpm", 10)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()

    def call(x, t):
        return unet(x, t).sample

    expected = df.sample(call, diffusion, 2, steps=10, seed=11, shape=(3, 8, 8))
    x, g = df.ops.normal(df.NoiseKey.of(11, 2, stream=Stream.INITIAL), (3, 8, 8)), generator(11)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x = scheduler.step(call(x, t), t, x, generator=g).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


# The pipelines


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_ddpm_pipeline_draws_what_their_scheduler_draws(unet, kind):
    theirs = draw(DDPMPipeline(unet, kind()), batch_size=2, generator=generator(0))
    torch.testing.assert_close(draw(fast(unet, kind), batch_size=2, generator=generator(0)), theirs, rtol=0, atol=1e-4)


def test_ddim_pipeline_passes_its_options_on(unet):
    pipe = DDIMPipeline(unet, DDPMScheduler())
    for clipped in (None, True):
        theirs = draw(pipe, generator=generator(0), use_clipped_model_output=clipped)
        ours = DDIMPipeline(unet, DDPMScheduler())
        ours.scheduler = DDPMFastScheduler.from_config(ours.scheduler.config)
        assert ours.scheduler.config.sampler == "ddim"
        found = draw(ours, generator=generator(0), use_clipped_model_output=clipped)
        torch.testing.assert_close(found, theirs, rtol=0, atol=1e-4)
    noisy = draw(ours, generator=generator(0), eta=1.0)
    assert not torch.allclose(noisy, found, atol=0.05)
    assert torch.equal(noisy, draw(ours, generator=generator(0), eta=1.0))


def test_ddim_pipeline_makes_its_own_scheduler_of_ours(unet):
    made = DDIMPipeline(unet, DDPMFastScheduler(sampler="dpmpp_2m", beta_schedule="scaled_linear")).scheduler
    assert type(made) is DDIMScheduler and made.config.beta_schedule == "scaled_linear"


def test_a_schedulers_own_eta_counts_where_the_pipeline_gives_none(unet):
    plain, noisy = (draw(fast(unet, DDIMScheduler, eta=eta), generator=generator(0)) for eta in (0.0, 1.0))
    assert not torch.allclose(plain, noisy, atol=0.05)


def test_a_pipeline_saved_with_it_is_loaded_once_it_is_imported(unet, tmp_path):
    pipe = fast(unet, DDIMScheduler, eta=0.5)
    expected = draw(pipe, generator=generator(0))
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["ddpm_fast.formats.diffusers_scheduler", "DDPMFastScheduler"]
    loaded = DDPMPipeline.from_pretrained(tmp_path / "pipe")
    assert type(loaded.scheduler) is DDPMFastScheduler and loaded.scheduler.config.sampler == "ddim"
    torch.testing.assert_close(draw(loaded, generator=generator(0)), expected, rtol=0, atol=1e-4)
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "pipe").scheduler) is DDPMFastScheduler


def test_it_is_not_found_before_it_is_imported(unet, tmp_path, monkeypatch):
    """diffusers imports nothing because a folder names it. So docs/guides/bridges.md asks for the import."""
    fast(unet).save_pretrained(tmp_path / "pipe")
    monkeypatch.delitem(sys.modules, DDPMFastScheduler.__module__)
    with pytest.raises(ValueError, match=r"import ddpm_fast\.formats\.diffusers_scheduler before"):
        DDPMPipeline.from_pretrained(tmp_path / "pipe")


class Latents(DiffusionPipeline):
    """What Stable Diffusion does after its prompt became an embedding: guided steps in latents, and their decoding."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: DDIMScheduler):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, generator, steps=6, strength=None):
        scheduler = self.scheduler
        scheduler.set_timesteps(steps, device="cpu")
        timesteps = scheduler.timesteps
        latents = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
        if strength is not None:  # as in img2img
            start = steps - int(steps * strength)
            timesteps = timesteps[start:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(start)
            image = torch.linspace(-1, 1, 4 * 64).view(1, 4, 8, 8)
            latents = scheduler.add_noise(image, latents, timesteps[:1])
        for t in timesteps:
            both = scheduler.scale_model_input(torch.cat([latents, latents]), t)
            plain, guided = self.unet(both, t, prompt).sample.chunk(2)
            output = plain + 5.0 * (guided - plain)
            latents = scheduler.step(output, t, latents, generator=generator, return_dict=False)[0]
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample


@pytest.fixture(scope="module")
def latents():
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4).eval()
    # Stable Diffusion's, as its folder has it.
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    config |= {"set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}
    return Latents(network, vae, PNDMScheduler.from_config({"_class_name": "PNDMScheduler", **config}))


@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize(
    ("kind", "sampler", "options"),
    [
        (DDIMScheduler, "ddim", {}),
        (DPMSolverMultistepScheduler, "dpmpp_2m", {}),
        (DPMSolverMultistepScheduler, "dpmpp_2m", {"use_karras_sigmas": True}),
    ],
)
def test_a_latent_pipeline_draws_what_their_schedulers_draw(latents, kind, sampler, options, strength):
    prompt = torch.randn(2, 5, 8, generator=generator(1))
    found = []
    for scheduler in (
        kind.from_config(latents.scheduler.config, **options),
        DDPMFastScheduler.from_config(latents.scheduler.config, sampler=sampler, **options),
    ):
        pipe = Latents(latents.unet, latents.vae, scheduler)
        found.append(pipe(prompt, generator(2), strength=strength))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_what_an_inference_leaves_serves_a_gradient():
    scheduler = DDPMFastScheduler()
    scheduler.set_timesteps(10)
    x, t = torch.ones(2, 3, 4, 4), torch.tensor([1, 2])
    with torch.inference_mode():
        scheduler.add_noise(x, x, t)
        scheduler.step(x, 900, x, generator=generator(0))
    y = x.clone().requires_grad_()
    (
        scheduler.add_noise(y, x, t).sum() + scheduler.step(y, 800, y, generator=generator(0)).prev_sample.sum()
    ).backward()
    assert y.grad.isfinite().all()
