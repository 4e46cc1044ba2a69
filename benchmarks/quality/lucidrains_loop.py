"""The loop of lucidrains' Trainer (denoising-diffusion-pytorch 2.3.4), around our network.

Its GaussianDiffusion is the package's own, and so is its average. The Trainer itself is not called: it reads image
files in as many processes as there are cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from ema_pytorch import EMA
from torch import Tensor, nn

from benchmarks.quality.loops import Average, Loop, Order, same_start
from benchmarks.quality.recipes import TRAINER, Recipe
from ddpm_fast.data import Dataset


class Called(nn.Module):
    """Our network as its GaussianDiffusion calls one."""

    def __init__(self, network: nn.Module, channels: int):
        super().__init__()
        self.network = network
        self.channels = self.out_dim = channels
        self.self_condition = False

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.network(x, t)


class LucidrainsAverage(Average):
    """ema_pytorch's EMA as the Trainer makes it."""

    def __init__(self, model: nn.Module, settings: Mapping[str, Any] = TRAINER):
        self._ema = EMA(
            model, beta=settings["ema_decay"], update_every=settings["ema_update_every"], include_online_model=False
        )

    def update(self) -> None:
        self._ema.update()

    def weights(self) -> dict[str, Tensor]:
        return self._ema.ema_model.state_dict()

    def state(self) -> dict[str, Any]:
        return self._ema.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        self._ema.load_state_dict(state)


class LucidrainsLoop(Loop):
    """See the top of this file."""

    def __init__(self, recipe: Recipe, data: Dataset, seed: int, device: torch.device):
        super().__init__()
        settings = {**TRAINER, **recipe.settings}
        self.model, self.device = same_start(recipe, data, seed, device).train(), device
        channels, *size = data.shape
        self.diffusion = GaussianDiffusion(Called(self.model, channels), image_size=tuple(size)).to(device)
        self.order = Order(data, settings["train_batch_size"], seed, lambda images: images.float() / 255)
        self.optimizer = torch.optim.Adam(
            self.diffusion.parameters(), lr=settings["train_lr"], betas=settings["adam_betas"]
        )
        self.ema, self.clip, self.taken = LucidrainsAverage(self.model, settings), settings["max_grad_norm"], 0

    def _step(self) -> int:
        images = self.order.batch(self.taken).to(self.device)
        self.diffusion(images).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        self.taken += 1
        return len(images)

    def _own_average(self) -> Mapping[str, Tensor]:
        return self.ema.weights()

    def _save(self, folder: Path) -> dict[str, Any]:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | {"ema": self.ema.state(), "taken": self.taken}

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load(state["ema"])
        self.taken = state["taken"]
