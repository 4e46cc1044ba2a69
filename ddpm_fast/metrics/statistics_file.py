"""Files of reference statistics, .npz: ours, and those of ADM's evaluator, EDM's fid.py and lucidrains.

| code | arrays |
|---|---|
| ADM (guided-diffusion) | mu, sigma, mu_s, sigma_s (of spatial features, not read here), arr_0: images [n, H, W, 3] |
| EDM, pytorch-fid | mu, sigma |
| lucidrains | m2, s2 |
| ours | mu, sigma, and in `ddpm_fast` a text in JSON: features, resizing, digest, source, n |

Files of other codes say neither what their features are nor how many images they are of.
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
from ddpm_fast.metrics import note
from ddpm_fast.metrics.feature_set import FeatureSet
from ddpm_fast.metrics.statistics import LARGEST, Statistics

FORMS = ("edm", "adm")
_MOMENTS = (("mu", "sigma"), ("m2", "s2"), ("ours_mu", "ours_sigma"))


def read_statistics(path: str | os.PathLike) -> FeatureSet:
    """Read a file of statistics. Nothing in it is executed.

    Args:
        path: An .npz of one of the codes above.

    Returns:
        The statistics, without features. Of another code's file, the kind's fields are empty, and n is 0 for "not
        known".

    Raises:
        InputError: If it cannot be read, is no such file, or holds what no statistics can be.
    """
    path = Path(path)
    wanted = {name: _check_moment for pair in _MOMENTS for name in pair} | {note.KEY: note.check_note}
    arrays = read_arrays(path, wanted, "statistics")
    for mu, sigma in _MOMENTS:
        if mu in arrays and sigma in arrays:
            break
    else:
        raise InputError(
            f"{path} has no statistics, only {sorted(arrays) or 'other arrays'}; expected mu and sigma (as ADM's and "
            "EDM's files have), or m2 and s2. Of images, give the file itself as the reference data"
        )
    said = note.read_note(arrays, path)
    try:
        statistics = Statistics.from_moments(said.n, arrays[mu], arrays[sigma])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return FeatureSet(said.kind, said.source or printable(path.name), statistics)


def write_statistics(
    path: str | os.PathLike, feature_set: FeatureSet, form: str = "edm", images: Tensor | None = None
) -> None:
    """Write a file of statistics, whole or not at all.

    Args:
        path: The file, an .npz.
        feature_set: The statistics and what they are of.
        form: "edm": mu and sigma, which EDM's fid.py and pytorch-fid read as well. "adm": what ADM's evaluator reads,
            which is images; it then computes its own statistics. (Where a file has mu, it asks for spatial features
            too, which no other code has.) Either is read again by `read_statistics`.
        images: uint8 [n, C, H, W], grey or RGB; for "adm" alone.

    Raises:
        InputError: If the form is unknown, images are missing or not such, or the path cannot be written.
    """
    if form not in FORMS:
        raise InputError(f"form is {form!r:.99}; expected one of {', '.join(FORMS)}")
    if (form == "adm") != (images is not None):
        need = "needs the images" if images is None else "holds no images"
        raise InputError(f"a file of the form {form} {need}; {'give' if images is None else 'leave out'} `images`")
    statistics = feature_set.statistics
    mu, sigma = _MOMENTS[-1] if form == "adm" else _MOMENTS[0]
    arrays = {mu: statistics.mean.numpy(), sigma: statistics.covariance.numpy(), note.KEY: note.note_of(feature_set)}
    if images is not None:
        arrays["arr_0"] = _as_adm_has_them(images)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _as_adm_has_them(images: Tensor) -> np.ndarray:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(f"images are {images.dtype} {list(images.shape)}; expected uint8 [n, 1 or 3, H, W]")
    n, _, height, width = images.shape
    return images.expand(n, 3, height, width).permute(0, 2, 3, 1).contiguous().numpy()


def _check_moment(header: Header) -> str | None:
    """What is wrong with a mean or a covariance, by its header."""
    if header.dtype.kind != "f":
        return "expected floats"
    square = len(header.shape) == 2 and header.shape[0] == header.shape[1]
    if not (len(header.shape) == 1 or square) or not 1 <= header.shape[0] <= LARGEST:
        return f"expected [d] or [d, d] with d in 1..{LARGEST}"
    return None
