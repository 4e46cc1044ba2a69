"""Arrays and tensors as metrics take them, checked."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.errors import InputError

# What metrics take: numpy's arrays, or tensors on any device.
Array = Tensor | np.ndarray


def as_tensor(name: str, value: object, shape: str, ndim: int) -> Tensor:
    """The numbers as a tensor without a gradient, in their own dtype, where they are.

    Args:
        name: What they are, for the error message.
        value: An array, a tensor, or nested lists.
        shape: The expected shape in words, such as "[n, d]".
        ndim: How many dimensions that is.

    Raises:
        InputError: If it is no array of real numbers, has another number of dimensions, or some number is not finite.
    """
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"got a {type(value).__name__} without numbers for the {name}; expected an array or a tensor {shape}"
        ) from error
    if tensor.ndim != ndim:
        raise InputError(f"the shape of the {name} is {list(tensor.shape)}; expected {shape}")
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"the dtype of the {name} is {tensor.dtype}; expected real numbers")
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        wrong = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            f"{wrong} of {tensor.numel()} numbers of the {name} are not finite; expected finite ones: look at the "
            "network that computed them"
        )
    return tensor


def as_vectors(name: str, value: object, least: int, why: str) -> Tensor:
    """Vectors [n, d] as a tensor; see as_tensor.

    Args:
        name: What they are, for the error message; a plural.
        value: The vectors.
        least: The smallest n that is allowed.
        why: What needs so many, for the error message.

    Raises:
        InputError: If they are no such vectors, or fewer.
    """
    vectors = as_tensor(name, value, "[n, d]", 2)
    if vectors.shape[1] == 0:
        raise InputError(
            f"the shape of the {name} is {list(vectors.shape)}; expected at least one number for each image"
        )
    if len(vectors) < least:
        raise InputError(f"the {name} are of {len(vectors)} images; {why} needs at least {least}")
    return vectors


def check_same_length(first: str, x: Tensor, second: str, y: Tensor) -> None:
    """Raises InputError if vectors [n, d] of one set are of another length than those of the other."""
    if x.shape[1] != y.shape[1]:
        raise InputError(
            f"the {first} have {x.shape[1]} numbers for each image and the {second} {y.shape[1]}; expected features "
            "of one extractor"
        )
