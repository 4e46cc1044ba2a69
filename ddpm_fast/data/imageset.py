"""`ImageSet`: what every data set can do, wherever its images are kept."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ddpm_fast.errors import InputError, printable
from ddpm_fast.values import ValueRange

_NAMED = 20  # of many classes, so many are named in a message
_Set = TypeVar("_Set", bound="ImageSet")


@dataclass(frozen=True)
class HeldOut:
    """What was left out of a set that is trained on; see held_out.py.

    Attributes:
        count: How many images.
        seed: The seed by which they were chosen.
        chosen: The SHA-256 of their numbers in the whole set.
        whole_count: How many images the whole set has.
        whole_digest: The digest of the whole set.
    """

    count: int
    seed: int
    chosen: str
    whole_count: int
    whole_digest: str

    def recorded(self) -> dict[str, Any]:
        """What a model's file says of it: the whole set stands beside it there."""
        return {"count": self.count, "seed": self.seed, "chosen": self.chosen}


class ImageSet(ABC):
    """Images with their labels, if they have any, wherever they are kept.

    Attributes:
        labels: int64 [N], class numbers from 0, or None.
        label_names: One name for each class, or None.
        name: The name of the built-in set, or of the folder or file.
        value_range: What [-1, 1] stands for in float data; None for uint8.
        held_out: What was left out of these images, or None.
    """

    labels: torch.Tensor | None
    label_names: list[str] | None
    name: str
    value_range: ValueRange | None
    held_out: HeldOut | None

    @abstractmethod
    def __len__(self) -> int:
        """N, the number of images."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """The channels, height and width of each image."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """That of the images."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """A text that two sets share only if they give the same training."""

    @abstractmethod
    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images [B, C, H, W] and labels int64 [B] (or None) at `indices`, int64 [B]."""

    @abstractmethod
    def _relabelled(self: _Set, labels: torch.Tensor, label_names: list[str]) -> _Set:
        """The same images with other labels."""

    def recorded(self) -> dict[str, Any]:
        """What a model's file says of the images that it was trained on: which set, and what was held out of it."""
        held_out = self.held_out
        if held_out is None:
            return {"data": self.name, "count": len(self), "digest": self.digest}
        whole = {"data": self.name, "count": held_out.whole_count, "digest": held_out.whole_digest}
        return whole | {"held_out": held_out.recorded()}

    @property
    def num_classes(self) -> int | None:
        """The number of classes, including named ones that have no image. None without labels."""
        if self.labels is None:
            return None
        return len(self.label_names) if self.label_names else int(self.labels.max()) + 1

    def with_classes(self: _Set, names: Sequence[str]) -> _Set:
        """The same images, their labels renumbered to the classes of a model. Classes are matched by name.

        Args:
            names: The names of the model's classes, in its order.

        Raises:
            InputError: If the images have no labels, or their classes no names; if a name stands for two classes; or
                if the model lacks a class that has images.
        """
        if self.labels is None or self.label_names is None:
            missing = "labels" if self.labels is None else "class names"
            raise InputError(
                f"{printable(self.name)} has no {missing}, so its images cannot be matched with the classes of the "
                f"model, which are {_listed(names)}; give a folder with a sub-folder for each class, or an .npz with "
                "labels and label_names"
            )
        if list(names) == self.label_names:
            return self
        for owner, listed in ((printable(self.name), self.label_names), ("the model", names)):
            twice = [name for name, count in Counter(listed).items() if count > 1]
            if twice:
                raise InputError(
                    f"{owner} has more than one class called {_listed(twice)}, so classes cannot be matched by name; "
                    "rename them"
                )
        number = {name: i for i, name in enumerate(names)}
        present = [self.label_names[i] for i in self.labels.unique().tolist()]
        unknown = [name for name in present if name not in number]
        if unknown:
            raise InputError(
                f"{printable(self.name)} has images of the classes {_listed(unknown)}, which the model does not have; "
                f"its classes are {_listed(names)}; rename those classes or leave their images out"
            )
        renumbered = torch.tensor([number.get(name, -1) for name in self.label_names])
        labels = renumbered.to(self.labels.device)[self.labels]
        return self._relabelled(labels, list(names))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:_NAMED])
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
