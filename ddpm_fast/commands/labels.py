"""How the commands' --labels names the classes of images, and how the chosen classes are said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.loaded_model import LoadedModel

MOST_NAMED = 10  # classes that a line names
LABELS_HELP = "classes by name or index, taken in turn, such as 7 or cat,dog; or none; if not given every class in turn"


class Turns(Sequence[int]):
    """The classes of n samples, which are taken in turn. None of them is stored, however many samples there are.

    Attributes:
        chosen: The classes, beginning with that of sample 0.
    """

    def __init__(self, chosen: Sequence[int], n: int, first_sample_id: int = 0):
        """Of chosen, n and first_sample_id, see parse_labels."""
        self.chosen = list(chosen)
        turn = first_sample_id % len(chosen)
        self._period = self.chosen[turn:] + self.chosen[:turn]
        self._n = n

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        """The class of a sample, or those of some samples."""
        numbers = range(self._n)[index]
        if isinstance(numbers, int):
            return self._period[numbers % len(self._period)]
        return [self._period[i % len(self._period)] for i in numbers]

    @property
    def distinct(self) -> list[int]:
        """Each class that a sample has, once, in the order of the samples."""
        return list(dict.fromkeys(self._period[: self._n]))

    def tensor(self) -> Tensor:
        """All of them: int64 [n]."""
        return torch.tensor(self._period)[torch.arange(self._n) % len(self._period)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of them, as numpy.asarray asks for them."""
        return self.tensor().numpy().astype(np.int64 if dtype is None else dtype)


def parse_labels(
    text: str | None, n: int, classes: int, names: Sequence[str] | None, first_sample_id: int = 0
) -> Turns | None:
    """The classes of n samples, or None for unconditional ones.

    A text that is a name is that name, also where the name is a number ("1" in a model of the classes "1", "2", "3").
    The index of a class is taken too, unless a class is named by another number than its index.

    Args:
        text: None for every class in turn, "none" for unconditional samples, or classes by name or index, separated by
            commas, which are taken in turn.
        n: How many samples there are.
        classes: The number of the model's classes; 0 for an unconditional model.
        names: The names of the classes, if they have any.
        first_sample_id: The id of the first sample. A sample's turn depends on its id, so that a set of samples can be
            continued.

    Raises:
        InputError: For a class that the model does not have, and for an index that could be meant as a name.
    """
    if text is None and classes == 0:
        return None
    by_name = {name: i for i, name in enumerate(names or [])}
    if text == "none" and "none" not in by_name:
        return None
    if classes == 0:
        raise InputError("--labels: this model is unconditional (it was trained without classes); leave it out")
    if text is None:
        chosen = list(range(classes))
    elif text in by_name:  # a name may have commas and spaces
        chosen = [by_name[text]]
    else:
        chosen = _by_name_or_index(text, classes, by_name)
    return Turns(chosen, n, first_sample_id)


def _by_name_or_index(text: str, classes: int, by_name: dict[str, int]) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    by_index = {str(i): i for i in range(classes)}
    known = by_index | by_name
    unknown = [part for part in parts if part not in known]
    if unknown or not parts:
        ranges = f"0..{classes - 1}" + (f" or {', '.join(map(printable, by_name))}" if by_name else "")
        raise InputError(f"--labels: {', '.join(unknown) or 'nothing'} is no class of this model; it has {ranges}")
    misleading = [name for name, i in by_name.items() if name.isdecimal() and name != str(i)]
    indices = [part for part in parts if part not in by_name]
    if misleading and indices:
        raise InputError(
            f"--labels: {', '.join(indices)} is no name of a class, and as an index it could be mistaken for one, "
            f"because some classes are named by numbers; give names: {', '.join(map(printable, by_name))}"
        )
    return [known[part] for part in parts]


def describe_classes(labels: Turns | None, names: Sequence[str] | None) -> str:
    """A line that says which classes were chosen, each with its name and index: "classes: cat (0), dog (1)"."""
    if labels is None:
        return "classes: none"
    chosen = labels.distinct
    named = dict(enumerate(names or []))
    texts = [f"{printable(named[i])} ({i})" if i in named else str(i) for i in chosen[:MOST_NAMED]]
    more = f" and {len(chosen) - MOST_NAMED} more" if len(chosen) > MOST_NAMED else ""
    return f"classes: {', '.join(texts)}{more}"


def check_null_class(loaded: LoadedModel, why: str) -> None:
    """Raises InputError if the model has classes but no null class, or one that was never trained, because its training
    dropped no labels. why: what the null class is needed for."""
    if not loaded.has_null_class:
        raise InputError(f"{why}, but {loaded.path} has none: give labels, and leave guidance out")
    label_drop = (loaded.config.get("training") or {}).get("label_drop")
    if loaded.classes and label_drop == 0:
        raise InputError(
            f"{why}, but {loaded.path} was trained with --label-drop 0, so its null class was never trained: give "
            "labels and leave guidance out, or train with --label-drop 0.1"
        )
