"""Files of features and of statistics, damaged or hostile: bytes, headers, numbers, and what they say of themselves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_fast.metrics.feature_set import FeatureSet
from ddpm_fast.metrics.features.file import read_features
from ddpm_fast.metrics.statistics_file import read_statistics
from tests.fuzz import damage, specimens
from tests.fuzz.places import MEGABYTES, Case, write

_NOTE = {"features": "a", "resizing": "b", "digest": "c", "source": "d", "n": 6}
_FEATURES = np.arange(18, dtype=np.float32).reshape(6, 3) % 7


def measured(rng: random.Random, place: Path) -> Case:
    of_features = rng.random() < 0.6
    good: dict[str, np.ndarray] = {"ddpm_fast": np.array(json.dumps(_NOTE))}
    if of_features:
        good |= {"features": _FEATURES, "logits": _FEATURES[:, :2]}
    else:
        good |= {"mu": _FEATURES.mean(0).astype(float), "sigma": np.cov(_FEATURES.T)}
    kind, suffix = rng.randrange(6), "npz"
    name = rng.choice(sorted(good))
    if kind == 0:
        data, how = damage.bytes_of(specimens.npz(good, rng.random() < 0.5), rng)
    elif kind == 1:
        header, how = damage.npy_header(good[name], rng)
        members = [(f"{n}.npy", specimens.npy(a)) for n, a in good.items() if n != name]
        data, how = specimens.archive([*members, (f"{name}.npy", header)]), f"{name}: {how}"
    elif kind == 2:
        data, how = damage.npy_header(_FEATURES, rng) if rng.random() < 0.5 else damage.bytes_of(_npy(), rng)
        suffix = "npy"
    elif kind == 3:
        head = specimens.npy(np.zeros((1, 1), np.float32))[:128].replace(b"(1, 1)", b"(9000,9000)")
        data, how = specimens.bomb(f"{name}.npy", 300, head), f"{name}: 300 MB of zeros"
    elif kind == 4:
        text, how = damage.config_text(_NOTE, rng)
        note = np.array(text.encode("utf-8", "replace").decode())
        data, how = specimens.npz({**good, "ddpm_fast": note}, True), f"the note, {how}"
    else:
        value, how = _strange(good[name], rng)
        data, how = specimens.npz({**good, name: value}, True), f"{name} is {how}"
    path = write(rng, place, data, f"a.{suffix}")
    return how, lambda: (read_features if of_features else read_statistics)(path), _check, MEGABYTES


def _npy() -> bytes:
    return specimens.npy(_FEATURES)


def _strange(good: np.ndarray, rng: random.Random) -> tuple[Any, str]:
    choices: dict[str, Any] = {
        "pickled": np.array([{"a": 1}], dtype=object),
        "empty": np.zeros((0, 3)),
        "a number": np.array(3.0),
        "text": np.array(["a", "b"]),
        "whole numbers": np.arange(6).reshape(2, 3),
        "complex": np.ones((3, 3), complex),
        "dates": np.zeros((6, 3), "datetime64[s]"),
        "of records": np.zeros(6, [("a", "f4"), ("b", "f4")]),
        "the other way round": good.T,
    }
    if good.dtype.kind == "f":
        for value in (np.nan, np.inf, 1e308):
            wrong = good.astype(np.float64)
            wrong.flat[rng.randrange(wrong.size)] = value
            choices[f"with {value}"] = wrong
        choices["negative"] = -good
    how = rng.choice(sorted(choices))
    return choices[how], how


def _check(loaded: FeatureSet) -> str:
    statistics = loaded.statistics
    if not bool(statistics.mean.isfinite().all()):
        return "a mean that is not finite was loaded"
    for rows in (loaded.features, loaded.logits):
        if rows is not None and (len(rows) != loaded.n or not bool(rows.isfinite().all())):
            return "other features were loaded"
    if not (loaded.n < 2 and loaded.features is not None) and not bool(statistics.covariance.isfinite().all()):
        return "a covariance that is not finite was loaded"
    texts = (loaded.kind.features, loaded.kind.resizing, loaded.kind.digest, loaded.source)
    return "" if all(text.isprintable() for text in texts) else "a text that a terminal obeys was loaded"
