"""Diffusion in plain torch, as the reference codes have it: the formulas, a training step and a sampling loop.

An oracle of ours, and what ours is timed against.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.data import Dataset
from ddpm_fast.loops.training import TrainConfig
from ddpm_fast.samplers import SamplerTable


def scaled(x0: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels as the networks read them; images that are float already pass, but for float64."""
    if x0.dtype == torch.uint8:
        return x0.to(dtype) / 127.5 - 1
    return x0.double() if dtype == torch.float64 else x0


def exact(x0: Tensor) -> Tensor:
    return scaled(x0, torch.float64)


def noised(x0: Tensor, t: Tensor, table: Tensor, noise: Tensor) -> Tensor:
    """q_sample in plain torch [Ho et al. 2020, eq. 4]; in float64 if the table is."""
    signal, sigma = table[t][:, :, None, None, None].unbind(1)
    x_t = signal * scaled(x0) + sigma * noise
    return x_t if table.dtype == torch.float64 else x_t.to(noise.dtype)


def stepped(x: Tensor, output: Tensor, row: Tensor, noise: Tensor) -> Tensor:
    """A row of ddpm_fast.samplers.ddpm_table in plain torch [Ho et al. 2020, alg. 2], in the state's dtype."""
    a_x, a_out, b_x, b_x0, _, sigma, clip, _ = row.unbind()
    x0 = (a_x * x + a_out * output.to(x.dtype)).clamp(-clip, clip)
    return b_x * x + b_x0 * x0 + sigma * noise


@torch.inference_mode()
def plain_sampling(
    model: nn.Module, table: SamplerTable, x: Tensor, normal: Callable[[int], Tensor], labels: Tensor | None = None
) -> Tensor:
    """Ancestral sampling as one writes it in plain torch; normal(i) is the noise of row i."""
    rows, dtype = table.coefficients.to(x.device, torch.float32), next(model.parameters()).dtype
    for i, t in enumerate(table.timesteps.tolist()):
        output = model(x.to(dtype), torch.full((len(x),), t, device=x.device), labels)
        x = stepped(x, output, rows[i], normal(i))
    return x


@dataclasses.dataclass
class PlainStep:
    """A training step in plain torch. call: of the network, (x_t, t, labels). batches: of images and labels. noised,
    target: of (images, t, noise). average: keeps the average of the weights. fused: the optimiser's form; None is
    torch's own choice."""

    model: nn.Module
    config: TrainConfig
    call: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    batches: Callable[[], tuple[Tensor, Tensor | None]]
    noised: Callable[[Tensor, Tensor, Tensor], Tensor]
    target: Callable[[Tensor, Tensor, Tensor], Tensor]
    average: Callable[[], None]
    timesteps: int
    fused: bool | None = None

    def __post_init__(self):
        self.device = next(self.model.parameters()).device
        options = {"lr": self.config.lr, "weight_decay": self.config.weight_decay, "fused": self.fused}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)

    def loss(self, images: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None, autocast: bool) -> Tensor:
        x_t = self.noised(images, t, noise)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            output = self.call(x_t, t, labels)
        return F.mse_loss(output.float(), self.target(images, t, noise))

    def __call__(self) -> None:
        images, labels = (None if part is None else part.to(self.device) for part in self.batches())
        t = torch.randint(self.timesteps, (len(images),), device=self.device)
        noise = torch.randn(images.shape, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(images, t, noise, labels, autocast=self.config.precision == "bf16").backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.average()


def reference_step(made: df.UNet, diffusion: df.GaussianDiffusion, config: TrainConfig, data: Dataset) -> PlainStep:
    """As the reference codes have it, on a copy of our network."""
    model = copy.deepcopy(made)
    table = diffusion.schedule.q_sample_table().to(model.conv_in.weight.device, torch.float32)
    averages = [parameter.detach().clone() for parameter in model.parameters()]

    def velocity(images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        signal, sigma = table[t][:, :, None, None, None].unbind(1)
        return signal * noise - sigma * scaled(images)

    @torch.no_grad()
    def average() -> None:
        for average, parameter in zip(averages, model.parameters(), strict=True):
            average.mul_(config.ema_decay).add_(parameter, alpha=1 - config.ema_decay)

    return PlainStep(
        model=model,
        config=config,
        call=model,
        batches=lambda: data.batch(torch.randint(len(data), (config.batch_size,))),
        noised=lambda images, t, noise: noised(images, t, table, noise),
        target=velocity if diffusion.objective.prediction == "v" else lambda images, t, noise: noise,
        average=average,
        timesteps=len(table),
    )
