"""The Python code on the pages about sampling and about extending the package runs."""

import re

import numpy as np
import torch

from ddpm_fast import objective
from ddpm_fast.data import load_dataset
from ddpm_fast.files import checkpoint
from ddpm_fast.values import ValueRange
from tests.support.commands import save_small_model
from tests.support.pages import DOCS, blocks


def test_the_objective_guide_runs(monkeypatch):
    # Copies, so that what the guide registers is gone afterwards.
    for table in ("PREDICTIONS", "WEIGHTINGS"):
        monkeypatch.setattr(objective, table, dict(getattr(objective, table)))
    parts = blocks((DOCS / "guides" / "add-an-objective.md").read_text(), "python")
    assert len(parts) == 3
    exec(compile("\n".join(parts), "add-an-objective.md", "exec"), {})


def shortened(number: re.Match) -> str:
    return {"64": "2", "100": "6"}.get(number[0], "steps=6")


def test_the_examples_of_the_page_on_sampling_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "many").mkdir()
    for first in (0, 2):
        np.savez(tmp_path / "many" / f"{first:06d}.npz", images=np.full((2, 4, 4, 1), first, np.uint8))
    (tmp_path / "runs" / "temperature").mkdir(parents=True)
    kelvin = ValueRange((250.0,), (320.0,), "NHW")
    path = tmp_path / "runs" / "temperature" / "model.safetensors"
    state, config = checkpoint.read_model(save_small_model(path, classes=0, channels=1))
    checkpoint.save_model(path, state, config | {"value_range": kelvin.to_dict()})
    code = "\n".join(blocks((DOCS / "sampling.md").read_text(), "python"))
    few, numbers = re.subn(r"steps=\d+|(?<=, )100(?=, labels)|(?<=, )64(?=, )", shortened, code)
    assert numbers == 13
    digits = load_dataset("mnist5k").images[:2].float() / 127.5 - 1
    names = {"images": digits, "a": digits[0], "b": digits[1], "mask": torch.eye(28), "labels": [1, 2]}
    exec(compile(few, "sampling.md", "exec"), names)
    assert names["images"].shape == digits.shape  # encoded and decoded
    assert np.load("for-adm.npz")["arr_0"][:, 0, 0, 0].tolist() == [0, 0, 2, 2]
    assert 250 <= names["kelvin"].min() <= names["kelvin"].max() <= 320 and names["warmer"].shape == (16, 1, 8, 8)
    assert len(names["frames"]) == 6 and names["frames"][0].shape == (8, 1, 28, 28)


def test_the_ops_in_a_loop_of_ones_own():
    names = {}
    exec(compile("\n".join(blocks((DOCS / "kernels.md").read_text(), "python")), "kernels.md", "exec"), names)
    assert names["step"] == 2 and names["loss"].isfinite()
