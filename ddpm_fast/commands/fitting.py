"""The images of a data set that are to be compared with a model: of its size, with its classes, and whether it was
trained on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from ddpm_fast.commands.common import console, expand_home
from ddpm_fast.data import BUILTIN, INDEX_DIGEST, ImageSet, open_dataset, split_as_recorded
from ddpm_fast.data.parts import list_parts
from ddpm_fast.data.selection import Selection
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.loaded_model import LoadedModel

_PART_NAMES = {"training": "those that the model was trained on", "held-out": "those held out of its training"}
PARTS = ("all", *_PART_NAMES)
PartOption = Annotated[
    str,
    typer.Option(help=f"which of the images: {', '.join(PARTS)}; of a model whose training held some out"),
]


def load_fitting(source: str, loaded: LoadedModel) -> ImageSet:
    """The images, as the model was trained on them, with its classes. What is assumed of them is said.

    Pictures of another size or of other colours are converted, as in training. Arrays must have the model's size.

    Args:
        source: As for open_dataset.
        loaded: The model.

    Raises:
        InputError: For images or classes that do not fit the model.
    """
    if loaded.value_range is not None:
        raise InputError(
            f"{loaded.name} was trained on floats: bits/dim is the likelihood of the 256 values of a pixel, and "
            "floats have none, only a density in units of their own; give a model of 8-bit images"
        )
    dataset = open_as(source, loaded.shape, loaded.classes > 0)
    if dataset.dtype != torch.uint8:
        raise InputError(f"{dataset.name} has floats, but the model was trained on 8-bit images; give such images")
    found, shape = ("x".join(map(str, one)) for one in (dataset.shape, loaded.shape))
    if found != shape:
        raise InputError(
            f"{dataset.name} has images of {found}, but the model was trained on {shape}: a likelihood is one of exact "
            "pixels, so an array is not converted here; give images of the model's size and channels"
        )
    return _with_classes(dataset, loaded)


def open_as(
    source: str, shape: tuple[int, int, int], has_classes: bool, selection: Selection | None = None
) -> ImageSet:
    """The images of a source, where they are pictures scaled and converted to a shape, which is then said.

    Arrays keep their size and channels, which the caller has to compare.

    Args:
        source: As for open_dataset.
        shape: The channels, height and width that are wanted.
        has_classes: Whether the sub-folders of a folder of pictures are classes. Array files have labels of their own.
        selection: What is said of the source besides its name.

    Raises:
        InputError: Where open_dataset does.
    """
    path = expand_home(source)
    is_folder = source not in BUILTIN and os.path.isdir(path)
    is_array = source in BUILTIN or path.lower().endswith((".npz", ".npy")) or (is_folder and list_parts(Path(path)))
    if is_array:
        return open_dataset(source, selection=selection)
    dataset = open_dataset(
        source,
        image_size=shape[1:],
        channels=shape[0],
        classes=has_classes and is_folder and any(entry.is_dir() for entry in os.scandir(path)),
        selection=selection,
    )
    console.print(
        f"Pictures that are not {'x'.join(map(str, shape))} are scaled, cut and converted to it, as in training."
    )
    return dataset


def _with_classes(dataset: ImageSet, loaded: LoadedModel) -> ImageSet:
    """The images with the numbers of the model's classes, matched by name where both have names."""
    classes, names = loaded.classes, loaded.label_names
    if not classes or dataset.labels is None or dataset.num_classes is None:
        return dataset
    if names and dataset.label_names:
        return dataset.with_classes(names)
    if dataset.num_classes > classes or (dataset.label_names and dataset.num_classes != classes):
        raise InputError(
            f"{dataset.name} has {dataset.num_classes} classes and the model {classes}: give images with the model's "
            "classes, or without labels (then the null class is used)"
        )
    known = names or dataset.label_names
    if known and known != [str(i) for i in range(classes)]:
        owner = printable(dataset.name) if names else "the model"
        listed = ", ".join(f"{printable(name)} ({i})" for i, name in enumerate(known[:10]))
        console.print(escape(f"The classes of {owner} have no names, so they are matched by number: {listed}"))
    return dataset


def is_training_set(dataset: ImageSet, loaded: LoadedModel) -> bool | None:
    """Whether the model was trained on these images; None if its file does not tell."""
    training = loaded.config.get("training") or {}
    digest = str(training.get("digest") or "")
    if digest == dataset.digest:
        return True
    # Images that stay on the disk have a digest of their index, which others may have for the same pixels.
    if digest and not any(one.startswith(INDEX_DIGEST) for one in (digest, dataset.digest)):
        return False
    if training.get("data") is None:
        return None
    if training["data"] != dataset.name:
        return False
    return True if dataset.name in BUILTIN else None


def part_of(dataset: ImageSet, loaded: LoadedModel, part: str) -> tuple[ImageSet, bool | None]:
    """Those of the images that --part asks for, and whether the model was trained on them, which is said.

    Args:
        dataset: The images, all of them.
        loaded: The model.
        part: One of PARTS.

    Returns:
        The images; and whether they are the training set, None if the model's file does not tell.

    Raises:
        InputError: If the training held no images out, or not of this set.
    """
    if part not in PARTS:
        raise InputError(f"--part is {part!r:.99}; expected {', '.join(PARTS)}")
    recorded = (loaded.config.get("training") or {}).get("held_out")
    if part == "all":
        known = is_training_set(dataset, loaded)
        say_training_set(dataset, known)
        if known and recorded is not None:
            console.print("A part of it was held out of the training: --part held-out is that part alone.")
        return dataset, known
    if recorded is None:
        raise InputError(
            f"--part {part}: {printable(loaded.name)} does not say that images were held out of its training: leave "
            "--part out, or train with --held-out"
        )
    training, held_out = split_as_recorded(dataset, recorded)
    chosen = held_out if part == "held-out" else training
    console.print(escape(f"{len(chosen):,} of {len(dataset):,} images of {dataset.name}: {_PART_NAMES[part]}"))
    return chosen, part == "training"


def say_training_set(dataset: ImageSet, known: bool | None) -> None:
    """Say so if what is measured on these images is, or may be, measured on the training set."""
    if known:
        console.print(f"{escape(dataset.name)} is the training set: new images may fare worse.")
    elif known is None:
        console.print("Whether the model was trained on these images is not known: the result may be of training data.")
