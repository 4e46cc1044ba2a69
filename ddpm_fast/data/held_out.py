"""Images that a training never sees, to measure its model on: which they are, and the two sets that a set falls into.

They are a function of (seed, count) and of the images' classes and order: the same in every process and at every
resume, and later, when the model is evaluated. A class has its share of them. Only the numbers of the images that are
held out are kept, so that holding out a thousand of a billion takes the memory of a thousand.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from ddpm_fast.data.dataset import Dataset
from ddpm_fast.data.imageset import HeldOut, ImageSet
from ddpm_fast.data.order import choose
from ddpm_fast.data.source import Source, Window
from ddpm_fast.data.stored import Broken, StoredDataset
from ddpm_fast.errors import InputError, check_integer, printable

_AS_A_GROUP = 1  # added to the number of a class's first image: group 0 is all images of a set without classes


def parse_held_out(text: str) -> int | float:
    """How many images a text such as "500" means, or which share of them one such as "0.05".

    Raises:
        InputError: If it is neither a number of at least 1 nor a share between 0 and 1.
    """
    try:
        amount = int(text) if text.isascii() and text.isdigit() else float(text)
    except ValueError:
        amount = math.nan
    return _checked(amount)


def _checked(amount: int | float) -> int | float:
    is_count = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1
    if not is_count and not (isinstance(amount, float) and 0 < amount < 1):
        raise InputError(
            f"held_out is {amount!r:.100}; expected a number of images such as 500, or a share of them between 0 and "
            "1 such as 0.05"
        )
    return amount


def split_held_out(dataset: ImageSet, amount: int | float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Split a set into the images that are trained on, and those that are held out.

    Args:
        dataset: All images.
        amount: How many are held out, or which share of them.
        seed: By which they are chosen.

    Returns:
        The training images, which say what was held out of them (`held_out`); and the images held out. Both are in the
        order of the data set, and of its kind: in memory, or read on demand, where a broken image is replaced by one of
        its own part.

    Raises:
        InputError: If the amount is none, or would leave nothing to train on.
    """
    n = len(dataset)
    amount = _checked(amount)
    count = amount if isinstance(amount, int) else max(1, round(amount * n))
    if count >= n:
        raise InputError(
            f"{count} of the {n} images of {printable(dataset.name)} would be held out, which leaves none to train on: "
            "hold out fewer"
        )
    seed = check_integer("seed", seed, -(2**63), 2**64 - 1)
    numbers = held_out_numbers(None if dataset.labels is None else dataset.labels.numpy(), n, count, seed)
    chosen = hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()
    held_out = HeldOut(count, seed, chosen, n, dataset.digest)
    kept = np.ones(n, bool)
    kept[numbers] = False
    if isinstance(dataset, StoredDataset):
        rest = _Rest(numbers, n)
        return _stored(dataset, rest, kept, held_out), _stored(dataset, _Listed(numbers), ~kept, None)
    if isinstance(dataset, Dataset):
        return _in_memory(dataset, kept, held_out), _in_memory(dataset, ~kept, None)
    raise InputError(f"a {type(dataset).__name__} cannot be split; expected a Dataset or a StoredDataset")


def split_as_recorded(dataset: ImageSet, recorded: object) -> tuple[ImageSet, ImageSet]:
    """Split a set as that of a model's training was.

    Args:
        dataset: The whole set, with the classes numbered as the model's.
        recorded: The entry "held_out" of the model's config["training"].

    Returns:
        As split_held_out.

    Raises:
        InputError: If the entry is damaged, or the images that were held out are others in this set.
    """
    entry = recorded if isinstance(recorded, Mapping) else {}
    count, seed = entry.get("count"), entry.get("seed")
    if not (isinstance(count, int) and isinstance(seed, int)) or isinstance(count, bool) or isinstance(seed, bool):
        raise InputError(f"the model's held_out is {recorded!r:.200}; expected its count and seed: use another model")
    training, held_out = split_held_out(dataset, count, seed)
    assert training.held_out is not None
    if training.held_out.chosen != entry.get("chosen"):
        raise InputError(
            f"{printable(dataset.name)} is not the set out of which this training held images out, or not with the "
            "same classes, so which images they were is unknown: give the images that the model was trained on"
        )
    return training, held_out


def held_out_numbers(labels: np.ndarray | None, n: int, count: int, seed: int) -> np.ndarray:
    """The numbers of the images that are held out: int64 [count], sorted.

    Args:
        labels: int64 [n], or None. Each class gives its share, rounded so that the sum is right.
        n: The number of images.
        count: How many of them are held out.
        seed: By which they are chosen.
    """
    if labels is None:
        return np.sort(choose(seed, count, n))
    by_class = np.argsort(labels, kind="stable")
    _, firsts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    shares = _shares(sizes, count)
    chosen = []
    for first, size, share in zip(firsts.tolist(), sizes.tolist(), shares.tolist(), strict=True):
        members = by_class[first : first + size]
        # By its first image, because the numbers of the classes may change.
        chosen.append(members[choose(seed, share, size, int(members[0]) + _AS_A_GROUP)])
    return np.sort(np.concatenate(chosen))


def _shares(sizes: np.ndarray, count: int) -> np.ndarray:
    """How many of each class are held out: in proportion, the largest remainders rounded up, and of no class all if
    that can be."""
    shares, remainders = np.divmod(sizes.astype(np.int64) * count, sizes.sum())
    while (missing := count - int(shares.sum())) > 0:
        room = sizes - shares
        least = 1 if (room > 1).any() else 0
        order = np.argsort(-remainders, kind="stable")
        shares[order[room[order] > least][:missing]] += 1
    return shares


def _in_memory(dataset: Dataset, kept: np.ndarray, held_out: HeldOut | None) -> Dataset:
    mask = torch.from_numpy(kept)
    labels = None if dataset.labels is None else dataset.labels[mask]
    return replace(dataset, images=dataset.images[mask], labels=labels, held_out=held_out)


def _stored(
    dataset: StoredDataset, places: "_Rest | _Listed", kept: np.ndarray, held_out: HeldOut | None
) -> StoredDataset:
    labels = None if dataset.labels is None else dataset.labels[torch.from_numpy(kept)]
    source = _PartOfSource(dataset.source, places)
    return replace(dataset, source=source, labels=labels, broken=Broken(), held_out=held_out)


class _Listed:
    """Some places, one after the other."""

    def __init__(self, places: np.ndarray) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> int:
        return int(self._places[i])

    def identity(self) -> bytes:
        """Bytes that say which places these are."""
        return b"listed" + self._places.astype("<i8").tobytes()


class _Rest:
    """The places of 0 .. n-1 that are not among some others, which are sorted."""

    def __init__(self, others: np.ndarray, n: int) -> None:
        self._n, self._others = n, others
        self._below = others - np.arange(len(others))  # how many of the rest lie below each of them

    def __len__(self) -> int:
        return self._n - len(self._others)

    def __getitem__(self, i: int) -> int:
        return i + int(np.searchsorted(self._below, i, side="right"))

    def identity(self) -> bytes:
        """Bytes that say which places these are."""
        return b"rest" + self._others.astype("<i8").tobytes()


class _PartOfSource:
    """Some images of a source, as a source."""

    def __init__(self, whole: Source, places: _Rest | _Listed) -> None:
        self._whole, self._places = whole, places
        self.name, self.shape, self.dtype, self.crops = whole.name, whole.shape, whole.dtype, whole.crops
        # Those of the data set count, which may be numbered otherwise.
        self.labels: np.ndarray | None = None
        self.label_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def read(self, i: int, window: Window | None = None) -> np.ndarray:
        """As a Source's."""
        return self._whole.read(self._places[i], window)

    def name_of(self, i: int) -> str:
        """As a Source's."""
        return self._whole.name_of(self._places[i])

    def identity(self) -> bytes:
        """As a Source's."""
        return self._places.identity() + self._whole.identity()

    def close(self) -> None:
        """As a Source's."""
        self._whole.close()
