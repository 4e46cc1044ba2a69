"""Trainings and their scores: what has been found already is kept in a file, so that a campaign that is stopped goes
on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import machine
from benchmarks.quality.recipes import Recipe
from benchmarks.quality.scores import Drawing, Judge
from benchmarks.quality.training import Mark, Training
from benchmarks.runs import say
from ddpm_fast.commands.common import console
from ddpm_fast.data import Dataset
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path, check_writable
from ddpm_fast.nn.work import work as work_of


class Campaign:
    """Trainings in one folder, and a file of what they are worth.

    Attributes:
        found: The file's content. "runs" has a line for each score: "name", "seed", "images", "seconds", "average",
            "drawing", and the metrics.
    """

    def __init__(self, out: Path, work: Path, data: Dataset, judge: Judge, device: torch.device, **about: Any):
        """about: What else the file says; a file of other settings is not gone on with.

        Raises:
            InputError: If the file is of another campaign, or cannot be written.
        """
        self.out, self.work, self.data, self.judge, self.device = check_writable(out), work, data, judge, device
        settings = json.loads(json.dumps({**about, "about": judge.about}))
        self.found: dict[str, Any] = {**machine.environment(device), **settings, "recipes": {}, "runs": []}
        if out.exists():
            before = json.loads(out.read_text())
            differing = [name for name in settings if before.get(name) != settings[name]]
            if differing:
                raise InputError(f"{out} differs in {', '.join(differing)}: choose another file, or remove it")
            self.found |= {name: before[name] for name in ("recipes", "runs", "results", "parts") if name in before}

    def trained(
        self, name: str, recipe: Recipe, marks: Sequence[int], seed: int = 0, averages: Sequence[str] = ()
    ) -> Training:
        """A training up to the last mark, begun, gone on with or finished already.

        Args:
            name: Of the recipe, in the file.
            recipe: How to train.
            marks: See Training.train.
            seed: Of the training.
            averages: Of other codes, to be kept besides.
        """
        made = Training(recipe, seed, self.work / f"{name}-{seed}", averages)
        size = work_of(recipe.unet(self.data)).parameters
        self.found["recipes"][name] = {**json.loads(json.dumps(recipe.to_dict())), "parameters": size}
        with self._bar(f"{name}, seed {seed}", marks[-1]) as update:
            made.train(self.data, self.device, marks, update)
        return made

    def scored(self, training: Training, name: str, mark: Mark, drawing: Drawing, average: str) -> dict[str, Any]:
        """The line of a training at a mark, which is measured unless it is there already."""
        line: dict[str, Any] = {"name": name, "seed": training.seed, **vars(mark), "average": average}
        line["drawing"] = drawing.to_dict()
        for known in self.found["runs"]:
            if all(known[key] == value for key, value in line.items()):
                return known
        model = training.network(self.data, mark, average, self.device)
        with self._bar(f"{name}, seed {training.seed}, {mark.images:,} images seen: samples", drawing.n) as update:
            line |= self.judge.score(model, training.recipe.made_diffusion(), drawing, update)
        self.found["runs"].append(line)
        self.write()
        say(
            f"{name}, seed {line['seed']}, {average}: {mark.images:,} images, {mark.seconds:,.0f} s, "
            f"Frechet distance {line['fid']['value']:.3f}, kernel distance {1e3 * line['kid']['value']:.2f}e-3"
        )
        return line

    def write(self) -> None:
        """Write the file."""
        with atomic_path(self.out) as path:
            path.write_text(json.dumps(self.found, indent=1) + "\n")

    @contextmanager
    def _bar(self, text: str, total: int) -> Iterator[Any]:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]} images/s"))
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(text, total=total, rate="")

            def update(done: int) -> None:
                speed = bar.tasks[0].speed
                bar.update(task, completed=done, rate="" if speed is None else f"{speed:.1f}")

            yield update
