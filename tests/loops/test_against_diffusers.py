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
from ddpm_fast.formats.diffusers.network import same_weights, scheduler
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


def test_other_networks_as_they_are():
    """diffusers' own network, of a size that is not square and with classes, in every use."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    peer = UNet2DModel(
        sample_size=(8, 12),
        in_channels=2,
        out_channels=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=3,
    ).train()
    diffusion, labels = df.GaussianDiffusion(df.Schedule.linear(50)), torch.tensor([0, 2])

    def ours(x, t, y):
        return peer(x, t, y, return_dict=False)[0]

    images = df.ops.normal(df.NoiseKey.of(1, N), (2, 8, 12)).clamp(-1, 1)
    given = {"steps": 4, "labels": labels}
    x = df.sample(peer, diffusion, N, **given, guidance=2.0, null_label=1)
    torch.testing.assert_close(
        x, df.sample(ours, diffusion, N, **given, guidance=2.0, null_label=1, shape=(2, 8, 12)), rtol=0, atol=0
    )
    assert x.shape == (N, 2, 8, 12) and peer.training
    for use in (df.encode, df.decode, df.image_to_image):
        torch.testing.assert_close(
            use(peer, diffusion, images, **given), use(ours, diffusion, images, **given), rtol=0, atol=0
        )
    bits = [diffusion.bits_per_dim(model, images, **given).total for model in (peer, ours)]
    assert torch.equal(*bits)
    with pytest.raises(df.InputError, match="cannot be called without labels"):
        df.sample(peer, diffusion, N, steps=2)
    with pytest.raises(df.InputError, match=r"answered with a tuple; .*\[0\]"):
        df.sample(lambda x, t, y: peer(x, t, y, return_dict=False), diffusion, N, **given, shape=(2, 8, 12))
