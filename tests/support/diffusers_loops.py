"""Sampling and training as the documentation of diffusers has them, on a UNet2DModel with our weights: what ours is
compared with, in results and in time. diffusers is imported where it is needed, for it need not be installed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import ddpm_fast as df
from ddpm_fast.data import Dataset
from ddpm_fast.formats.diffusers.network import same_weights, scheduler
from ddpm_fast.loops.training import TrainConfig
from tests.support.plain import PlainStep, scaled


@contextlib.contextmanager
def given_noise(normals: Iterator[Tensor]) -> Iterator[None]:
    """Inside, diffusers draws these normals, one tensor after the other."""
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm

    def drawn(shape, generator=None, device=None, dtype=None, layout=None) -> Tensor:
        return next(normals).to(dtype or torch.float32)

    with (
        mock.patch.object(scheduling_ddpm, "randn_tensor", drawn),
        mock.patch.object(pipeline_ddpm, "randn_tensor", drawn),
    ):
        yield


@torch.inference_mode()
def diffusers_sampling(call: Callable, chain, shape: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The loop of diffusers' DDPMPipeline. call(image, t): the network's output. chain: a scheduler."""
    from diffusers.schedulers import scheduling_ddpm

    image = scheduling_ddpm.randn_tensor(shape, device=device, dtype=dtype)
    for t in chain.timesteps:
        image = chain.step(call(image, t), t, image).prev_sample
    return image


def diffusers_step(
    made: df.UNet,
    diffusion: df.GaussianDiffusion,
    config: TrainConfig,
    data: Dataset,
    wrap: Callable = lambda model: model,
    tuned: bool = False,
) -> PlainStep:
    """The step of diffusers' unconditional training example with its EMA. wrap: what is called for the network. tuned:
    with what makes the same step faster: weights in channels_last, AdamW in one kernel, an average by multi-tensor
    operations."""
    from diffusers.training_utils import EMAModel

    model, chain = same_weights(made).train(), scheduler(diffusion)
    if tuned:
        model = model.to(memory_format=torch.channels_last)
    average, called = EMAModel(model.parameters(), decay=config.ema_decay, foreach=tuned), wrap(model)
    parts = [part for part in (data.images, data.labels) if part is not None]
    loader = DataLoader(TensorDataset(*parts), config.batch_size, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def target(images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return chain.get_velocity(scaled(images), noise, t) if diffusion.objective.prediction == "v" else noise

    return PlainStep(
        model=model,
        config=config,
        call=lambda x_t, t, labels: called(x_t, t, class_labels=labels).sample,
        batches=lambda: (*next(batches), None)[:2],
        noised=lambda images, t, noise: chain.add_noise(scaled(images), noise, t),
        target=target,
        average=lambda: average.step(model.parameters()),
        timesteps=diffusion.num_timesteps,
        fused=True if tuned else None,
    )
