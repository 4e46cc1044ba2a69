"""`python -m ddpm_fast.sample` with a classifier that guides, and with the images that a model enlarges."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.networks import random_classifier, random_unet

import ddpm_fast as df
from tests.support.classifier_cases import CLASSIFIERS, classifier_inputs
from tests.support.commands import run, save_small_model
from tests.support.made_weights import made_state

FIELDS = {"image_size": 8, "in_channels": 3, "model_channels": 8, "channel_mult": (1, 2), "norm_groups": 4}
DIFFUSION = df.GaussianDiffusion(df.Schedule.cosine(20), prediction="v", variance="fixed_small")


@pytest.fixture
def judge(tmp_path):
    df.save_classifier(tmp_path / "judge.safetensors", random_classifier(num_classes=4, **FIELDS))
    return tmp_path / "judge.safetensors"


def pixels(x):
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_a_classifier_guides_and_its_classes_are_those_of_an_unconditional_model(judge, tmp_path):
    model = save_small_model(tmp_path / "model.safetensors", classes=0)
    common = ["--model", model, "--n", 4, "--steps", 4, "--device", "cpu", "--out"]
    given = ["--classifier", judge, "--classifier-scale", 2]
    said = run("sample", *common, tmp_path / "a.npz", *given).stdout
    assert "classes: 0, 1, 2, 3" in said
    loaded, classifier = df.load_model(model), df.load_classifier(judge)
    options = {"steps": 4, "labels": [0, 1, 2, 3], "classifier": classifier, "classifier_scale": 2.0}
    expected = pixels(df.sample(loaded.model, loaded.diffusion, 4, **options))
    found = np.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(found["images"], expected)
    assert found["labels"].tolist() == [0, 1, 2, 3]

    run("sample", *common, tmp_path / "folder", *given)
    settings = json.loads((tmp_path / "folder" / "samples.json").read_text())
    assert settings["classifier_scale"] == 2 and len(settings["classifier"]) == 64
    assert "classifier" in run("sample", *common, tmp_path / "folder", "--labels", "none").stderr
    assert "classifier_scale" in run("sample", *common, tmp_path / "folder", *given[:2]).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classifier-scale", "2"], "--classifier-scale is for a classifier: give its file with --classifier"),
        (["--classifier-flags", "--image_size 64"], "--classifier-flags is for a classifier"),
        (["--classifier", "{judge}", "--labels", "none"], "a classifier needs labels"),
        (["--classifier", "{judge}", "--classifier-flags", "--image_size 64"], "leave the flags out"),
        (["--classifier", "{model}"], "is a model that draws; expected a classifier"),
        (["--model", "{judge}"], "is a classifier of noised images"),
        (["--condition", "{judge}"], "--condition is for a model that enlarges images"),
    ],
)
def test_options_that_do_not_fit(options, message, judge, tmp_path):
    model = save_small_model(tmp_path / "model.safetensors", classes=0)
    words = [word.format(judge=judge, model=model) for word in options]
    ended = run("sample", "--model", model, "--n", 1, "--steps", 2, "--out", tmp_path / "a.png", *words)
    assert ended.exit_code == 2 and message in ended.stderr
    assert not (tmp_path / "a.png").exists()


@pytest.fixture
def upsampler(tmp_path):
    unet = random_unet(**FIELDS, condition_channels=3)
    config = {"unet": unet.config.to_dict(), "diffusion": DIFFUSION.to_dict(), "label_names": None}
    df.save_model(tmp_path / "upsampler.safetensors", unet.state_dict(), config, torch.float32)
    return tmp_path / "upsampler.safetensors"


def test_small_images_are_enlarged_in_turn_by_their_sample_ids(upsampler, tmp_path):
    small = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "small.npz", images=small)
    common = ["--model", upsampler, "--steps", 4, "--device", "cpu", "--condition", tmp_path / "small.npz"]
    run("sample", *common, "--n", 3, "--first-sample-id", 1, "--out", tmp_path / "a.npz")
    loaded = df.load_model(upsampler)
    condition = torch.from_numpy(small[[1, 0, 1]]).permute(0, 3, 1, 2)
    drawn = df.sample(loaded.model, loaded.diffusion, 3, steps=4, condition=condition, first_sample_id=1)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["images"], pixels(drawn))

    run("sample", *common, "--n", 1, "--precision", "auto", "--out", tmp_path / "folder")
    assert len(json.loads((tmp_path / "folder" / "samples.json").read_text())["condition"]) == 64
    np.savez(tmp_path / "small.npz", images=255 - small)
    other = run("sample", *common, "--n", 1, "--precision", "auto", "--out", tmp_path / "folder")
    assert other.exit_code == 2 and "condition" in other.stderr


def test_one_picture_and_edits(upsampler, tmp_path):
    Image.new("L", (4, 4), 90).save(tmp_path / "grey.png")
    Image.new("RGB", (8, 8), (9, 80, 200)).save(tmp_path / "large.png")
    common = ["--model", upsampler, "--steps", 3, "--n", 2, "--condition", tmp_path / "grey.png", "--device", "cpu"]
    assert run("sample", *common, "--out", tmp_path / "a.png").exit_code == 0
    assert run("sample", *common, "--out", tmp_path / "b.png", "--init-image", tmp_path / "large.png").exit_code == 0
    missing = run("sample", "--model", upsampler, "--n", 2, "--out", tmp_path / "c.png")
    assert missing.exit_code == 2 and "needs a second image of 3 channels" in missing.stderr
    gone = run("sample", *common[:-3], tmp_path / "nothing.png", "--out", tmp_path / "c.png")
    assert gone.exit_code == 2 and "--condition: there is no file" in gone.stderr


def test_another_librarys_classifier_guides_and_is_converted(tmp_path):
    with np.load(Path(__file__).parents[1] / "golden" / "guidance.npz") as golden:
        shapes = json.loads(str(golden["shapes of adaptive"]))
    torch.save(made_state(shapes), tmp_path / "theirs.pt")
    out = tmp_path / "ours.safetensors"
    done = run("convert", tmp_path / "theirs.pt", "--out", out, "--flags", CLASSIFIERS["adaptive"])
    assert done.exit_code == 0, done.stderr
    assert "a classifier of noised images of 3x64x64, 1000 classes, pool adaptive, " in done.stdout
    x, t = classifier_inputs("adaptive")
    theirs, ours = df.load_classifier(tmp_path / "theirs.pt"), df.load_classifier(out)
    assert torch.equal(theirs(x, t), ours(x, t))
    refused = run("sample", "--model", tmp_path / "theirs.pt", "--n", 1, "--out", tmp_path / "a.png")
    assert refused.exit_code == 2 and "is a classifier of noised images, which draws nothing" in refused.stderr
    wrong = run("convert", tmp_path / "theirs.pt", "--out", out, "--flags", "--classifier_pool spatial")
    assert wrong.exit_code == 2 and "contradicts the weights" in wrong.stderr
