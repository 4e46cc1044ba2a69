"""The loss of a network on images that it was not trained on: at fixed timesteps and with fixed noise, so that two
values differ by the network alone.

The timesteps are the middles of equal parts of 0 .. T-1, as many as there are evaluations, and the images go with them
in an order that depends on the seed. Nothing is dropped, neither activations nor labels. Nichol & Dhariwal's code logs
the loss by quarter of t beside its mean, because a mean hides what happens where the loss is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.data import ImageSet, batch_indices
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.loops.network import Network, evaluating
from ddpm_fast.nn import UNet, derived
from ddpm_fast.noise import NoiseKey, Stream

EVALUATIONS = 512  # calls of the network for one image each: a mean of so many, always the same, hardly costs anything


class HeldOutLoss(NamedTuple):
    """Means over the evaluations.

    Attributes:
        loss: The mean loss.
        quarters: The mean loss in each quarter of the timesteps, the least noisy one first; NaN for one that has none.
    """

    loss: float
    quarters: tuple[float, ...]


def plan(n: int, num_timesteps: int, seed: int, evaluations: int = EVALUATIONS) -> tuple[Tensor, Tensor]:
    """Which image is noised to which timestep.

    Args:
        n: How many images there are. They are used equally often, or, of more than there are evaluations, some of them,
            spread evenly.
        num_timesteps: T.
        seed: Of the order in which images go with timesteps.
        evaluations: How many.

    Returns:
        The numbers of the images and the timesteps, int64 [evaluations] each.
    """
    numbers = torch.arange(evaluations)
    t = (2 * numbers + 1) * num_timesteps // (2 * evaluations)
    places = numbers * n // evaluations if n >= evaluations else numbers % n
    return places[batch_indices(seed, 0, evaluations, evaluations)], t


@torch.inference_mode()
def evaluate_losses(
    model: UNet,
    diffusion: GaussianDiffusion,
    dataset: ImageSet,
    part: slice,
    seed: int,
    batch_size: int = 64,
    check: Callable[[], object] = lambda: None,
) -> Tensor:
    """The losses of some of the evaluations: fp32 on the CPU, one for each.

    Args:
        model: The network.
        diffusion: The diffusion that it is trained for.
        dataset: The images.
        part: The numbers of the evaluations, within 0 .. EVALUATIONS - 1.
        seed: Of the plan and of the noise.
        batch_size: How many are computed at a time.
        check: Called before each batch. What it raises ends the work.
    """
    network = Network.of(model)
    places, t = (each[part] for each in plan(len(dataset), diffusion.num_timesteps, seed))
    told = diffusion.schedule.timesteps.to(network.device)
    losses = []
    with evaluating(model), derived.held(model):
        for first in range(0, len(t), batch_size):
            check()
            batch = slice(first, first + batch_size)
            images, labels = dataset.batch(places[batch])
            images, steps = images.to(network.device), t[batch].to(network.device)
            key = NoiseKey.of(
                seed,
                len(steps),
                first_sample_id=part.start + first,
                stream=Stream.EVALUATION,
                device=network.device,
            )
            x_t = diffusion.q_sample(images, steps, key, dtype=network.dtype)
            classes = [labels.to(network.device)] if network.takes_labels and labels is not None else []
            output = model(x_t, told.index_select(0, steps), *classes)
            losses.append(diffusion.training_losses(output, images, steps, key))
    return torch.cat(losses).float().cpu() if losses else torch.empty(0)


def mean_loss(losses: Tensor, num_timesteps: int) -> HeldOutLoss:
    """The means, in float64, of the losses of all evaluations [evaluations]."""
    evaluations = len(losses)
    _, t = plan(1, num_timesteps, 0, evaluations)
    quarters = [losses.double()[4 * t // num_timesteps == quarter] for quarter in range(4)]
    means = tuple(float(quarter.mean()) if len(quarter) else math.nan for quarter in quarters)
    return HeldOutLoss(float(losses.double().mean()), means)
