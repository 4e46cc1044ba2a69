"""Folders of diffusers, damaged or hostile: JSON edited, weights changed, links and devices in place of files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.load import load_model
from tests.fuzz import damage
from tests.fuzz.places import MEGABYTES, Case, special
from tests.support.diffusers_folders import HO_2020, WEIGHTS, state_of, write


def diffusers(rng: random.Random, place: Path) -> Case:
    folder = write(place / "pipeline")
    how = _damaged(rng, folder)

    def check(loaded: LoadedModel) -> str:
        model = loaded.model
        if not all(t.isfinite().all() for t in model.state_dict().values()):
            return "weights that are not finite were loaded"
        channels, height, width = model.config.shape
        if height * width > 4096:
            return ""
        labels = torch.zeros(1).long() if model.config.num_classes else None
        beside = model.config.condition_channels
        condition = torch.zeros(1, beside, height, width) if beside else None
        with torch.inference_mode():
            x = model(torch.zeros(1, channels, height, width), torch.zeros(1).long(), labels, condition=condition)
        return "" if x.shape == (1, model.config.out_channels, height, width) else "another network was loaded"

    return how, lambda: load_model(folder), check, MEGABYTES


def _damaged(rng: random.Random, folder: Path) -> str:
    """Damage one file of the folder. Returns what was done."""
    kind, weights = rng.randrange(10), folder / "unet" / f"{WEIGHTS}.safetensors"
    if kind < 1:
        return "nothing"
    if kind < 6:
        path = rng.choice(sorted(folder.rglob("*.json")))
        text, how = damage.config_text(json.loads(path.read_text()), rng)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return f"{path.name}, {how}"
    if kind < 7:
        path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        path.unlink()
        special(rng, path)
        return f"{path.name} is something else"
    if kind < 8:
        data, how = damage.bytes_of(weights.read_bytes(), rng)
        weights.write_bytes(data)
        return how
    changed, how = damage.weights(state_of(HO_2020), rng)
    if rng.random() < 0.5:
        weights.write_bytes(damage.safetensors(changed, {"format": "pt"}, rng))
        return f"{how}; the header was edited"
    weights.unlink()
    torch.save(changed, weights.with_suffix(".bin"))
    return f"{how}, as .bin"
