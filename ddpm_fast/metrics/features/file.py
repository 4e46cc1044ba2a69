"""Files of features: what the user computed elsewhere, and what we keep so as not to compute it again.

An .npy is an array of features [n, d]. An .npz has it as `features`, and may have `logits` [n, classes]; one of ours
says in the array `ddpm_fast` what the features are. Nothing in a file is executed, and its headers are checked before
anything is allocated.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.data.arrayfile import Header, read_arrays
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.atomic import atomic_path
from ddpm_fast.files.tensorfile import check_is_file
from ddpm_fast.metrics import note
from ddpm_fast.metrics.feature_set import FeatureSet, Kind
from ddpm_fast.metrics.statistics import LARGEST, Statistics

UNKNOWN = Kind("features of a file", "not known")  # of a file that does not say
_FLOATS = (2, 4, 8)  # bytes


def read_features(path: str | os.PathLike) -> FeatureSet:
    """The features of a file.

    Args:
        path: An .npy or .npz, as said above, of float16, float32 or float64.

    Returns:
        Features and logits in fp32. What the features are is known of a file of ours; of another it is UNKNOWN.

    Raises:
        InputError: The file is missing, damaged or something else, or a number is not finite.
    """
    path = Path(path)
    check_is_file(path, "a file of features (.npy or .npz)")
    wanted = {"features": _check_vectors, "logits": _check_vectors, note.KEY: note.check_note}
    arrays = read_arrays(path, wanted, "features", single="features")
    if "features" not in arrays:
        raise InputError(f"{path} has no array called 'features'; expected np.savez(path, features=...), [n, d]")
    features, logits = (_checked(arrays.get(name), name, path) for name in ("features", "logits"))
    assert features is not None
    if logits is not None and len(logits) != len(features):
        raise InputError(f"{path} has {len(features)} features and {len(logits)} logits; expected as many of both")
    said = note.read_note(arrays, path)
    kind = said.kind if said.kind.features else UNKNOWN
    return FeatureSet(kind, said.source or printable(path.name), Statistics.of(features), features, logits)


def write_features(path: str | os.PathLike, feature_set: FeatureSet) -> None:
    """Write the features of a set, and what they are, as an .npz that is whole or not there.

    Raises:
        InputError: The set has statistics alone, or the path cannot be written.
    """
    if feature_set.features is None:
        raise InputError("only the statistics of the set are known; write them with write_statistics")
    arrays = {"features": feature_set.features.numpy(), note.KEY: note.note_of(feature_set)}
    if feature_set.logits is not None:
        arrays["logits"] = feature_set.logits.numpy()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _check_vectors(header: Header) -> str | None:
    """What is wrong with features or logits, by their header."""
    if header.dtype.kind != "f" or header.dtype.itemsize not in _FLOATS:
        return "expected float16, float32 or float64"
    if len(header.shape) != 2 or header.shape[0] < 1 or not 1 <= header.shape[1] <= LARGEST:
        return f"expected [n, d] with n of at least 1 and d in 1..{LARGEST}"
    return None


def _checked(array: np.ndarray | None, name: str, path: Path) -> Tensor | None:
    """An array as a tensor in fp32."""
    if array is None:
        return None
    with np.errstate(over="ignore"):  # what fp32 cannot hold becomes infinite, and is then refused
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not bool(torch.isfinite(tensor).all()):
        first = int((~torch.isfinite(tensor).all(1)).nonzero()[0])
        raise InputError(f"{name} of {path} are not all finite in fp32, first in row {first} (counted from 0)")
    return tensor
