"""The option --image-size, and trainings on images that are no squares."""

import json
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
from ddpm_fast.pictures.images import to_uint8
from tests.support.commands import run, save_small_model
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
    found = weights(tmp_path / "b")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(tmp_path / "a").items())


def test_a_wrong_size_is_said_before_anything_is_done(folder, tmp_path):
    said = start(folder, tmp_path / "out", "--image-size=64,32", status=2)
    assert not (tmp_path / "out").exists() and said.exit_code == 2


# ---- sampling ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of 8x8 images and two levels."""
    return save_small_model(tmp_path_factory.mktemp("model") / "m.safetensors", classes=0)


def test_images_of_another_size_are_the_librarys(model, tmp_path):
    options = ("--model", model, "--image-size", "12x6", "--n", 3, "--steps", 2, "--batch-size", 2)
    done = run("sample", *options, "--out", tmp_path / "s.npz", "--gif", tmp_path / "s.gif")
    assert done.exit_code == 0, done.stderr
    assert "made for images of 8x8; those of 12x6 may" in done.stdout and "3 images of 3x12x6 in" in done.stdout
    loaded = df.load_model(model)
    expected = to_uint8(df.sample(loaded.model, loaded.diffusion, 3, shape=(3, 12, 6), steps=2))
    assert np.array_equal(np.load(tmp_path / "s.npz")["images"], expected)
    with Image.open(tmp_path / "s.gif") as frames:
        assert frames.height > frames.width / 2 and frames.n_frames > 1  # two columns and rows
    assert run("sample", *options, "--out", tmp_path / "grid.png").exit_code == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert 1.6 < grid.height / grid.width < 2.1


@pytest.mark.parametrize("format", ["png", "npz"])
def test_a_folder_keeps_the_size_and_goes_on_with_it(model, tmp_path, format):
    out = tmp_path / "samples"
    options = ("--model", model, "--steps", 2, "--out", out, "--format", format, "--batch-size", 2)
    assert run("sample", *options, "--n", 2, "--image-size", "4x6").exit_code == 0
    assert json.loads((out / "samples.json").read_text())["image_size"] == "4x6"
    refused = run("sample", *options, "--n", 4)
    assert refused.exit_code == 2 and 'image_size "4x6" instead of null' in refused.stderr
    done = run("sample", *options, "--n", 4, "--image-size", "4x6")
    assert "2 of 4 images are in" in done.stdout
    (out / "samples.json").unlink()
    found = load_dataset(out).images
    loaded = df.load_model(model)
    expected = to_uint8(df.sample(loaded.model, loaded.diffusion, 4, shape=(3, 4, 6), steps=2, batch_size=2))
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), expected)


def test_the_models_own_size_is_not_recorded(model, tmp_path):
    options = ("--model", model, "--steps", 1, "--n", 1, "--out", tmp_path / "samples")
    done = run("sample", *options, "--image-size", "8x8")
    assert done.exit_code == 0 and "less well" not in done.stdout
    assert "image_size" not in json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert "1 of 1 images are in" in run("sample", *options).stdout


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Two pictures of a height of 6 and a width of 12, and a mask that keeps the left half."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 12, 3), np.uint8)
    mask = np.zeros((6, 12), np.uint8)
    mask[:, :6] = 255
    for name, array in (("a", pixels[0]), ("b", pixels[1]), ("mask", mask), ("square", pixels[0, :6, :6])):
        Image.fromarray(array).save(f"{name}.png")
    Image.fromarray(mask.T).save("turned.png")
    np.savez("both.npz", images=pixels)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(mask == 255)


EDITS = {
    "image to image": (
        ("--init-image", "both.npz", "--n", 3),
        lambda m, d, x, mask, o: df.image_to_image(m, d, x[[0, 1, 0]], 0.5, **o),
    ),
    "inpainting": (
        ("--init-image", "a.png", "--mask", "mask.png", "--resamplings", 2, "--jump-length", 2, "--n", 2),
        lambda m, d, x, mask, o: df.inpaint(m, d, x[[0, 0]], mask, resamplings=2, jump_length=2, **o),
    ),
    "interpolation": (
        ("--init-image", "a.png", "--interpolate-with", "b.png", "--n", 4),
        lambda m, d, x, mask, o: df.interpolate(m, d, x[0], x[1], 4, **o),
    ),
    "round trip": (
        ("--init-image", "both.npz", "--round-trip"),
        lambda m, d, x, mask, o: df.decode(m, d, df.encode(m, d, x, o["steps"]), o["steps"]),
    ),
}


@pytest.mark.parametrize("edit", list(EDITS))
def test_a_picture_is_edited_at_its_own_size(model, edited, edit):
    arguments, expected = EDITS[edit]
    done = run("sample", "--model", model, *arguments, "--steps", 4, "--out", "s.npz")
    assert done.exit_code == 0 and "x6x12 in" in done.stdout, done.stderr
    loaded = df.load_model(model)
    x = expected(loaded.model, loaded.diffusion, *edited, {"steps": 4})
    assert np.array_equal(np.load("s.npz")["images"], to_uint8(x))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--image-size", "9x8"), "--image-size is 9x8, but this UNet halves .* 9 is not divisible by 2: give 10"),
        (("--image-size", "0"), "--image-size is 0; expected an integer"),
        (("--image-size", "8x"), "'8x' is no size; expected HEIGHTxWIDTH"),
        (("--init-image", "a.png", "--image-size", "8"), "an edit has its picture's size"),
        (
            ("--init-image", "a.png", "--mask", "turned.png"),
            "turned.png has a height of 12 and a width of 6 pixels, and --init-image 6 and 12: crop or scale",
        ),
        (
            ("--init-image", "a.png", "--interpolate-with", "square.png"),
            "square.png has a height of 6 and a width",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(model, edited, arguments, words):
    done = run("sample", "--model", model, *arguments, "--out", "s.npz")
    assert done.exit_code == 2 and re.search(words, done.stderr), done.stderr


def test_floats_of_another_size_are_edited(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.normal(0, 1, (6, 1, 8, 8)).astype(np.float32))
    start(tmp_path / "a.npy", tmp_path / "run", *LEVELS)
    np.save(tmp_path / "b.npy", rng.normal(0, 1, (1, 1, 4, 10)).astype(np.float32))
    options = ("--model", tmp_path / "run", "--steps", 4, "--out", tmp_path / "s.npz", "--init-image")
    done = run("sample", *options, tmp_path / "b.npy", "--round-trip")
    assert done.exit_code == 0, done.stderr
    assert np.load(tmp_path / "s.npz")["images"].shape == (1, 1, 4, 10)
    np.save(tmp_path / "c.npy", np.zeros((1, 3, 4, 10), np.float32))
    refused = run("sample", *options, tmp_path / "c.npy")
    assert refused.exit_code == 2 and "images of 3x4x10; expected 1 channels" in refused.stderr
