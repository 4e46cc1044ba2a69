"""The weights with which the fine-tuning of a model begins: the model's, but for classes that it does not have."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.nn import UNet, UNetConfig

# The fields that may differ from the model's, beside the size: they are of no weight, of the table of the classes,
# or of what a network is told of augmentation.
_FREE = ("num_classes", "null_class", "dropout", "augment_channels")
_TABLE = "label_embedding.weight"
_TOLD = "augment_embedding.weight"
_LAST_BIAS = "time_embedding.linear2.bias"


@dataclass(frozen=True)
class Start:
    """What a training begins with.

    Attributes:
        weights: The state_dict.
        known: How many of the classes the model has.
        new: The numbers of those that it does not have, whose rows of the table are new.
    """

    weights: dict[str, Tensor]
    known: int
    new: list[int]


def check_fits(loaded: LoadedModel, network: UNetConfig) -> None:
    """Raises InputError if a network has other weights than a model, apart from its classes."""
    theirs = loaded.unet.config
    if len(theirs.channel_mult) == len(network.channel_mult):
        theirs = theirs.resized(network.height, network.width)
    own, other = dataclasses.asdict(network), dataclasses.asdict(theirs)
    differing = [name for name in own if own[name] != other[name] and name not in _FREE]
    if differing:
        listed = ", ".join(f"{name} is {other[name]} and here {own[name]}" for name in differing)
        raise InputError(
            f"{loaded.path} has another network than this ({listed}): make the network of the model's own config, as "
            "in dataclasses.replace(loaded.unet.config, num_classes=...), or .resized(height, width)"
        )


def starting_weights(loaded: LoadedModel, model: UNet, label_names: Sequence[str] | None) -> Start:
    """The weights of a model for a new network, which may have other classes.

    Classes are matched by name where the model and the data have names; where either has none, by number, if there are
    as many. The others keep the rows that the new network has. The null class keeps the model's row, if it has one. A
    network without classes is the model under its null class, and that row is added to the embedding of time, which is
    the same. What the network is told of augmentation means nothing to it at first: the model is what it is for
    images as they are.

    Args:
        loaded: The model.
        model: The new network.
        label_names: The names of its classes, or None.

    Raises:
        InputError: If the network has other weights, or without classes while the model has them and no null class.
    """
    check_fits(loaded, model.config)
    weights = {name: tensor.detach().clone() for name, tensor in loaded.unet.sampling_state().items()}
    if model.config.augment_channels:
        weights[_TOLD] = model.state_dict()[_TOLD]
    table = weights.pop(_TABLE, None)
    classes = model.config.num_classes
    if not classes:
        if table is not None:
            if not loaded.has_null_class:
                raise InputError(
                    f"{loaded.path} has classes and no null class, so nothing says what it would be without any: train "
                    "with classes"
                )
            weights[_LAST_BIAS] += table[-1]
        return Start(weights, 0, [])
    rows = model.state_dict()[_TABLE].clone()
    if model.config.null_class and loaded.has_null_class:
        # Without a table, the model is what it would be under a null class whose row is zero.
        rows[-1] = 0 if table is None else table[-1]
    places = _places(loaded, label_names, classes)
    for number, place in places.items():
        if table is not None:
            rows[number] = table[place]
    return Start(weights | {_TABLE: rows}, len(places), [i for i in range(classes) if i not in places])


def _places(loaded: LoadedModel, names: Sequence[str] | None, classes: int) -> dict[int, int]:
    """The classes that the model has: their numbers, and those that they have in the model."""
    theirs, count = loaded.label_names, loaded.classes
    if not count:
        return {}
    if theirs is None or names is None:
        return {i: i for i in range(classes)} if classes == count else {}
    counted, own = Counter(theirs), Counter(names)  # a name that stands for two classes stands for neither
    places = {name: i for i, name in enumerate(theirs) if counted[name] == own[name] == 1}
    return {i: places[name] for i, name in enumerate(names) if name in places}
