"""Sampling and training give what diffusers' documented loops give on its own network with our weights, from the noise
that our keys identify."""

import dataclasses
import importlib.util

import pytest
import torch
from support import diffusers_loops
from support.networks import random_unet

import ddpm_fast as df
from ddpm_fast.data import Dataset, batch_indices
from ddpm_fast.formats.diffusers import same_weights, scheduler
from ddpm_fast.loops.training import TrainConfig, Trainer
from ddpm_fast.samplers import make_table

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
]
N, SHAPE = 2, (3, 8, 8)
NETWORK = {"image_size": 8, "model_channels": 32, "channel_mult": (1, 2)}


def test_a_chain():
    model, diffusion = random_unet(**NETWORK), df.GaussianDiffusion(df.Schedule.linear(50), variance="fixed_small")
    keys = [df.NoiseKey.of(7, N, stream=df.Stream.INITIAL)]
    keys += [df.NoiseKey.of(7, N, step=i, stream=df.Stream.REVERSE) for i in range(5)]
    chain = scheduler(diffusion, make_table(diffusion, "ddpm", 5).timesteps.tolist())
    peer = same_weights(model)
    with diffusers_loops.given_noise(df.ops.normal(key, SHAPE) for key in keys):
        images = diffusers_loops.diffusers_sampling(
            lambda x, t: peer(x, t).sample, chain, (N, *SHAPE), torch.float32, torch.device("cpu")
        )
    torch.testing.assert_close(df.sample(model, diffusion, N, steps=5, seed=7), images, rtol=1e-3, atol=1e-3)


def test_the_loss_of_a_step():
    model, diffusion = random_unet(**NETWORK), df.GaussianDiffusion(df.Schedule.linear(50))
    config = TrainConfig(batch_size=N, precision="fp32")
    data = Dataset(torch.randint(0, 256, (6, *SHAPE), dtype=torch.uint8), None, None, "random pixels")
    trainer = Trainer(model.config, diffusion, config, data, torch.device("cpu"))
    trainer.model.load_state_dict(model.state_dict())
    key = df.NoiseKey.of(config.seed, N, stream=df.Stream.TRAINING)
    t, *_ = trainer.timestep_sampler.sample(dataclasses.replace(key, stream=df.Stream.TIMESTEP))
    images, _ = data.batch(batch_indices(config.seed, 0, N, len(data)))
    step = diffusers_loops.diffusers_step(model, diffusion, config, data)
    expected = step.loss(images, t, df.ops.normal(key, SHAPE), None, autocast=False)
    torch.testing.assert_close(trainer.train_step()[0], expected.detach(), rtol=1e-4, atol=1e-5)
    step()
