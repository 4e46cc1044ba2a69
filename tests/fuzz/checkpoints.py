"""Checkpoints of torch.save, in both of its formats, damaged or hostile."""

from __future__ import annotations

import functools
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ddpm_fast as df
from tests.fuzz import damage
from tests.fuzz.places import MEGABYTES, Case, write
from tests.support.made_weights import made_state

GOLDEN = Path(__file__).parents[1] / "golden"


@functools.cache
def _state() -> dict[str, torch.Tensor]:
    """A small network of pesser's."""
    with np.load(GOLDEN / "ho2020.npz") as golden:
        shapes = json.loads(bytes(golden["pesser two levels/shapes"]))
    return made_state(shapes)


def _saved(content: Any, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _repacked(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A zip archive whose pickle was damaged, with the checksum that is right for it."""
    made, how = io.BytesIO(), ""
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            part = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                part, how = damage.bytes_of(part, rng)
            new.writestr(entry.filename, part)
    return made.getvalue(), f"of the pickle, {how}"


def _checkpoint(state: dict[str, torch.Tensor], rng: random.Random) -> tuple[bytes, str]:
    """A checkpoint with the weights, in which something is wrong, or nothing."""
    kind, zipped = rng.randrange(8), rng.random() < 0.6
    if kind < 3:
        return damage.bytes_of(_saved(state, zipped), rng)
    if kind < 5:
        return _repacked(_saved(state, True), rng)
    if kind < 7:
        changed, how = damage.weights(state, rng)
        return _saved(changed, zipped), how
    name = rng.choice(sorted(state))
    tensors = (torch.zeros(1).expand(2**40), torch.eye(3).to_sparse(), torch.ones(2, device="meta"), state[name][None])
    strange = rng.choice((*tensors, *damage.STRANGE))
    return _saved(state | {name: strange}, zipped), f"{name} is {strange!r:.40}"


def _check(loaded: df.LoadedModel) -> str:
    found = loaded.model.state_dict()
    if any(not t.isfinite().all() or not t.is_floating_point() for t in found.values()):
        return "weights that are not finite were loaded"
    with torch.inference_mode():
        x = loaded.model(torch.zeros((1, *loaded.model.config.shape)), torch.zeros(1).long())
    return "" if x.shape[1] == loaded.model.config.out_channels else "another network was loaded"


def checkpoint(rng: random.Random, place: Path) -> Case:
    data, how = _checkpoint(_state(), rng)
    path = write(rng, place, data, "model.ckpt")
    flags = "--resolution 8" if rng.random() < 0.9 else rng.choice(("--resolution", "--resolution 1e9", "--ch 3", "'"))
    return f"{how}, flags {flags}", lambda: df.load_model(path, flags=flags), _check, MEGABYTES
