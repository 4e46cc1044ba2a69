"""What a training loop is to those who measure it, and ours."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.recipes import Recipe
from ddpm_fast.data import Dataset
from ddpm_fast.loops.training import Trainer
from ddpm_fast.nn import EMA, UNet

OWN, LIVE = "own", "live"  # the average that the loop itself keeps, and the weights themselves


class Average(abc.ABC):
    """An average of the weights of a network, by another code's rule."""

    @abc.abstractmethod
    def update(self) -> None:
        """Take in the weights after a training step."""

    @abc.abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The average, named as in the network's state_dict."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """What it goes on from: tensors and numbers."""

    @abc.abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state()."""


class OurAverage(Average):
    """ddpm_fast's EMA, beside another loop."""

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        self._ema, self._step = EMA(model, decay), 0

    def update(self) -> None:
        self._ema.update(self._step)
        self._step += 1

    def weights(self) -> dict[str, Tensor]:
        return self._ema.state_dict()

    def state(self) -> dict[str, Any]:
        return {"step": self._step, "averages": self._ema.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._ema.load_state_dict(state["averages"])


class Loop(abc.ABC):
    """A code's training of a network.

    Attributes:
        model: What is trained.
        images: How many images have been seen.
        averages: Further averages of the weights, which do not change the training.
    """

    model: nn.Module

    def __init__(self) -> None:
        self.images = 0
        self.averages: dict[str, Average] = {}

    def step(self) -> None:
        """Take a training step."""
        self.images += self._step()
        for average in self.averages.values():
            average.update()

    def weights(self, average: str) -> dict[str, Tensor]:
        """The weights by the names of our UNet. average: OWN, LIVE, or one of `averages`."""
        if average == OWN:
            found = self._own_average()
        elif average == LIVE:
            found = self.model.state_dict()
        else:
            found = self.averages[average].weights()
        return self._renamed({name: tensor.detach() for name, tensor in found.items()})

    def _renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the names of `model` as those of our UNet."""
        return weights

    @abc.abstractmethod
    def _step(self) -> int:
        """Take a training step, and say how many images it had."""

    @abc.abstractmethod
    def _own_average(self) -> Mapping[str, Tensor]:
        """By the names of `model`."""

    @abc.abstractmethod
    def _save(self, folder: Path) -> dict[str, Any]:
        """What the loop goes on from: tensors and numbers. Files may be written to the folder besides."""

    @abc.abstractmethod
    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        """Go on from what _save gave."""

    def save(self, folder: Path) -> dict[str, Any]:
        """What the loop and its averages go on from."""
        averages = {name: average.state() for name, average in self.averages.items()}
        return {
            "images": self.images,
            "loop": self._save(folder),
            "averages": averages,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all(),
        }

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Go on from what `save` gave."""
        self._load(folder, state["loop"])
        for name, average in self.averages.items():
            average.load(state["averages"][name])
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["random_cuda"])
        self.images = state["images"]


class OurLoop(Loop):
    """A Trainer."""

    def __init__(self, recipe: Recipe, data: Dataset, seed: int, device: torch.device):
        super().__init__()
        config = recipe.replace(config={"seed": seed}).config
        self.trainer = Trainer(recipe.unet(data), recipe.made_diffusion(), config, data, device)
        self.model = self.trainer.model

    def _step(self) -> int:
        self.trainer.train_step()
        return self.trainer.config.batch_size

    def _own_average(self) -> Mapping[str, Tensor]:
        return self.trainer.ema.state_dict()

    def _save(self, folder: Path) -> dict[str, Any]:
        return {"state": self.trainer.save(folder).name}

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        self.trainer.load(folder / state["state"])


class Order:
    """Which images a step of the other codes has: torch's DataLoader(shuffle=True), whose last batch of an epoch may be
    smaller, but an epoch depends on the seed and its number alone, so that a run can be resumed."""

    def __init__(self, data: Dataset, batch_size: int, seed: int, prepare: Callable[[Tensor], Tensor]):
        self.images = prepare(data.images)
        self.steps = -(-len(data) // batch_size)  # of an epoch
        self._batch_size, self._seed, self._epoch = batch_size, seed, -1

    def batch(self, step: int) -> Tensor:
        """The images of a training step, counted from 0."""
        epoch, place = divmod(step, self.steps)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order, self._epoch = torch.randperm(len(self.images), generator=generator), epoch
        return self.images[self._order[place * self._batch_size : (place + 1) * self._batch_size]]


def same_start(recipe: Recipe, data: Dataset, seed: int, device: torch.device) -> UNet:
    """Our network with the weights that a Trainer with this seed begins with."""
    torch.manual_seed(seed)
    return UNet(recipe.unet(data)).to(device)
