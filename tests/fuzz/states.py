"""Models and training states, damaged or hostile: as bytes, or with a checksum that is right for what they hold."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ddpm_fast as df
from ddpm_fast.files import checkpoint, tensorfile
from tests.fuzz import damage, specimens
from tests.fuzz.places import MEGABYTES, Case, write


class State(NamedTuple):
    """A file that may be damaged, what was done to it, and what it holds if it is readable."""

    data: bytes
    how: str
    tensors: dict[str, torch.Tensor]
    payload: Any  # None: not compared


def _state_file(rng: random.Random, form: str, good: bytes, held: tuple[dict, dict]) -> State:
    tensors, payload = held
    kind = rng.randrange(10)
    if kind < 1:
        return State(good, "nothing", tensors, payload)
    if kind < 3:
        data, how = damage.bytes_of(good, rng)
        return State(data, how, tensors, payload)
    if kind < 4:
        metadata = {"format": form, "version": "1", "config" if form == tensorfile.MODEL else "meta": "{}"}
        return State(damage.safetensors(tensors, metadata, rng), "the header was edited", tensors, payload)
    if kind < 6:
        changed, how = damage.weights(tensors, rng)
        return State(damage.signed(form, changed, json.dumps(payload), rng), how, changed, payload)
    text, how = damage.config_text(payload, rng)
    version = "1" if rng.random() < 0.95 else rng.choice(("0", "2", "-1", "", "9" * 30, "1.0"))
    return State(damage.signed(form, tensors, text, rng, version), how, tensors, None)


def model(rng: random.Random, place: Path) -> Case:
    state = _state_file(rng, tensorfile.MODEL, specimens.states().model, specimens.model_state())
    path = write(rng, place, state.data, "model.safetensors")

    def check(loaded: df.LoadedModel) -> str:
        found = loaded.model.state_dict()
        if any(not t.isfinite().all() or not t.is_floating_point() for t in found.values()):
            return "weights that are not finite were loaded"
        if any(not torch.equal(found[n].float(), t.float()) for n, t in state.tensors.items() if n in found):
            return "another value was loaded"
        names = loaded.label_names
        if names is not None and (
            not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(names) != 2
        ):
            return "label_names that are none were loaded"
        made = loaded.model.config
        shape = (1, *made.shape)
        with torch.inference_mode():
            label = torch.zeros(1).long() if made.num_classes else None
            x = loaded.model(torch.zeros(shape), torch.zeros(1).long(), label)
        return "" if x.shape == (1, made.out_channels, *shape[2:]) else "another network was loaded"

    return state.how, lambda: df.load_model(path), check, MEGABYTES


def training(rng: random.Random, place: Path) -> Case:
    state = _state_file(rng, tensorfile.TRAINING, specimens.states().training, specimens.training_state())
    path = write(rng, place, state.data, "step-00000001.safetensors")
    if rng.random() < 0.5:

        def check(loaded: tuple[dict, dict]) -> str:
            same = loaded[0].keys() == state.tensors.keys() and all(
                loaded[0][n].dtype == t.dtype and bool(((loaded[0][n] == t) | (t != t)).all())
                for n, t in state.tensors.items()
            )
            return "" if same and state.payload in (None, loaded[1]) else "another value was loaded"

        return f"read_training, {state.how}", lambda: checkpoint.read_training(path), check, MEGABYTES
    made = specimens.trainer()

    def look(_: object) -> str:
        bad = [n for n, p in made.model.named_parameters() if p.dtype != torch.float32]
        if bad or type(made.step) is not int or made.step < 0:
            return "a state that is none was loaded"
        pairs = [(p, state.tensors[f"model.{n}"]) for n, p in made.model.named_parameters()]
        same = all(bool(((a == b) | (b != b)).all()) for a, b in pairs)
        return "" if same else "another value was loaded"

    return f"Trainer.load, {state.how}", lambda: made.load(path), look, MEGABYTES
