"""The loop of diffusers' examples/unconditional_image_generation/train_unconditional.py, with --use_ema.

It is written down here and not called, because the script trains in colour from image files and logs. What is left out
costs it time: pictures are decoded beforehand, nothing is logged, and no loss is read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from benchmarks.quality.loops import Average, Loop, Order, same_start
from benchmarks.quality.recipes import SCRIPT, Recipe
from ddpm_fast.data import Dataset
from ddpm_fast.errors import InputError
from ddpm_fast.formats.diffusers.network import from_diffusers, peer_network
from tests.support.plain import scaled

TYPES = {"eps": "epsilon", "v": "v_prediction"}
BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


class DiffusersAverage(Average):
    """diffusers' EMAModel as the script makes it."""

    def __init__(self, model: nn.Module, settings: Mapping[str, Any] = SCRIPT):
        self._model = model
        self._ema = EMAModel(
            model.parameters(),
            decay=settings["ema_max_decay"],
            use_ema_warmup=True,
            inv_gamma=settings["ema_inv_gamma"],
            power=settings["ema_power"],
        )

    def update(self) -> None:
        self._ema.step(self._model.parameters())

    def weights(self) -> dict[str, Tensor]:
        names = [name for name, _ in self._model.named_parameters()]
        return dict(zip(names, self._ema.shadow_params, strict=True))

    def state(self) -> dict[str, Any]:
        return self._ema.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        device = self._ema.shadow_params[0].device
        self._ema.load_state_dict(state)
        self._ema.to(device)


class DiffusersLoop(Loop):
    """See the top of this file."""

    def __init__(self, recipe: Recipe, data: Dataset, seed: int, device: torch.device, images: int):
        """images: How many will be seen in all: the script's cosine ends there."""
        super().__init__()
        settings = {**SCRIPT, **recipe.settings}
        self.config, self.own_network, self.device = recipe.unet(data), recipe.own_network, device
        start = same_start(recipe, data, seed, device)
        self.model = peer_network(self.config).to(device) if recipe.own_network else start
        self.model.train()
        objective = recipe.made_diffusion().objective
        if objective.loss_weighting != "none":
            raise InputError(f"loss_weighting is {objective.loss_weighting!r}; the script of diffusers has none")
        self.chain = DDPMScheduler(
            num_train_timesteps=settings["ddpm_num_steps"],
            beta_schedule=BETAS[recipe.diffusion["schedule"]],
            prediction_type=TYPES[objective.prediction],
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings["learning_rate"],
            betas=(settings["adam_beta1"], settings["adam_beta2"]),
            weight_decay=settings["adam_weight_decay"],
            eps=settings["adam_epsilon"],
        )
        self.order = Order(data, settings["train_batch_size"], seed, scaled)
        # The script counts whole epochs; here it is what so many images are, to the step.
        self.steps = round(images / len(data) * self.order.steps)
        self.lr = get_scheduler(
            settings["lr_scheduler"],
            optimizer=self.optimizer,
            num_warmup_steps=min(settings["lr_warmup_steps"], self.steps),
            num_training_steps=self.steps,
        )
        self.ema, self.clip, self.taken = DiffusersAverage(self.model, settings), settings["clip_grad_norm"], 0

    def _step(self) -> int:
        clean = self.order.batch(self.taken).to(self.device)
        noise = torch.randn(clean.shape, device=self.device)
        timesteps = torch.randint(0, self.chain.config.num_train_timesteps, (len(clean),), device=self.device)
        noisy = self.chain.add_noise(clean, noise, timesteps)
        output = self.model(noisy, timesteps)
        output = output.sample if self.own_network else output
        is_eps = self.chain.config.prediction_type == "epsilon"
        target = noise if is_eps else self.chain.get_velocity(clean, noise, timesteps)
        F.mse_loss(output.float(), target.float()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.lr.step()
        self.optimizer.zero_grad()
        self.ema.update()
        self.taken += 1
        return len(clean)

    def _own_average(self) -> Mapping[str, Tensor]:
        return self.ema.weights()

    def _renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return from_diffusers(weights, self.config) if self.own_network else weights

    def _save(self, folder: Path) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "lr": self.lr}
        return {name: part.state_dict() for name, part in parts.items()} | {
            "ema": self.ema.state(),
            "taken": self.taken,
        }

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        for name, part in {"model": self.model, "optimizer": self.optimizer, "lr": self.lr}.items():
            part.load_state_dict(state[name])
        self.ema.load(state["ema"])
        self.taken = state["taken"]
