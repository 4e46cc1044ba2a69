"""The commands and the Python code of the page on evaluating run, with fewer images and steps, and made-up features."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import run, save_small_model
from support.made_features import save_network

from ddpm_fast.metrics.features import read_features

PAGE = (Path(__file__).parents[2] / "docs" / "evaluating.md").read_text()
SHORTER = {"--n": "12", "-n": "12", "--steps": "2"}


def commands() -> list[list[str]]:
    """The arguments of each command that compares samples with real images, in order."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)).replace("\\\n", " ").splitlines()
    found = [shlex.split(line.partition("-m ddpm_fast.evaluate ")[2], comments=True) for line in lines]
    kinds = {"fid", "kid", "pr", "is", "all"}
    # Others, and what --sweep and --page add, have tests of their own.
    return [line for line in found if line and line[0] in kinds and not {"--sweep", "--page"} & set(line)]


def test_the_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_small_model(tmp_path / "runs" / "mine" / "model.safetensors", classes=0)
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(np.random.default_rng(0).integers(0, 256, (16, 9, 8, 3), dtype=np.uint8)):
        Image.fromarray(picture).save(tmp_path / "photos" / f"{i}.png")
    features = ["--features", str(save_network(tmp_path / "made.pt"))]
    assert len(commands()) >= 6
    for arguments in commands():
        values = zip(["", *arguments], arguments, strict=False)
        result = run("evaluate", *(SHORTER.get(option, value) for option, value in values), *features)
        assert result.exit_code == 0, f"{arguments}: {result.stdout}{result.stderr}"
    assert len(list((tmp_path / "samples").glob("*.png"))) == 12 and (tmp_path / "quality-4.json").exists()
    with np.load(tmp_path / "digits.npz") as statistics:
        assert statistics["sigma"].shape == (5, 5)


def test_the_python_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_network(tmp_path / "my_network.pt")
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (6, 3, 8, 8), dtype=np.uint8))
    names = {"fake": random.normal(0, 1, (400, 3)), "real": random.normal(0.5, 1, (400, 3)), "images": images}
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
    assert code.count('"cuda"') == 1
    exec(compile(code.replace('"cuda"', '"cpu"'), "evaluating.md", "exec"), names)
    assert names["distance"] == pytest.approx(0.75, abs=0.3) and names["value"] > names["error"] > 0
    assert 0.5 < names["precision"] <= 1 and 0.5 < names["recall"] <= 1
    assert read_features("features.npz").features.shape == (6, 5)
