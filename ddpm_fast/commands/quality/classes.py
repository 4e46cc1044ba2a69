"""Which classes the samples of a class-conditional model have.

A distance between two sets also counts how many images of each class they have. So the samples have the classes in the
proportions of the real images. Where each class has as many, as in CIFAR-10, that is every class in turn, which is also
what is drawn where the real images have no labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor

from ddpm_fast.commands.common import console
from ddpm_fast.commands.labels import check_null_class, describe_classes, parse_labels
from ddpm_fast.commands.quality.samples import StoredImages
from ddpm_fast.files.loaded_model import LoadedModel


def choose_classes(
    loaded: LoadedModel, labels: str | None, n: int, guidance: float | None, real: StoredImages | None
) -> Sequence[int] | None:
    """The class of each of n samples, or None for unconditional ones. What was chosen is said.

    Args:
        loaded: The model.
        labels: As parse_labels takes it; None for the proportions of the real images.
        n: How many samples.
        guidance: That of the sampling.
        real: The real images, if they are there.

    Raises:
        InputError: For classes that the model does not have, or a null class that it lacks.
    """
    counts = None if labels is not None or real is None or not loaded.classes else class_counts(real, loaded)
    classes: Sequence[int] | None
    if counts is None or len(set(counts)) == 1:
        classes = turns = parse_labels(labels, n, loaded.classes, loaded.label_names)
        said = describe_classes(turns, loaded.label_names)
    else:
        classes = in_proportion(counts, n).tolist()
        share = max(counts) / sum(counts)
        said = f"classes: in the proportions of {real.name if real else ''} ({share:.0%} are of the largest)"
    if guidance not in (None, 1):
        check_null_class(loaded, "--guidance leads away from the null class")
    if classes is None:
        check_null_class(loaded, "without labels the null class is used")
    if loaded.classes:
        console.print(escape(said))
    return classes


def class_counts(real: StoredImages, loaded: LoadedModel) -> list[int] | None:
    """How many of the real images there are of each class of the model; None if their classes are not the model's.

    Classes are matched by name where both have names, and else by number, if there are as many.
    """
    names, dataset = loaded.label_names, real.dataset
    labels = dataset.labels  # of all images, also where only some of them are looked at
    if labels is None or dataset.num_classes is None:
        return None
    number: dict[int, int] = {}
    if names and dataset.label_names:
        known = {name: i for i, name in enumerate(names)}
        number = {i: known[name] for i, name in enumerate(dataset.label_names) if name in known}
    elif dataset.num_classes == loaded.classes:
        number = {i: i for i in range(loaded.classes)}
    present = labels.unique().tolist()
    if any(label not in number for label in present):
        return None
    counts = [0] * loaded.classes
    for label in present:
        counts[number[label]] += int((labels == label).sum())
    return counts


def in_proportion(counts: Sequence[int], n: int) -> Tensor:
    """Classes in these proportions, as evenly mixed as can be: int64 [n].

    Each sample has the class that is the furthest behind its share so far, the first one of several. So the class of a
    sample does not depend on n, and equal counts give every class in turn.

    Args:
        counts: How many there are of each class; at least one is not 0.
        n: How many samples.
    """
    share = np.asarray(counts, np.int64)
    total, behind = share.sum(), np.zeros_like(share)
    classes = torch.empty(n, dtype=torch.int64)
    for i in range(n):
        behind += share
        chosen = int(behind.argmax())
        behind[chosen] -= total
        classes[i] = chosen
    return classes
