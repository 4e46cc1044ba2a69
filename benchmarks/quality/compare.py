"""The same number of images of the same network by three codes: their losses, averages and defaults, measured by all
metrics with error bars over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.quality import tables
from benchmarks.quality.campaign import Campaign
from benchmarks.quality.loops import OWN
from benchmarks.quality.recipes import DIFFUSERS, LUCIDRAINS, OURS
from benchmarks.quality.scores import Drawing, Judge, extractor_of
from benchmarks.quality.subjects import DIGITS_NETWORK, FAST, QUICK_NETWORK, compared, images_of, variants
from benchmarks.quality.training import Training
from benchmarks.runs import say
from ddpm_fast.commands.common import choose_device
from ddpm_fast.errors import InputError

# How each code draws images if it is told nothing.
OWN_SAMPLER = {OURS: ("ddpm", 50), DIFFUSERS: ("ddpm", 1000), LUCIDRAINS: ("ddpm", 1000)}
NEEDED = {DIFFUSERS: peers.DIFFUSERS, LUCIDRAINS: peers.LUCIDRAINS}
ALL_AVERAGES = (OURS, FAST, DIFFUSERS, LUCIDRAINS)  # recipes that are measured with each code's average


@dataclass(frozen=True)
class Settings:
    """The options of the command.

    Attributes:
        out: The file of the results; the table is beside it.
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
    absent = {code: reason for code, peer in NEEDED.items() if (reason := peers.absent(peer))}
    trainings: dict[tuple[str, int], Training] = {}
    for seed in range(settings.seeds):
        for name, recipe in recipes.items():
            if settings.only and name not in settings.only:
                continue
            if recipe.loop in absent:
                say(f"{name} is left out: {absent[recipe.loop]}")
                continue
            others = [code for code in (OURS, *NEEDED) if code not in (recipe.loop, *absent)]
            made = trainings[name, seed] = campaign.trained(name, recipe, [images], seed, others)
            campaign.scored(made, name, made.marks[-1], drawing, OWN)
    averaged = {key: made for key, made in trainings.items() if key[1] == 0 and key[0] in ALL_AVERAGES}
    for (name, _), made in averaged.items():  # the other averages of one seed tell what the average is worth
        for average in made.averages:
            campaign.scored(made, name, made.marks[-1], drawing, average)
    for (name, _), made in trainings.items() if settings.own_samplers else ():
        sampler, steps = OWN_SAMPLER[made.recipe.loop]
        own = Drawing(drawing.n, sampler, 2 if settings.quick else steps)
        campaign.scored(made, name, made.marks[-1], own, OWN)
    campaign.write()
    text = tables.scores(campaign.found["runs"])
    settings.out.with_suffix(".md").write_text(text + "\n")
    say(text)
