"""What is evaluated fits the model: classes by name, sizes as in training; and what the numbers are of is said."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image
from support.commands import run, save_small_model

from ddpm_fast.commands.stopping import Stopping
from ddpm_fast.data import load_dataset, split_held_out

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def folder(path, classes, size=(8, 8)):
    """A folder with one sub-folder for each name, of two images in the colour that the name stands for."""
    for name, colour in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", size, colour).save(path / name / f"{i}.png")
    return path


def model(path, names=("1", "2", "3"), **training):
    return save_small_model(path / "model.safetensors", names=names and list(names), training=training)


def nll(model, data, *arguments, out):
    return run("evaluate", "nll", "--model", model, "--data", data, "--steps", 3, "--out", out, *arguments)


def total(path):
    return json.loads(path.read_text())["total_bits_per_dim"]


def test_classes_are_matched_by_name(tmp_path):
    of = model(tmp_path)
    straight = folder(tmp_path / "straight", {"1": (255, 0, 0), "2": (0, 255, 0), "3": (0, 0, 255)})
    assert nll(of, straight, out=tmp_path / "a.json").exit_code == 0
    # The same images with names that sort otherwise; class 3 is missing, and class 2 is the first folder.
    fewer = folder(tmp_path / "fewer", {"2": (0, 255, 0)})
    alone = nll(of, fewer, out=tmp_path / "b.json")
    assert alone.exit_code == 0, alone.stderr
    np.savez(tmp_path / "second.npz", images=np.full((2, 8, 8, 3), (0, 255, 0), np.uint8), labels=np.array([1, 1]))
    assert nll(of, tmp_path / "second.npz", out=tmp_path / "c.json").exit_code == 0
    assert total(tmp_path / "b.json") == total(tmp_path / "c.json")


def test_classes_that_the_model_lacks_are_refused_by_name(tmp_path):
    data = folder(tmp_path / "data", {"2": (255, 0, 0), "3": (0, 255, 0), "4": (0, 0, 255)})
    result = nll(model(tmp_path), data, out=tmp_path / "a.json")
    assert result.exit_code == 2 and "has images of the classes 4, which the model does not have" in result.stderr
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("named", ["model", "data"])
def test_classes_without_names_are_matched_by_number_and_that_is_said(tmp_path, named):
    if named == "data":
        of, data = model(tmp_path, names=None), folder(tmp_path / "data", COLOURS)
    else:
        of, data = model(tmp_path, names=["red", "green", "blue"]), tmp_path / "data.npz"
        np.savez(data, images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(3))
    result = nll(of, data, out=tmp_path / "a.json")
    assert result.exit_code == 0 and "have no names, so they are matched by number" in result.stdout
    assert "blue (0)" in result.stdout if named == "data" else "red (0)" in result.stdout


def test_pictures_of_other_sizes_and_of_grey_are_made_the_models_as_in_training(tmp_path):
    of = model(tmp_path, names=None)
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(8, 8, 3), (16, 24, 3), (31, 9, 3)]):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / "data" / f"{i}.png")
    Image.fromarray(rng.integers(0, 256, (12, 12), np.uint8)).save(tmp_path / "data" / "grey.png")
    result = nll(of, tmp_path / "data", out=tmp_path / "a.json")
    assert result.exit_code == 0, result.stderr
    assert "not 3x8x8 are scaled, cut and converted to it, as in training" in result.stdout
    as_in_training = load_dataset(tmp_path / "data", image_size=8, channels=3)
    np.savez(tmp_path / "b.npz", images=as_in_training.images.permute(0, 2, 3, 1).numpy())
    nll(of, tmp_path / "b.npz", out=tmp_path / "b.json")
    assert total(tmp_path / "a.json") == total(tmp_path / "b.json")


def test_a_likelihood_of_the_training_set_is_called_one(tmp_path):
    data = tmp_path / "data.npz"
    np.savez(data, images=np.zeros((3, 8, 8, 3), np.uint8))
    digest = load_dataset(data).digest
    for training, text, known in (
        ({"data": "data.npz", "digest": digest}, "data.npz is the training set", True),
        ({"data": "other", "digest": digest}, "data.npz is the training set", True),
        ({"data": "data.npz", "digest": "0" * 64}, None, False),
        ({"data": "other"}, None, False),
        ({"data": "data.npz"}, "is not known", None),
        ({}, "is not known", None),
    ):
        result = nll(model(tmp_path, names=None, **training), data, out=tmp_path / "a.json")
        assert ("training" in result.stdout) is (text is not None) and (text or "") in result.stdout
        assert json.loads((tmp_path / "a.json").read_text())["training_set"] is known


def test_a_likelihood_of_the_images_that_the_training_held_out(tmp_path):
    random = np.random.default_rng(0)
    arrays = {"images": random.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8), "labels": np.arange(9) % 3}
    np.savez(tmp_path / "whole.npz", **arrays)
    training, held_out = split_held_out(load_dataset(tmp_path / "whole.npz"), 3)
    of = model(tmp_path, names=None, **training.recorded())
    kept = held_out.images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "alone.npz", images=kept, labels=held_out.labels.numpy())
    part = nll(of, tmp_path / "whole.npz", "--part", "held-out", out=tmp_path / "part.json")
    alone = nll(of, tmp_path / "alone.npz", out=tmp_path / "alone.json")
    assert part.exit_code == alone.exit_code == 0, part.stderr + alone.stderr
    assert total(tmp_path / "part.json") == total(tmp_path / "alone.json")
    report = json.loads((tmp_path / "part.json").read_text())
    assert report["images"] == 3 and report["training_set"] is False and report["part"] == "held-out"
    assert "3 of 9 images of whole.npz: those held out of its training" in part.stdout


@pytest.fixture
def images(tmp_path):
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8))
    return tmp_path / "data.npz"


def test_an_estimate_says_what_it_is_in_the_output_and_in_the_help(tmp_path, images):
    result = nll(model(tmp_path), images, out=tmp_path / "a.json")
    assert "estimated from 3 of 20 terms; --full evaluates all" in result.stdout
    assert "(estimated)   L_0" in result.stdout
    text = " ".join(run("evaluate", "nll", "--help").stdout.split())
    assert "By default it is an unbiased estimate from 50 of the bound's T terms" in text and "every L_" not in text


def test_a_default_name_never_replaces_a_report(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of = model(tmp_path)
    for _ in range(2):
        assert run("evaluate", "nll", "--model", of, "--data", images, "--steps", 2).exit_code == 0
    assert (tmp_path / "nll.json").exists() and (tmp_path / "nll-2.json").exists()


def stop_in_call(monkeypatch, k, number=signal.SIGTERM):
    """The signal arrives in call k of the network, from 0."""
    calls, real = [], Stopping.check

    def check_at(self, *_):
        if len(calls) == k:
            os.kill(os.getpid(), number)
        calls.append(1)
        real(self)

    monkeypatch.setattr(Stopping, "check", check_at)
    return calls


def test_stopped_the_finished_images_are_reported_as_a_part(tmp_path, images, monkeypatch):
    of = model(tmp_path)
    whole = nll(of, images, "--n", 4, out=tmp_path / "whole.json")
    assert whole.exit_code == 0
    calls = stop_in_call(monkeypatch, 2 * 3 + 1)  # in the third of three batches of two
    result = nll(of, images, "--batch-size", 2, out=tmp_path / "a.json")
    assert result.exit_code == 143 and len(calls) == 8
    assert "this is the result of the first 4 of 6 images" in result.stdout
    assert not (tmp_path / "a.json").exists()
    part = json.loads((tmp_path / "a.partial.json").read_text())
    assert (part["images"], part["images_asked"]) == (4, 6)
    np.testing.assert_allclose(part["total_bits_per_dim"], total(tmp_path / "whole.json"), rtol=1e-5)


def test_stopped_before_the_first_batch_nothing_is_written(tmp_path, images, monkeypatch):
    of = model(tmp_path)
    stop_in_call(monkeypatch, 0, signal.SIGINT)
    result = nll(of, images, out=tmp_path / "a.json")
    assert result.exit_code == 130 and "nothing was written" in result.stdout
    assert not list(tmp_path.glob("*.json"))
