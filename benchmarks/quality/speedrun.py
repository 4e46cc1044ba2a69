"""The speedrun: the time from nothing to a given quality, ours beside the loop of diffusers' example.

The time is that of the training steps alone, on both sides. Neither loading the images, nor saving, nor drawing samples
to measure them is counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from benchmarks import peers
from benchmarks.quality import figure, tables
from benchmarks.quality.campaign import Campaign
from benchmarks.quality.loops import OWN
from benchmarks.quality.recipes import DIFFUSERS, OURS, SCRIPT, Recipe
from benchmarks.quality.scores import Judge, extractor_of
from benchmarks.quality.subjects import SCRIPT_NETWORK, Subject, images_of, subject
from benchmarks.quality.training import make_loop
from benchmarks.runs import say
from ddpm_fast.commands.common import choose_device
from ddpm_fast.data import Dataset
from ddpm_fast.errors import InputError

KERNELS, PRECISION, AVERAGE = "kernels", "precision", "average"
TIMED_SECONDS = 4.0  # of one round of one side, where only the time of a step is measured
ROUNDS = 5


@dataclass(frozen=True)
class Settings:
    """The options of the command.

    Attributes:
        subject: The name of a subject.
        out: The file of the results; the figure is beside it.
        work: The folder of the trainings.
        data: The images, where they are not shipped.
        features: See load_extractor.
        images: How many images ours sees; None for the usual number.
        device: Where to train.
        seed: Of the trainings.
        parts: Which parts of ours are put back to theirs, each alone.
        ours_only: Whether theirs is not trained; the goals are then the subject's, which may have none if it is the
            parts that are asked for.
        quick: Whether to make a run of seconds, which shows that everything works.
    """

    subject: str
    out: Path
    work: Path
    data: Path | None = None
    features: str | None = None
    images: int | None = None
    device: str = "auto"
    seed: int = 0
    parts: tuple[str, ...] = ()
    ours_only: bool = False
    quick: bool = False


def put_back(recipe: Recipe) -> dict[str, Recipe]:
    """Our recipe with one part as diffusers' script has it, by the part's name."""
    steps = recipe.config.lr_steps
    batches = {"batch_size": SCRIPT["train_batch_size"]}
    if steps is not None:
        batches["lr_steps"] = -(-steps * recipe.config.batch_size // SCRIPT["train_batch_size"])
    rate = {"lr": SCRIPT["learning_rate"], "warmup": SCRIPT["lr_warmup_steps"]}
    if steps is not None:  # the script's cosine ends with the training, too; its warm-up must be over by then
        rate["warmup"] = min(rate["warmup"], steps - 1)
    betas = {"betas": (SCRIPT["adam_beta1"], SCRIPT["adam_beta2"]), "weight_decay": SCRIPT["adam_weight_decay"]}
    return {
        # The script's loss is the error of the noise, which is SNR times that of the image.
        "weighting": recipe.replace(diffusion={"loss_weighting": "snr"}),
        "weighting and prediction": recipe.replace(diffusion={"prediction": "eps", "loss_weighting": "none"}),
        "timesteps": recipe.replace(config={"timestep_sampling": "uniform"}),
        "schedule": recipe.replace(diffusion={"schedule": SCRIPT["ddpm_beta_schedule"]}),
        "learning rate": recipe.replace(config=rate),
        "batch": recipe.replace(config=batches),
        "optimiser": recipe.replace(config=betas),
        "network": recipe.replace(network=SCRIPT_NETWORK),
    }


PARTS = (KERNELS, PRECISION, AVERAGE, *put_back(Recipe(OURS)))


def main(settings: Settings) -> None:
    """Run it. Raises InputError for what does not fit."""
    chosen = subject(settings.subject, settings.images, settings.quick)
    unknown = [part for part in settings.parts if part not in PARTS]
    if unknown:
        raise InputError(f"part {unknown[0]!r:.99} is unknown; there are {', '.join(PARTS)}")
    if settings.ours_only and not chosen.goals and not settings.parts:
        raise InputError(
            f"{chosen.name} has no fixed goal: it is what the other code reaches, so train that too, or ask for --parts"
        )
    needed = not settings.ours_only or {KERNELS, AVERAGE} & {*settings.parts}
    if needed and (reason := peers.absent(peers.DIFFUSERS)):
        raise InputError(f"{reason}; or train ours alone with --ours-only")
    device = choose_device(settings.device)
    data = images_of(chosen.name, settings.data, settings.quick)
    judge = Judge(data, extractor_of(settings.features, device, settings.quick))
    campaign = Campaign(
        settings.out,
        settings.work,
        data,
        judge,
        device,
        subject=chosen.name,
        images=chosen.images,
        seed=settings.seed,
        threads=torch.get_num_threads(),
        quick=settings.quick,
    )
    run = Speedrun(chosen, campaign, settings.seed)
    if not settings.ours_only:
        run.train("theirs", chosen.theirs, chosen.marks_of(chosen.their_images))
    run.train("ours", chosen.ours, chosen.marks_of(chosen.images))
    run.conclude()
    if settings.parts:
        run.parts(settings.parts)
    text = [tables.times(campaign.found["results"])] if campaign.found["results"] else []
    if "parts" in campaign.found:
        text.append(tables.parts(campaign.found["parts"]))
    settings.out.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    path = figure.draw(campaign.found, settings.out.with_suffix(".png"))
    say(f"Wrote {settings.out} and {path}")
    if not all(result["ours"] for result in campaign.found["results"]):
        raise typer.Exit(1)


class Speedrun:
    """The trainings of a speedrun, and what follows from their scores."""

    def __init__(self, chosen: Subject, campaign: Campaign, seed: int):
        self.subject, self.campaign, self.seed = chosen, campaign, seed

    def train(self, name: str, recipe: Recipe, marks: Sequence[int], averages: Sequence[str] = ()) -> None:
        """Train to the last mark, and measure at each."""
        training = self.campaign.trained(name, recipe, marks, self.seed, averages)
        for average in (OWN, *averages):
            at = training.marks if average == OWN else training.marks[-1:]
            for mark in at:
                self.campaign.scored(training, name, mark, self.subject.drawing, average)

    def curve(self, name: str, average: str = OWN) -> list[dict[str, Any]]:
        """The lines of a training, in the order of the images seen."""
        lines = [x for x in self.campaign.found["runs"] if x["name"] == name and x["average"] == average]
        return sorted(lines, key=lambda line: line["images"])

    def conclude(self) -> None:
        """Say when each side was at each goal."""
        theirs = self.curve("theirs")
        goals = self.subject.goals or [line["fid"]["value"] for line in theirs[-1:]]
        self.campaign.found["results"] = [conclusion(goal, self.curve("ours"), theirs) for goal in goals]
        self.campaign.write()
        for result in self.campaign.found["results"]:
            sides = [f"{side} {tables.point(result[side])}" for side in ("ours", "theirs")]
            ratio = "" if result["speedup"] is None else f": {result['speedup']:.2f} times sooner"
            say(f"Frechet distance {result['goal']:.3f}: {', '.join(sides)}{ratio}")

    def parts(self, names: Sequence[str]) -> None:
        """Put parts of ours back, each alone, and say what that costs."""
        full = self.subject.ours
        marks = [self.subject.images]
        recipes = put_back(full)
        for name in names:
            if name == AVERAGE:
                self.train(f"{name} put back", full, marks, [DIFFUSERS])
            elif name in recipes:
                self.train(f"{name} put back", recipes[name], marks)
        # What ours reaches in fewer images, each with a learning rate that falls to 0 at its end.
        lengths = [self.subject.images // 4, self.subject.images // 2]
        for images in lengths:
            self.train(f"ours, {images} images", shortened(full, self.subject.images, images), [images])
        curve = [self.curve(f"ours, {images} images")[-1] for images in lengths] + [self.curve("ours")[-1]]
        rows = []
        for name in names:
            if name == KERNELS:
                rows.append({"part": name, **self._kernels()})
            elif name == PRECISION:
                rows.append({"part": name, **self._precision()})
            else:
                line = self.curve(f"{name} put back", DIFFUSERS if name == AVERAGE else OWN)[-1]
                rows.append({"part": name, **cost(line, curve)})
        self.campaign.found["parts"] = rows
        self.campaign.write()
        for row in rows:
            say(
                ", ".join(
                    f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()
                )
            )

    def _kernels(self) -> dict[str, Any]:
        """The same settings in the script's loop around diffusers' network: only the time can differ."""
        config, data = self.subject.ours.config, self.campaign.data
        recipe = Recipe(
            DIFFUSERS,
            network=self.subject.ours.network,
            diffusion={"schedule": "cosine", "prediction": "v"},
            settings={"train_batch_size": config.batch_size, "learning_rate": config.lr},
            own_network=True,
        )
        return self._timed({"ours": self.subject.ours, "theirs": recipe}, data)

    def _precision(self) -> dict[str, Any]:
        if self.subject.ours.config.precision == "fp32":
            return {"seconds": 1.0, "images": 1.0, "note": "both compute in fp32 here"}
        fp32 = self.subject.ours.replace(config={"precision": "fp32"})
        return self._timed({"ours": self.subject.ours, "theirs": fp32}, self.campaign.data)

    def _timed(self, recipes: Mapping[str, Recipe], data: Dataset) -> dict[str, Any]:
        """How much longer an image takes, as the median of rounds in which both take turns."""
        loops = {name: make_loop(recipe, data, 0, self.campaign.device, 10**6) for name, recipe in recipes.items()}
        seconds = 0.0 if self.campaign.found["quick"] else TIMED_SECONDS
        ratios = []
        for _ in range(1 if self.campaign.found["quick"] else ROUNDS):
            each = {name: _per_image(loop.step, recipes[name].batch_size, seconds) for name, loop in loops.items()}
            ratios.append(each["theirs"] / each["ours"])
        ratio = statistics.median(ratios)
        return {"seconds": ratio, "images": 1.0, "time": ratio}


def _per_image(step: Callable[[], object], images: int, seconds: float) -> float:
    step()
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    begun, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - begun < seconds:
        step()
        n += images
    synchronize()
    return (time.perf_counter() - begun) / n


def shortened(recipe: Recipe, images: int, fewer: int) -> Recipe:
    """A recipe for fewer images than it was made for."""
    steps = recipe.config.lr_steps
    if steps is None:
        return recipe
    return recipe.replace(config={"lr_steps": max(recipe.config.warmup + 1, -(-steps * fewer // images))})


def reached(goal: float, curve: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first point of a curve that is at a goal: images and seconds; None if none is."""
    for line in curve:
        if line["fid"]["value"] <= goal:
            return {"images": line["images"], "seconds": line["seconds"], "fid": line["fid"]["value"]}
    return None


def conclusion(goal: float, ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> dict[str, Any]:
    """When both sides were at a goal, and how much sooner ours was. Theirs counts from its first point there, too."""
    sides = {"ours": reached(goal, ours), "theirs": reached(goal, theirs)}
    first, second = sides["ours"], sides["theirs"]
    speedup = second["seconds"] / first["seconds"] if first and second and first["seconds"] else None
    return {"goal": goal, **sides, "speedup": speedup}


def cost(line: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What it costs to put a part back.

    Args:
        line: The score of the training with the part put back.
        curve: The scores of complete trainings of ours of several lengths, the longest one last, which saw as many
            images as `line`.

    Returns:
        The Frechet distance; "images": how many times fewer images ours needs for the same distance, by straight lines
        between the logarithms of `curve`, which go on beyond its ends; "seconds": how many times as long an image
        takes; "time": their product.
    """
    whole = curve[-1]
    images = np.log([point["images"] for point in curve])
    distances = np.log([point["fid"]["value"] for point in curve])
    place = float(np.log(line["fid"]["value"]))
    # Between the two neighbours by distance, or beyond the last two.
    upper = next((i for i in range(1, len(curve)) if distances[i] <= place), len(curve) - 1)
    slope = (images[upper] - images[upper - 1]) / (distances[upper] - distances[upper - 1] or -np.inf)
    equal = images[upper] + slope * (place - distances[upper])
    fewer = float(np.exp(images[-1] - equal))
    seconds = (line["seconds"] / line["images"]) / (whole["seconds"] / whole["images"])
    return {"fid": line["fid"]["value"], "images": fewer, "seconds": seconds, "time": fewer * seconds}
