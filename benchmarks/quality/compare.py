"""The same number of images of the same network by three codes: their losses, averages and defaults, measured by all
metrics with error bars over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.quality import tables
from benchmarks.quality.campaign import Campaign
from benchmarks.quality.loops import OWN
from benchmarks.quality.recipes import DIFFUSERS, LUCIDRAINS, OURS, Recipe
from benchmarks.quality.scores import Drawing, Judge, extractor_of
from benchmarks.quality.subjects import DIGITS_NETWORK, FAST, QUICK_NETWORK, compared, images_of, variants
from benchmarks.quality.training import Training
from benchmarks.runs import say
from ddpm_fast.commands.common import choose_device
from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.pictures.canvas import save_figure
from ddpm_fast.pictures.figures import draw_samples

# How each code draws images if it is told nothing.
OWN_SAMPLER = {OURS: ("ddpm", 50), DIFFUSERS: ("ddpm", 1000), LUCIDRAINS: ("ddpm", 1000)}
NEEDED = {DIFFUSERS: peers.DIFFUSERS, LUCIDRAINS: peers.LUCIDRAINS}
ALL_AVERAGES = (OURS, FAST, DIFFUSERS, LUCIDRAINS)  # recipes that are measured with each code's average
SHOWN = 16  # samples of each recipe in the picture


@dataclass(frozen=True)
class Settings:
    """The options of the command.

    Attributes:
        out: The file of the results; the table is beside it, and a picture of the first samples of seed 0.
        work: The folder of the trainings.
        images: How many each training sees.
        seeds: How many trainings there are of each code.
        n: How many images are drawn from each.
        own_samplers: Whether images are also drawn as each code does by itself.
        only: The recipes that are compared; all if empty.
        variants: Whether those of our fast recipe, too, which differ from it in one thing.
        features: See load_extractor.
        device: Where to train.
        quick: Whether to make a run of seconds.
    """

    out: Path
    work: Path
    images: int = 30_000
    seeds: int = 3
    n: int = 2000
    own_samplers: bool = False
    only: tuple[str, ...] = ()
    variants: bool = False
    features: str | None = None
    device: str = "auto"
    quick: bool = False


def main(settings: Settings) -> None:
    """Run it. Raises InputError for what does not fit."""
    check_integer("seeds", settings.seeds, 1)
    device = choose_device(settings.device)
    data = images_of("digits", None, settings.quick)
    network = QUICK_NETWORK if settings.quick else DIGITS_NETWORK
    drawing = Drawing(16, steps=2) if settings.quick else Drawing(settings.n)
    images = 32 if settings.quick else settings.images
    recipes = compared(network, images)
    if settings.variants:
        recipes |= {f"{FAST}, {what}": recipe for what, recipe in variants(recipes[FAST]).items()}
    for name in settings.only:
        if name not in recipes:
            raise InputError(f"{name!r:.99} is unknown; there are {', '.join(recipes)}")
    about = {"images": images, "quick": settings.quick, "threads": torch.get_num_threads()}
    judge = Judge(data, extractor_of(settings.features, device, settings.quick))
    campaign = Campaign(settings.out, settings.work, data, judge, device, **about)
    chosen = {name: recipe for name, recipe in recipes.items() if not settings.only or name in settings.only}
    trainings = _trained(campaign, chosen, images, settings.seeds, drawing)
    if not trainings:
        raise InputError("nothing was trained: no code that was asked for is installed; see benchmarks/README.md")
    averaged = {key: made for key, made in trainings.items() if key[1] == 0 and key[0] in ALL_AVERAGES}
    for (name, _), made in averaged.items():  # the other averages of one seed tell what the average is worth
        for average in made.averages:
            campaign.scored(made, name, made.marks[-1], drawing, average)
    for (name, _), made in trainings.items() if settings.own_samplers else ():
        sampler, steps = OWN_SAMPLER[made.recipe.loop]
        own = Drawing(drawing.n, sampler, 2 if settings.quick else steps)
        campaign.scored(made, name, made.marks[-1], own, OWN)
    campaign.write()
    shown = {name: made for (name, seed), made in trainings.items() if seed == 0}
    rows = [_samples(campaign, made, drawing) for made in shown.values()]
    save_figure(draw_samples(rows, list(shown)), settings.out.with_suffix(".png"))
    text = tables.scores(campaign.found["runs"])
    settings.out.with_suffix(".md").write_text(text + "\n")
    say(text)


def _trained(
    campaign: Campaign, recipes: Mapping[str, Recipe], images: int, seeds: int, drawing: Drawing
) -> dict[tuple[str, int], Training]:
    """Train by the recipes whose code is installed, once with each seed, and measure each training when it is done.

    Returns:
        The trainings by the recipe's name and the seed.
    """
    absent = {code: reason for code, peer in NEEDED.items() if (reason := peers.absent(peer))}
    found = {}
    for seed in range(seeds):
        for name, recipe in recipes.items():
            if recipe.loop in absent:
                say(f"{name} is left out: {absent[recipe.loop]}")
                continue
            others = [code for code in (OURS, *NEEDED) if code not in (recipe.loop, *absent)]
            made = found[name, seed] = campaign.trained(name, recipe, [images], seed, others)
            campaign.scored(made, name, made.marks[-1], drawing, OWN)
    return found


def _samples(campaign: Campaign, training: Training, drawing: Drawing) -> Tensor:
    """The first samples of a finished training."""
    model = training.network(campaign.data, training.marks[-1], OWN, campaign.device)
    return drawing.draw(model, training.recipe.made_diffusion(), SHOWN)
