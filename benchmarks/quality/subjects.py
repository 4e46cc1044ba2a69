"""What is trained on, and the recipes that are compared on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import networks
from benchmarks.quality.recipes import DIFFUSERS, LUCIDRAINS, OURS, Recipe, ours, theirs
from benchmarks.quality.scores import Drawing
from ddpm_fast.data import Dataset, load_dataset
from ddpm_fast.errors import InputError, check_integer

FAST = "ours, fast"  # the recipe of the speedrun
# As small as tells the codes apart in minutes of two cores.
DIGITS_NETWORK: dict[str, Any] = {"model_channels": 16, "channel_mult": (1, 2, 2), "num_res_blocks": 1, "dropout": 0.0}
_CIFAR10 = networks.CIFAR10.to_dict()
CIFAR10_NETWORK = {name: _CIFAR10[name] for name in _CIFAR10 if name not in ("image_size", "in_channels")}
# The script's own network as far as its options go: the embedding of the time is added, not scaling and shifting.
SCRIPT_NETWORK = {"scale_shift": False}
QUICK_NETWORK: dict[str, Any] = {**DIGITS_NETWORK, "model_channels": 8, "channel_mult": (1, 1), "norm_groups": 4}


@dataclass(frozen=True)
class Subject:
    """What a speedrun is about.

    Attributes:
        name: What the user calls it.
        ours: Our recipe.
        theirs: That of diffusers' script.
        images: How many ours sees.
        their_images: How many theirs sees.
        marks: In how many parts a training is divided; the quality is measured at the end of each.
        drawing: How images are drawn, from all networks.
        goals: The Frechet distances to reach. Empty: the one that theirs reaches.
    """

    name: str
    ours: Recipe
    theirs: Recipe
    images: int
    their_images: int
    marks: int
    drawing: Drawing
    goals: tuple[float, ...] = ()

    def marks_of(self, images: int) -> list[int]:
        """Where a training of so many images is measured."""
        return [round(images * (part + 1) / self.marks) for part in range(self.marks)]


def digits(images: int = 50_000) -> Subject:
    """The 5,000 digits that the package ships. images: How many ours sees."""
    return Subject(
        name="digits",
        ours=fast(images, 32, 1e-3, 100).replace(network=DIGITS_NETWORK),
        theirs=theirs(DIFFUSERS, network={**DIGITS_NETWORK, **SCRIPT_NETWORK}, own_network=True),
        images=images,
        their_images=200_000,
        marks=5,
        drawing=Drawing(2000),
    )


def cifar10(images: int = 128 * 200_000) -> Subject:
    """CIFAR-10 on one GPU, to FID 4 and to the 3.17 of Ho et al. 2020, who trained for 800,000 steps of 128 images.
    images: How many ours sees."""
    recipe = fast(images, 128, 5e-4, 2000).replace(
        network={**CIFAR10_NETWORK, "dropout": 0.1}, config={"precision": "bf16", "flip": True}
    )
    return Subject(
        name="cifar10",
        ours=recipe,
        theirs=theirs(DIFFUSERS, network=CIFAR10_NETWORK, own_network=True),
        images=images,
        their_images=128 * 800_000,
        marks=10,
        drawing=Drawing(50_000, steps=50),
        goals=(4.0, 3.17),
    )


SUBJECTS: dict[str, Callable[..., Subject]] = {"digits": digits, "cifar10": cifar10}


def fast(images: int, batch_size: int, lr: float, warmup: int) -> Recipe:
    """Our recipe for so many images: the learning rate falls to 0 at the last of them."""
    config = {
        "batch_size": batch_size,
        "lr": lr,
        "warmup": warmup,
        "lr_schedule": "cosine",
        "lr_steps": -(-images // batch_size),
        "timestep_sampling": "stratified",
    }
    return ours(images, config=config)


def compared(network: dict[str, Any], images: int) -> dict[str, Recipe]:
    """The recipes that see the same number of images of the same network. All but FAST are told nothing else."""
    batch_size = min(32, images // 2)
    return {
        OURS: ours(images, network=network),
        FAST: fast(images, batch_size, 1e-3, min(100, images // batch_size - 1)).replace(network=network),
        DIFFUSERS: theirs(DIFFUSERS, network=network),
        LUCIDRAINS: theirs(LUCIDRAINS, network=network),
    }


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """A recipe of ours with one thing otherwise, by what that is."""
    config, images = recipe.config, recipe.config.batch_size * (recipe.config.lr_steps or 0)

    def batch(size: int) -> Recipe:
        steps = -(-images // size)
        return recipe.replace(config={"batch_size": size, "lr_steps": steps, "warmup": min(config.warmup, steps - 1)})

    return {
        "batch 16": batch(16),
        "batch 64": batch(64),
        "half the learning rate": recipe.replace(config={"lr": config.lr / 2}),
        "twice the learning rate": recipe.replace(config={"lr": config.lr * 2}),
        "constant learning rate": recipe.replace(config={"lr_schedule": "constant"}),
        "uniform timesteps": recipe.replace(config={"timestep_sampling": "uniform"}),
        "beta2 0.99": recipe.replace(config={"betas": (0.9, 0.99)}),
        "min_snr": recipe.replace(diffusion={"loss_weighting": "min_snr"}),
        "truncated_snr": recipe.replace(diffusion={"loss_weighting": "truncated_snr"}),
        "predicts the noise": recipe.replace(diffusion={"prediction": "eps"}),
        "linear schedule": recipe.replace(diffusion={"schedule": "linear"}),
        "dropout 0.1": recipe.replace(network={"dropout": 0.1}),
    }


def subject(name: str, images: int | None = None, quick: bool = False) -> Subject:
    """A subject by its name.

    Args:
        name: One of SUBJECTS.
        images: How many ours sees, if not the usual number.
        quick: Whether both see so few that it takes seconds.

    Raises:
        InputError: If there is none of that name, or ours is to see no images.
    """
    if name not in SUBJECTS:
        raise InputError(f"{name!r:.99} is unknown; there are {', '.join(SUBJECTS)}")
    if images is not None:
        check_integer("images", images, 1)
    made = SUBJECTS[name]() if images is None else SUBJECTS[name](images)
    if not quick:
        return made
    tiny = {"config": {"batch_size": 8, "warmup": 1, "lr_steps": 4, "precision": "fp32"}, "network": QUICK_NETWORK}
    sizes = {"images": 32, "their_images": 64, "marks": 2, "drawing": Drawing(16, steps=2)}
    recipes = {"ours": made.ours.replace(**tiny), "theirs": made.theirs.replace(network=QUICK_NETWORK)}
    return dataclasses.replace(made, **recipes, **sizes)


def images_of(subject: str, data: Path | None, quick: bool) -> Dataset:
    """The data set of a subject, without classes. quick: The middle of the first few of it.

    Raises:
        InputError: If CIFAR-10 was not given, or is something else.
    """
    if subject == "cifar10":
        if data is None:
            raise InputError(
                "cifar10 is not shipped: give --data, a folder, .zip or .npz of its 50,000 training images"
            )
        found = load_dataset(str(data))
        if found.shape != (3, 32, 32) or found.dtype.is_floating_point:
            raise InputError(
                f"{data} has {found.dtype} images of {found.shape}; CIFAR-10 has uint8 ones of (3, 32, 32)"
            )
    else:
        found = load_dataset("mnist5k" if data is None else str(data))
    middle = slice(found.shape[1] // 2 - 8, found.shape[1] // 2 + 8)
    images = found.images[:64, :, middle, middle].contiguous() if quick else found.images
    return dataclasses.replace(found, images=images, labels=None, label_names=None)
