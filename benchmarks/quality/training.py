"""A training of a recipe: it leaves weights at given numbers of images, and says how long it took to get there. A
training that is stopped goes on where it last saved."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality.loops import LIVE, OWN, Loop, OurAverage, OurLoop
from benchmarks.quality.recipes import DIFFUSERS, LUCIDRAINS, OURS, Recipe
from ddpm_fast.data import Dataset
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path
from ddpm_fast.nn import UNet

SAVE_SECONDS = 60.0  # between two saves
STATE, RECORD = "state.pt", "training.json"


@dataclass(frozen=True)
class Mark:
    """Where a training was when it left weights: images seen, and the seconds that its steps had taken."""

    images: int
    seconds: float


def make_loop(recipe: Recipe, data: Dataset, seed: int, device: torch.device, images: int) -> Loop:
    """The loop of a recipe, before its first step. images: How many it will see in all."""
    if recipe.loop == OURS:
        return OurLoop(recipe, data, seed, device)
    if recipe.loop == DIFFUSERS:
        from benchmarks.quality.diffusers_loop import DiffusersLoop  # need not be installed

        return DiffusersLoop(recipe, data, seed, device, images)
    from benchmarks.quality.lucidrains_loop import LucidrainsLoop

    return LucidrainsLoop(recipe, data, seed, device)


def add_averages(loop: Loop, codes: Sequence[str]) -> None:
    """Keep the averages of other codes beside a loop's own. codes: Whose."""
    for code in codes:
        if code == OURS:
            loop.averages[code] = OurAverage(loop.model)
        elif code == DIFFUSERS:
            from benchmarks.quality.diffusers_loop import DiffusersAverage

            loop.averages[code] = DiffusersAverage(loop.model)
        elif code == LUCIDRAINS:
            from benchmarks.quality.lucidrains_loop import LucidrainsAverage

            loop.averages[code] = LucidrainsAverage(loop.model)


class Training:
    """A recipe with a seed, in a folder of its own.

    Attributes:
        folder: Where the weights of each mark are.
        marks: What has been reached.
    """

    def __init__(self, recipe: Recipe, seed: int, folder: Path, averages: Sequence[str] = ()):
        """averages: Of other codes, to be kept beside the recipe's own."""
        self.recipe, self.seed, self.folder, self._codes = recipe, seed, folder, tuple(averages)
        self.marks: list[Mark] = []

    @property
    def averages(self) -> tuple[str, ...]:
        """What weights() knows."""
        return (OWN, LIVE, *self._codes)

    def train(
        self,
        data: Dataset,
        device: torch.device,
        marks: Sequence[int],
        progress: Callable[[int], object] = lambda images: None,
    ) -> None:
        """Train to the last of the marks, from wherever it stopped.

        Args:
            data: The images.
            device: Where to train.
            marks: The numbers of images at which to leave weights, rising. A mark is the first step at or after it.
            progress: Told the images seen after each step.

        Raises:
            InputError: If the folder has another training.
        """
        self._begin(marks)
        if len(self.marks) == len(marks):
            return
        loop = make_loop(self.recipe, data, self.seed, device, marks[-1])
        add_averages(loop, self._codes)
        seconds, state = 0.0, self.folder / STATE
        if state.exists():
            found = torch.load(state, map_location="cpu", weights_only=True)
            loop.load(self.folder, found["loop"])
            seconds = found["seconds"]
            self.marks = self.marks[: found["marks"]]
        else:
            torch.manual_seed(self.seed + 1)  # of what the other codes draw
            self.marks = []
        since = begun = time.perf_counter()
        while len(self.marks) < len(marks):
            loop.step()
            progress(loop.images)
            is_mark = loop.images >= marks[len(self.marks)]
            if is_mark or time.perf_counter() - since > SAVE_SECONDS:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds += time.perf_counter() - begun
                if is_mark:
                    self._leave(loop, Mark(loop.images, seconds))
                self._save(loop, seconds)
                since = begun = time.perf_counter()

    def weights(self, mark: Mark, average: str) -> dict[str, torch.Tensor]:
        """The weights that were left at a mark, by the names of our UNet."""
        return load_file(self.folder / f"{average}-{mark.images}.safetensors")

    def network(self, data: Dataset, mark: Mark, average: str, device: torch.device) -> UNet:
        """Our network with the weights that were left at a mark."""
        model = UNet(self.recipe.unet(data))
        model.load_state_dict(self.weights(mark, average))
        return model.to(device).eval()

    def _begin(self, marks: Sequence[int]) -> None:
        """Find what there is of this training."""
        self._about = json.loads(
            json.dumps({"recipe": self.recipe.to_dict(), "seed": self.seed, "planned": list(marks)})
        )
        self._about["averages"] = list(self._codes)
        path = self.folder / RECORD
        if path.exists():
            found = json.loads(path.read_text())
            self.marks = [Mark(**mark) for mark in found.pop("marks")]
            if found != self._about:
                raise InputError(
                    f"{self.folder} has another training: choose another folder for this one, or remove it"
                )
        self.folder.mkdir(parents=True, exist_ok=True)

    def _leave(self, loop: Loop, mark: Mark) -> None:
        for average in self.averages:
            weights = {name: tensor.contiguous().cpu() for name, tensor in loop.weights(average).items()}
            save_file(weights, self.folder / f"{average}-{mark.images}.safetensors")
        self.marks.append(mark)

    def _save(self, loop: Loop, seconds: float) -> None:
        with atomic_path(self.folder / STATE) as path:
            torch.save({"loop": loop.save(self.folder), "seconds": seconds, "marks": len(self.marks)}, path)
        marks = [vars(mark) for mark in self.marks]
        with atomic_path(self.folder / RECORD) as path:
            path.write_text(json.dumps({**self._about, "marks": marks}, indent=1) + "\n")
