"""The fields of a network's config: plain values that a file may have put there, checked one by one.

A config is a frozen dataclass of plain numbers, strings and tuples, so that it can be stored as JSON.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from ddpm_fast.errors import InputError, check_integer

# The least and the largest value of each number. Nobody needs a larger network, and a file may ask for anything.
_RANGES = {
    "image_size": (1, 2**14),
    "in_channels": (1, 2**14),
    "model_channels": (1, 2**14),
    "num_res_blocks": (1, 2**10),
    "num_heads": (1, 2**14),
    "norm_groups": (1, 2**14),
    "num_classes": (0, 2**24),
    "attention_resolutions": (1, 2**14),
    "decoder_attention": (1, 2**14),
    "stem_channels": (0, 2**14),
    "head_channels": (0, 2**14),
    "condition_channels": (0, 2**14),
    "augment_channels": (0, 2**14),
}
_LARGEST_MULTIPLE = 2**14
_MOST_LEVELS = 15  # an image of the largest size can be halved 14 times


def set_typed(config: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Give each field of a config its type: lists become tuples, and ints floats. Anything else must have the type.

    Args:
        config: A frozen dataclass that is being made.
        choices: What a field that is a name may be.

    Raises:
        InputError: For a value of another type, outside its range, or none of the choices.
    """
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, _typed(field.name, getattr(config, field.name), field.type))
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise InputError(f"{name} is {shown(getattr(config, name))}; expected one of {', '.join(known)}")


def fields_from_dict(kind: Any, fields: Any, name: str, added: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config as a file has them.

    Args:
        kind: The config's dataclass.
        fields: What the file has.
        name: What the network is called in messages, such as "U-Net".
        added: The fields that files may lack, with their values then.

    Raises:
        InputError: For unknown and missing fields.
    """
    if not isinstance(fields, Mapping):
        raise InputError(f"a {name}'s config is a {type(fields).__name__}; expected a dict of its fields")
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(map(str, fields)) - set(known))
    if unknown:
        raise InputError(f"unknown {name} config field(s) {', '.join(unknown)}; known are {', '.join(known)}")
    missing = [field for field in known if field not in fields and field not in added]
    if missing:
        raise InputError(
            f"missing {name} config field(s) {', '.join(missing)}; all are needed: start from "
            f"{kind.__name__}().to_dict()"
        )
    return {**added, **fields}


def _typed(name: str, value: Any, kind: Any) -> Any:
    if kind is int:
        return check_integer(name, value, *_RANGES[name])
    if kind == int | tuple[int, int]:
        return _size(name, value)
    if kind == tuple[int, ...] | None and value is None:
        return None
    if kind in (tuple[int, ...], tuple[int, ...] | None):
        return tuple(check_integer(name, v, *_RANGES[name]) for v in _levels(name, value, "integers"))
    if kind == tuple[float, ...]:
        return tuple(_multiple(name, v) for v in _levels(name, value, "numbers"))
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{name} is {shown(value)}; expected {kind.__name__}")
    return value


def _levels(name: str, value: Any, what: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{name} is {shown(value)}; expected a list of {what}")
    if len(value) > _MOST_LEVELS:
        raise InputError(f"{name} has {len(value)} entries; expected at most {_MOST_LEVELS}, one for each level")
    return value


def _size(name: str, value: Any) -> int | tuple[int, int]:
    """A side, or (height, width) where they differ."""
    if not isinstance(value, (list, tuple)):
        return check_integer(name, value, *_RANGES[name])
    if len(value) != 2:
        raise InputError(f"{name} is {shown(value)}; expected the side of a square, or (height, width)")
    height, width = (check_integer(name, v, *_RANGES[name]) for v in value)
    return height if height == width else (height, width)


def _multiple(name: str, value: Any) -> float:
    """A multiple of the channels, an int where it is whole."""
    if type(value) is not float:
        return check_integer(name, value, 1, _LARGEST_MULTIPLE)
    if not (math.isfinite(value) and 0 < value <= _LARGEST_MULTIPLE):
        raise InputError(f"{name} has {value}; expected numbers above 0, and at most {_LARGEST_MULTIPLE}")
    return int(value) if value.is_integer() else value


def shown(value: object) -> str:
    """The value for a message, shortened if it is long."""
    return reprlib.repr(value)
