"""Classes as files state them: numbers from 0 up, or names, which are numbered in natural order (2 before 10)."""

from collections.abc import Sequence

import numpy as np

from ddpm_fast.data.files import natural_key
from ddpm_fast.errors import InputError, printable

MOST_CLASSES = 1 << 16  # that a few images may belong to; the largest public set of labels has 21,841
UNLABELLED = -1  # in place of a class number


def check_class_numbers(labels: np.ndarray, names: Sequence[str] | None, where: str) -> None:
    """Refuse class numbers that are none.

    Args:
        labels: The class number of each image, int64 [n], with at least one image; UNLABELLED where there is none.
        names: One name for each class, or None.
        where: What they are the labels of, for the message.

    Raises:
        InputError: If a number is negative, has no name, or is so large that the numbers must have gaps.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < UNLABELLED:
        raise InputError(f"the labels of {where} go down to {low}, expected class numbers from 0 up")
    if names is not None and high >= len(names):
        raise InputError(
            f"the labels of {where} go up to {high}, but there are {len(names)} names of classes; expected one for "
            f"each class number from 0 to {high}"
        )
    if names is None and high >= max(len(labels), MOST_CLASSES):
        raise InputError(
            f"the labels of {where} go up to {high}, but there are {len(labels)} images; expected class numbers from "
            "0 up without gaps: number the classes again"
        )


def number_names(found: np.ndarray, names: Sequence[str], where: str) -> tuple[np.ndarray, list[str]]:
    """The labels of classes that have names.

    Args:
        found: For each image, the position of its class in `names`, int64 [n]; UNLABELLED where there is none.
        names: The names, each once, in any order.
        where: What they are the classes of, for the message.

    Returns:
        The labels, int64 [n], and the names in the order of their numbers.

    Raises:
        InputError: If there are more than MOST_CLASSES.
    """
    if len(names) > MOST_CLASSES:
        raise InputError(
            f"the images of {where} have more than {MOST_CLASSES} classes, such as {printable(names[0][:100])}; give "
            "the column or entry that holds the class, or train without classes"
        )
    order = sorted(range(len(names)), key=lambda i: natural_key(names[i]))
    number = np.full(len(names) + 1, UNLABELLED, np.int64)  # whose last place is that of UNLABELLED
    number[order] = np.arange(len(names))
    return number[found], [names[i] for i in order]
