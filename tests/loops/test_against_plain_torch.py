"""Sampling and training give what the same chain and the same step give in plain torch, as the reference codes write
them, from the noise that our keys identify."""

import dataclasses

import pytest
import torch
from support import plain
from support.networks import random_unet

import ddpm_fast as df
from ddpm_fast.data import Dataset, batch_indices
from ddpm_fast.loops.training import TrainConfig, Trainer
from ddpm_fast.samplers import make_table

N, SHAPE = 3, (3, 8, 8)
NETWORK = {"image_size": 8, "model_channels": 32, "channel_mult": (1,)}


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_chain(prediction):
    model = random_unet(**NETWORK)
    diffusion = df.GaussianDiffusion(df.Schedule.cosine(50), prediction=prediction, variance="fixed_small")

    def normals(i: int) -> torch.Tensor:
        stream = df.Stream.REVERSE if i >= 0 else df.Stream.INITIAL
        return df.ops.normal(df.NoiseKey.of(7, N, step=max(i, 0), stream=stream), SHAPE)

    expected = plain.plain_sampling(model, make_table(diffusion, "ddpm", 5), normals(-1), normals)
    torch.testing.assert_close(df.sample(model, diffusion, N, steps=5, seed=7), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_of_a_step(prediction):
    model = random_unet(**NETWORK)
    diffusion = df.GaussianDiffusion(df.Schedule.linear(50), prediction=prediction)
    config = TrainConfig(batch_size=N, precision="fp32")
    data = Dataset(torch.randint(0, 256, (6, *SHAPE), dtype=torch.uint8), None, None, "random pixels")
    trainer = Trainer(model.config, diffusion, config, data, torch.device("cpu"))
    trainer.model.load_state_dict(model.state_dict())
    key = df.NoiseKey.of(config.seed, N, stream=df.Stream.TRAINING)
    t, *_ = trainer.timestep_sampler.sample(dataclasses.replace(key, stream=df.Stream.TIMESTEP))
    images, _ = data.batch(batch_indices(config.seed, 0, N, len(data)))
    step = plain.reference_step(model, diffusion, config, data)
    expected = step.loss(images, t, df.ops.normal(key, SHAPE), None, autocast=False)
    torch.testing.assert_close(trainer.train_step()[0], expected.detach(), rtol=1e-4, atol=1e-5)
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    step()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True)), "nothing learned"
