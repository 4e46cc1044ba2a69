"""The grids of samples that `python -m ddpm_fast.train` draws from the averaged weights, to show what a run can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.commands.stopping import Stopped
from ddpm_fast.commands.training.averaged import Averaged, own_share
from ddpm_fast.errors import InputError
from ddpm_fast.loops.distributed import of_each_process, rank, world_size
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.loops.prepared import gather
from ddpm_fast.loops.sampling import prepare
from ddpm_fast.loops.training import Trainer
from ddpm_fast.pictures import images

SAMPLES = 64


class Grids:
    """The grids of one run, with one class in each column if there are classes."""

    def __init__(self, trainer: Trainer, averaged: Averaged, out: Path, warn: Callable[[str], object]):
        """averaged: What they are drawn from. warn: Prints a warning."""
        self._trainer, self._averaged, self._out, self._warn = trainer, averaged, out, warn
        classes = trainer.model.config.num_classes
        self._columns = min(classes, 10) or 8
        self._n = SAMPLES // self._columns * self._columns
        self._labels = [i % classes for i in range(self._n)] if classes else None

    def draw(self, check: Callable[[], object]) -> np.ndarray | None:
        """Write a grid. Where several processes train together all of them call this, and each draws a part of it.

        Args:
            check: Called before each sampling step. If it raises Stopped, in any process, there is no grid.

        Returns:
            The grid, uint8 [H, W, C], in the first process; None in the others, and if there is no grid.
        """
        path = self._out / f"samples-{self._trainer.step:08d}.png"
        try:
            part: Tensor | str | None = self._draw_part(check)
        except Stopped:
            part = None
        except (InputError, OSError, torch.OutOfMemoryError) as error:
            part = str(error) or type(error).__name__
        parts = of_each_process(part)
        if any(part is None for part in parts):
            return None
        try:
            if problem := next((part for part in parts if isinstance(part, str)), None):
                raise InputError(problem)
            if rank() > 0:
                return None
            x = images.shown_channels(torch.cat(parts), self._trainer.dataset.value_range)
            images.save_grid(path, x, columns=self._columns)
        except (InputError, OSError) as error:
            self._averaged.drop()
            self._warn(f"the sample grid {path} could not be written, and the training goes on: {error}")
            return None
        return images.make_grid(images.to_uint8(x), columns=self._columns)

    def _draw_part(self, check: Callable[[], object]) -> Tensor:
        """This process's part of the samples, which do not depend on how many processes there are."""
        trainer, part = self._trainer, own_share(self._n)
        options = SamplingOptions(
            steps=min(50, trainer.diffusion.num_timesteps),
            first_sample_id=part.start,
            labels=self._labels[part] if self._labels else None,
            cuda_graph=False if trainer.cuda_graph is False else None,
        )
        network = Network.of(self._averaged.network())
        prepared = prepare(network, trainer.diffusion, part.stop - part.start, options)
        x = gather(prepared.batches(check), prepared)
        return x if world_size() == 1 else x.cpu()
