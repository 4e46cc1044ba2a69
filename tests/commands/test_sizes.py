"""The option --image-size, and trainings on images that are no squares."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ddpm_fast as df
from ddpm_fast.commands import prepare
from ddpm_fast.commands.sizes import as_argument, parse_size
from ddpm_fast.data import load_dataset
from ddpm_fast.errors import InputError
from tests.support.train_command import command, meta, pictures, start, weights

LEVELS = ("--channel-mult=1,2", "--steps=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of 8x8 pixels of two classes."""
    return pictures(tmp_path_factory.mktemp("made") / "data", ["cat", "dog"])


@pytest.mark.parametrize(
    "text, size, argument",
    [
        ("64", (64, 64), 64),
        ("64x32", (64, 32), "64x32"),
        ("8X8", (8, 8), 8),
        (16, (16, 16), 16),
        (" 2x4 ", (2, 4), "2x4"),
    ],
)
def test_a_size_is_one_number_or_the_height_and_then_the_width(text, size, argument):
    assert parse_size(text) == size and as_argument(size) == as_argument(list(size)) == argument
    assert parse_size(argument) == size


@pytest.mark.parametrize("text", ["", "x", "64x", "64x32x3", "-8", "6.4", "64*32", "1" * 5000, "\u0663x4", True, None])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match=r"is no size; expected HEIGHTxWIDTH in pixels, such as 64x32"):
        parse_size(text)


def test_a_training_at_a_size_that_is_no_square(folder, tmp_path):
    out = tmp_path / "out"
    said = start(folder, out, *LEVELS, "--image-size=12x6", "--sample-every=1", "--classes").stdout
    assert "8 images 3x12x6 from data" in said
    assert meta(out)["unet"]["image_size"] == [12, 6] and meta(out)["arguments"]["image_size"] == "12x6"
    assert meta(out)["training"]["digest"] == load_dataset(folder, (12, 6), classes=True).digest
    with Image.open(out / "samples-00000001.png") as grid:
        width, height = grid.size
    assert 2 * 6 <= width <= 2 * 6 + 8 and 32 * 12 <= height <= 32 * 12 + 70  # a column for each class
    loaded = df.load_model(out)
    assert df.sample(loaded.model, loaded.diffusion, 1, steps=2, labels=0).shape == (1, 3, 12, 6)
    command(f"--out={out}", "--resume", "--steps=2", "--image-size=12x6")
    assert meta(out)["step"] == 2
    refused = command(f"--out={out}", "--resume", "--steps=3", "--image-size=6x12", status=2).stderr
    assert "--image-size 6x12 differs from the 12x6 this run was started with" in refused


def test_images_that_have_one_size_are_trained_on_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", images=rng.integers(0, 256, (6, 6, 10, 1), np.uint8))
    np.save(tmp_path / "b.npy", rng.normal(0, 1, (6, 2, 10, 4)).astype(np.float32))
    start(tmp_path / "a.npz", tmp_path / "a", *LEVELS)
    assert (
        meta(tmp_path / "a")["unet"]["image_size"] == [6, 10]
        and meta(tmp_path / "a")["arguments"]["image_size"] is None
    )
    start(tmp_path / "b.npy", tmp_path / "b", *LEVELS, "--layout=NCHW")
    assert meta(tmp_path / "b")["unet"]["image_size"] == [10, 4]
    refused = start(tmp_path / "a.npz", tmp_path / "c", "--channel-mult=1,2,2", "--steps=1", status=2).stderr
    assert "image_size 6x10 cannot be halved 2 times" in refused and "resize the images to 4x8 or 8x12" in refused
    with pytest.raises(InputError, match="4x8 or 8x12"):
        df.UNetConfig.for_images(load_dataset(tmp_path / "a.npz"), model_channels=8)


def test_another_size_of_a_resumed_run_is_kept_with_new_data(folder, tmp_path):
    start(folder, tmp_path / "out", *LEVELS, "--image-size=4x6", "--classes")
    np.savez(tmp_path / "b.npz", images=np.zeros((5, 12, 12, 3), np.uint8), labels=[0] * 5, label_names=["dog"])
    command("--data", tmp_path / "b.npz", "--out", tmp_path / "out", "--resume", "--new-data", "--steps=2")
    assert meta(tmp_path / "out")["unet"]["image_size"] == [4, 6] and meta(tmp_path / "out")["training"]["count"] == 5


def test_a_run_that_is_older_than_sizes_that_are_no_squares_goes_on(folder, tmp_path):
    """Its argument is a number, and so it is today."""
    start(folder, tmp_path / "out", *LEVELS, "--image-size=4x4")
    stored = meta(tmp_path / "out")
    assert stored["arguments"]["image_size"] == stored["unet"]["image_size"] == 4
    command(f"--out={tmp_path / 'out'}", "--resume", "--steps=2", "--image-size=4")
    assert meta(tmp_path / "out")["step"] == 2


def test_a_prepared_folder_of_that_size_trains_as_the_pictures_do(folder, tmp_path):
    options = ["--data", str(folder), "--out", str(tmp_path / "made"), "--classes"]
    done = CliRunner().invoke(prepare.app, [*options, "--image-size", "6x4"])
    assert done.exit_code == 0 and "8 images 3x6x4" in done.stdout, done.stderr
    refused = CliRunner().invoke(prepare.app, [*options, "--image-size", "4x6"])
    assert refused.exit_code == 2 and re.search("at 3x6x4, .* now .* at 3x4x6", refused.stderr)
    start(folder, tmp_path / "a", *LEVELS, "--image-size=6x4", "--classes")
    start(tmp_path / "made", tmp_path / "b", *LEVELS, "--image-size=6x4")
    assert all(torch.equal(tensor, weights(tmp_path / "b")[name]) for name, tensor in weights(tmp_path / "a").items())


def test_a_wrong_size_is_said_before_anything_is_done(folder, tmp_path):
    said = start(folder, tmp_path / "out", "--image-size=64,32", status=2)
    assert not (tmp_path / "out").exists() and said.exit_code == 2
