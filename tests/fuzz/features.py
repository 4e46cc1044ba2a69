"""Files of statistics and of features, damaged or hostile."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_fast.metrics.feature_set import FeatureSet
from ddpm_fast.metrics.features.file import read_features
from ddpm_fast.metrics.statistics_file import read_statistics
from tests.fuzz import damage, material
from tests.fuzz.places import MEGABYTES, Case, write

_D = 5
_NOTE = {"features": "f", "resizing": "r", "digest": "d", "source": "s", "n": 7}
_ARRAYS = {
    "statistics": {"mu": np.arange(_D) / 4, "sigma": np.diag(np.arange(_D) + 1.0)},
    "features": {"features": np.eye(7, _D, dtype=np.float32), "logits": np.eye(7, 3, dtype=np.float32)},
}


def moments(rng: random.Random, place: Path) -> Case:
    holds = rng.choice(sorted(_ARRAYS))
    good = _ARRAYS[holds] | {"ddpm_fast": np.array(json.dumps(_NOTE))}
    kind, name = rng.randrange(6), rng.choice(sorted(good))
    if kind == 0:
        data, how = damage.bytes_of(material.npz(good, rng.random() < 0.5), rng)
    elif kind == 1:
        header, how = damage.npy_header(good[name], rng)
        members = [(f"{n}.npy", material.npy(a)) for n, a in good.items() if n != name]
        data, how = material.archive([*members, (f"{name}.npy", header)]), f"{name}: {how}"
    elif kind == 2:
        head = material.npy(np.zeros((1, 1), np.float32))[:128].replace(b"(1, 1)", b"(22000,100)")
        data, how = material.bomb(f"{name}.npy", 9, head), "9 MB of zeros"
    elif kind == 3:
        edited = json.dumps(_NOTE | {rng.choice(sorted(_NOTE)): rng.choice(damage.STRANGE)})
        data, how = material.npz({**good, "ddpm_fast": np.array(edited)}, True), f"it says {edited:.99}"
    else:
        value = _strange(rng, good[name])
        data, how = material.npz({**good, name: value}, True), f"{name} is {value.dtype} {value.shape}"
    path = write(rng, place, data, "a.npz")
    read = read_statistics if holds == "statistics" else read_features
    return f"{holds}, {how}", lambda: read(path), _check, MEGABYTES


def _strange(rng: random.Random, good: np.ndarray) -> np.ndarray:
    if good.dtype.kind == "U":
        return rng.choice((np.array(str(good)[:-3]), np.array([str(good)]), np.array("[" * 9999), np.array(3)))
    wrong: list[Any] = [np.nan, np.inf, 1e308, -1e300]
    flawed = good.astype(np.float64)
    flawed.flat[rng.randrange(flawed.size)] = rng.choice(wrong)
    changed = (flawed, good[:0], good[:1], good[..., None], good.astype(np.int64), good.astype(complex), good > 0)
    return rng.choice((*changed, good.astype(">f4"), good.astype(np.longdouble), np.array(1.0), np.array([None, 1])))


def _check(loaded: FeatureSet) -> str:
    """What is wrong with a set."""
    statistics, d = loaded.statistics, len(loaded.statistics.mean)
    if statistics.covariance.shape != (d, d) or not bool(torch.isfinite(statistics.mean).all()):
        return f"a mean of {d} numbers, a covariance of {list(statistics.covariance.shape)}"
    if loaded.features is not None and loaded.features.shape != (loaded.n, d):
        return f"features {list(loaded.features.shape)} of {loaded.n} images"
    return ""
