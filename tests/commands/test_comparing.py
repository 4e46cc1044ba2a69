"""`python -m ddpm_fast.evaluate samplers` measures what it says, against a reference computed with the library."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from support.commands import run, save_small_model

import ddpm_fast as df
from ddpm_fast.commands.comparing import matching_images
from ddpm_fast.commands.stopping import Stopping
from ddpm_fast.data import Dataset
from ddpm_fast.errors import InputError


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model") / "small.safetensors", names=["cat", "dog", "hen"])


def compare(small, *arguments, out):
    options = ("--n", 4, "--batch-size", 3, "--seed", 2, "--out", out)
    return run("evaluate", "samplers", "--model", small, *options, *arguments)


def levels(x):
    return ((x.double() + 1) * 127.5).round().clamp(0, 255)


def test_differences_are_those_of_the_librarys_samples(small, tmp_path):
    chosen = ("--samplers", "ddpm:4,ddim:3,dpmpp_2m:5:quadratic", "--reference", "ddim:10")
    result = compare(small, *chosen, out=tmp_path / "a.json")
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "a.json").read_text())
    reference, ddpm, ddim, dpmpp = report["samplers"]
    assert report["reference"] == "ddim 10" and reference["mean_levels"] == 0
    assert [row["network_calls"] for row in report["samplers"]] == [10, 4, 3, 5]
    assert ddpm["mean_levels"] is None and "two_sample_p" in ddpm
    loaded = df.load_model(small)
    options = {"seed": 2, "labels": [0, 1, 2, 0], "batch_size": 3}
    exact = levels(df.sample(loaded.model, loaded.diffusion, 4, sampler="ddim", steps=10, **options))
    for row, sampler, steps, spacing in ((ddim, "ddim", 3, "even"), (dpmpp, "dpmpp_2m", 5, "quadratic")):
        x = df.sample(loaded.model, loaded.diffusion, 4, sampler=sampler, steps=steps, spacing=spacing, **options)
        np.testing.assert_allclose(row["mean_levels"], (levels(x) - exact).abs().mean(), atol=0.01)
    assert "classes: cat (0), dog (1), hen (2)" in result.stdout and "dpmpp_2m 5 quadratic" in result.stdout


def test_with_data_the_sets_are_tested_and_the_picture_is_drawn(small, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", images=rng.integers(0, 256, (9, 8, 8, 3), np.uint8), labels=np.arange(9) % 3)
    picture = tmp_path / "a.png"
    arguments = ("--samplers", "ddim:2", "--data", tmp_path / "real.npz", "--plot", picture)
    result = compare(small, *arguments, out=tmp_path / "a.json")
    assert result.exit_code == 0, result.stderr
    ps = [row["two_sample_p"] for row in json.loads((tmp_path / "a.json").read_text())["samplers"]]
    assert all(0 < p <= 1 for p in ps) and picture.read_bytes().startswith(b"\x89PNG")


def test_real_images_have_the_classes_of_the_samples():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    data = Dataset(images, torch.tensor([0, 0, 1, 1, 2, 2]), None, "real")
    assert matching_images(data, [2, 0, 2, 1], 4).ravel().tolist() == [4, 0, 5, 2]
    assert matching_images(data, None, 3).ravel().tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="too few images of class 2 for 3 samples"):
        matching_images(data, [2, 2, 2], 3)
    with pytest.raises(InputError, match="no labels to match"):
        matching_images(Dataset(images, None, None, "real"), [0], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samplers", "ddim"], "--samplers: 'ddim' is not a sampler with its steps"),
        (["--reference", "ddim:x"], "--reference: 'ddim:x' is not"),
        (["--samplers", "euler:5"], "there are ddpm"),
        (["--samplers", "ddim:21"], "ask for 1..20"),
        (["--samplers", "ddim:5:log"], "spacing 'log' is unknown"),
        (["--plot", "a.pdf"], ".png or .svg"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_drawn(small, tmp_path, arguments, message):
    result = compare(small, *arguments, out=tmp_path / "a.json")
    assert result.exit_code == 2 and message in result.stderr and not list(tmp_path.iterdir())


def test_stopped_the_finished_samplers_are_reported(small, tmp_path, monkeypatch):
    calls, real = [], Stopping.check

    def check(self, *_):
        calls.append(1)
        if len(calls) == 2 * 2 + 2 * 3 + 1:  # reference and first sampler, in two batches each; then the second
            os.kill(os.getpid(), signal.SIGINT)
        real(self)

    monkeypatch.setattr(Stopping, "check", check)
    result = compare(small, "--reference", "ddim:2", "--samplers", "ddim:3,ddim:4", out=tmp_path / "a.json")
    assert result.exit_code == 130 and "2 of 3 samplers were finished" in result.stdout
    rows = json.loads((tmp_path / "a.partial.json").read_text())["samplers"]
    assert [row["steps"] for row in rows] == [2, 3] and not (tmp_path / "a.json").exists()
