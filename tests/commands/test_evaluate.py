"""`python -m ddpm_fast.evaluate nll` reports the numbers of likelihood.bits_per_dim and refuses bad input early."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.networks import random_unet
from typer.testing import CliRunner

from ddpm_fast.commands.evaluate import app
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.files import checkpoint
from ddpm_fast.schedule import Schedule


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small conditional model of random weights, and images with and without labels for it."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = random_unet(
        0.1, image_size=8, in_channels=1, model_channels=8, channel_mult=(1,), num_classes=3, norm_groups=4
    )
    diffusion = GaussianDiffusion(Schedule.cosine(20), "v", "fixed_small")
    config = {"unet": model.config.to_dict(), "diffusion": diffusion.to_dict()}
    checkpoint.save_model(folder / "model.safetensors", model.state_dict(), config)
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "labelled.npz", images=images, labels=np.array([0, 1, 2, 0, 1, 2, 0]))
    np.savez(folder / "plain.npz", images=images)
    np.savez(folder / "large.npz", images=np.zeros((3, 9, 9, 1), np.uint8))
    np.savez(folder / "many.npz", images=images, labels=np.arange(7))
    for i, image in enumerate(images[:4, ..., 0]):
        (folder / "tree" / "ABC"[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "tree" / "ABC"[i % 3] / f"{i}.png")
    return folder


def run(files, *arguments, data="labelled.npz", out="nll.json"):
    return CliRunner().invoke(
        app,
        ["nll", f"--model={files}/model.safetensors", f"--data={files / data}", f"--out={files / out}"]
        + [str(argument) for argument in arguments],
    )


@pytest.mark.parametrize("how", [["--full"], ["--steps", "5"]], ids=["full", "estimate"])
@pytest.mark.parametrize("data", ["labelled.npz", "plain.npz"])
def test_the_numbers_are_the_librarys(files, data, how):
    result = run(files, *how, "--batch-size", 3, "--seed", 9, "--decoder", "exact", data=data)
    assert result.exit_code == 0, result.output
    report = json.loads((files / "nll.json").read_text())
    loaded = checkpoint.load_model(files / "model.safetensors")
    with np.load(files / data) as arrays:
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
    expected = loaded.diffusion.bits_per_dim(
        loaded.model, images, labels=labels, seed=9, decoder="exact", steps=None if how == ["--full"] else 5
    )
    assert report["images"] == 7 and report["decoder"] == "exact"
    assert report["estimate"] is (how != ["--full"]) and len(report["timesteps"]) == (20 if how == ["--full"] else 5)
    np.testing.assert_allclose(report["total_bits_per_dim"], expected.total.mean(), rtol=1e-5)
    np.testing.assert_allclose(report["total_stderr"], expected.total.std() / 7**0.5, rtol=1e-4)
    np.testing.assert_allclose(report["terms_bits_per_dim"], expected.terms.mean(0), rtol=1e-5)
    np.testing.assert_allclose(report["mse_x0"], expected.mse_x0.mean(0), rtol=1e-5)
    np.testing.assert_allclose(report["mse_eps"], expected.mse_eps.mean(0), rtol=1e-5)
    np.testing.assert_allclose(report["timesteps"], expected.timesteps.double().mean(0))
    parts = report["prior_bits_per_dim"] + np.dot(report["counts"], report["terms_bits_per_dim"])
    np.testing.assert_allclose(parts, report["total_bits_per_dim"], rtol=1e-6)
    assert ("null class is used" in result.output) is (data == "plain.npz")


def test_an_estimate_says_that_it_is_one(files):
    assert "estimated from 5 of 20 terms" in " ".join(run(files, "--steps", 5).output.split())
    assert "all 20 terms" in " ".join(run(files, "--full").output.split())


def test_sub_folders_are_the_classes(files):
    result = run(files, "--full", data="tree")
    assert result.exit_code == 0 and "null class" not in result.output
    with_labels = json.loads((files / "nll.json").read_text())["total_bits_per_dim"]
    np.savez(
        files / "same.npz",
        images=np.stack([np.asarray(Image.open(path)) for path in sorted((files / "tree").rglob("*.png"))])[..., None],
        labels=np.array([0, 0, 1, 2]),
    )
    run(files, "--full", data="same.npz")
    assert with_labels == json.loads((files / "nll.json").read_text())["total_bits_per_dim"]


def test_the_first_n_images(files):
    run(files, "--n", 3, "--full")
    assert json.loads((files / "nll.json").read_text())["images"] == 3


def test_a_folder_without_sub_folders_has_no_labels(files):
    with np.load(files / "plain.npz") as arrays:
        for i, image in enumerate(arrays["images"][..., 0]):
            (files / "flat").mkdir(exist_ok=True)
            Image.fromarray(image).save(files / "flat" / f"{i}.png")
    result = run(files, "--full", data="flat")
    assert result.exit_code == 0 and "null class is used" in result.output
    flat = json.loads((files / "nll.json").read_text())["total_bits_per_dim"]
    run(files, "--full", data="plain.npz")
    assert flat == json.loads((files / "nll.json").read_text())["total_bits_per_dim"]


def test_numbers_do_not_go_into_a_picture(files):
    result = run(files, out="numbers.png")
    assert result.exit_code == 2 and "expected a name ending in .json" in " ".join(result.stderr.split())


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot(files, suffix):
    picture = files / f"bound.{suffix}"
    result = run(files, "--steps", 5, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        (["--steps", 21], "labelled.npz", "--steps is 21; expected 2..20"),
        (["--steps", 1], "labelled.npz", "--steps is 1; expected 2..20"),
        (["--steps", 5, "--full"], "labelled.npz", "--full takes all 20 terms and --steps 5 of them"),
        (["--decoder", "tanh"], "labelled.npz", "choose one of paper, exact"),
        (["--n", 1], "labelled.npz", "a standard error needs at least 2"),
        (["--batch-size", 0], "labelled.npz", "--batch-size is 0"),
        (["--plot", "terms.pdf"], "labelled.npz", ".png or .svg"),
        ([], "large.npz", "images of 1x9x9, but the model was trained on 1x8x8: a likelihood is one of exact pixels"),
        ([], "many.npz", "7 classes and the model 3"),
        ([], "missing.npz", "there is no file or folder"),
    ],
)
def test_refusals_leave_no_file(files, arguments, data, message):
    result = run(files, *arguments, data=data, out="none.json")
    assert result.exit_code == 2
    assert message in " ".join((result.output + result.stderr).split())
    assert not (files / "none.json").exists()
