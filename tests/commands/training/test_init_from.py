"""`train --init-from`: a new run that begins with a model's weights."""

import re

import numpy as np
import pytest
import torch

import ddpm_fast as df
from ddpm_fast.files import checkpoint
from ddpm_fast.nn import UNet, UNetConfig
from tests.support.commands import save_small_model
from tests.support.train_command import command, meta, pictures, weights

QUICK = ["--steps=1", "--batch-size=4", "--warmup=1", "--sample-every=0", "--precision=fp32", "--device=cpu"]


@pytest.fixture
def animals(tmp_path):
    return pictures(tmp_path / "animals", ["ant", "cat"])


def save_model(path, schedule=None, **options):
    """A model whose network and diffusion differ from the command's defaults in every field that can."""
    config = UNetConfig(
        image_size=8, in_channels=3, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_eps=1e-6,
        attention_resolutions=(8,), num_heads=2, dropout=0.25, norm_groups=8, scale_shift=False, **options,
    )  # fmt: skip
    diffusion = df.GaussianDiffusion(schedule or df.Schedule.linear(50), prediction="eps", variance="fixed_large")
    torch.manual_seed(0)
    described = {"unet": config.to_dict(), "diffusion": diffusion.to_dict(), "label_names": None, "training": {}}
    checkpoint.save_model(path, UNet(config).state_dict(), described)
    return path


def begin(data, tmp_path, model, *options, status=0):
    options = [f"--data={data}", f"--out={tmp_path / 'run'}", f"--init-from={model}", *QUICK, *options]
    return command(*options, status=status)


@pytest.mark.parametrize(
    "schedule",
    [None, df.Schedule.from_betas([0.01, 0.02, 0.1]), df.Schedule.cosine(50).respace(5)],
    ids=["linear", "betas", "respaced"],
)
def test_the_run_is_of_the_model_and_resumes_without_it(tmp_path, animals, schedule):
    path = save_model(tmp_path / "m.safetensors", schedule)
    said = begin(animals, tmp_path, path, "--lr=1e-12").stdout
    assert "pictures of another size or other colours are scaled, cut and converted to 8x8 and RGB" in said
    config = checkpoint.read_model(path)[1]
    started = meta(tmp_path / "run")
    assert started["unet"] == config["unet"] and started["diffusion"] == config["diffusion"]
    theirs = df.load_model(path).model.state_dict()
    for name, tensor in checkpoint.take_prefix("ema.", weights(tmp_path / "run")).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)  # a step of 1e-12
    (entry,) = started["training"]["history"]
    assert entry["step"] == 0 and entry["weights"][1].startswith("m.safetensors, SHA-256 ")

    path.unlink()  # the model is needed no more
    before = weights(tmp_path / "run")
    command(f"--out={tmp_path / 'run'}", "--resume", "--steps=2")
    after = meta(tmp_path / "run")
    assert after["step"] == 2 and after["unet"] == config["unet"] and after["diffusion"] == config["diffusion"]
    assert after["training"]["history"] == [entry] and weights(tmp_path / "run").keys() == before.keys()
    done = command(f"--out={tmp_path / 'run'}", "--resume", "--init-from=mnist", status=2)
    assert "--init-from mnist differs from the" in done.stderr


def test_resuming_is_as_in_any_run(tmp_path, animals):
    """One step and one more are two."""
    path = save_model(tmp_path / "m.safetensors")
    begin(animals, tmp_path, path)
    command(f"--out={tmp_path / 'run'}", "--resume", "--steps=2")
    resumed = weights(tmp_path / "run")
    (tmp_path / "again").mkdir()
    begin(animals, tmp_path / "again", path, "--steps=2")
    straight = weights(tmp_path / "again" / "run")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_classes_that_the_model_lacks_are_named(tmp_path, animals):
    path = save_small_model(tmp_path / "m.safetensors", classes=3, names=["cat", "dog", "owl"])
    said = begin(animals, tmp_path, path, "--classes", "--lr=1e-12").stdout
    assert "The model has 1 of the 2 classes; new ones begin anew: ant" in said
    table = checkpoint.take_prefix("ema.", weights(tmp_path / "run"))["label_embedding.weight"]
    theirs = df.load_model(path).model.label_embedding.weight
    assert table.shape[0] == 3 and meta(tmp_path / "run")["label_names"] == ["ant", "cat"]
    torch.testing.assert_close(table[1:], theirs[[0, 3]], rtol=0, atol=1e-6)
    assert not torch.allclose(table[0], theirs[1], atol=0.1)


def test_a_model_without_a_null_class_gets_one_and_keeps_its_classes(tmp_path, animals):
    path = save_model(tmp_path / "m.safetensors", num_classes=2, null_class=False)
    begin(animals, tmp_path, path, "--classes", "--lr=1e-12")
    table = checkpoint.take_prefix("ema.", weights(tmp_path / "run"))["label_embedding.weight"]
    assert meta(tmp_path / "run")["unet"]["null_class"] and table.shape[0] == 3
    torch.testing.assert_close(table[:2], df.load_model(path).model.label_embedding.weight, rtol=0, atol=1e-6)
    (tmp_path / "again").mkdir()
    done = begin(animals, tmp_path / "again", path, status=2)
    assert "has classes and no null class" in done.stderr


def test_flags_without_a_model_are_refused(tmp_path, animals):
    done = command(f"--data={animals}", f"--out={tmp_path / 'run'}", *QUICK, "--flags=--image_size 8", status=2)
    assert "--flags are those of the model that --init-from names" in done.stderr


@pytest.mark.parametrize(
    "option, words",
    [
        ("--model-channels=16", "--model-channels is 16, and .* has 8"),
        ("--channel-mult=1,2,2", "--channel-mult is 1,2,2, and .* has 1,2"),
        ("--num-res-blocks=2", "--num-res-blocks is 2, and .* has 1"),
        ("--attention=4", "--attention is 4, and .* has 8"),
        ("--num-heads=1", "--num-heads is 1, and .* has 2"),
        ("--scale-shift", "--scale-shift is True, and .* has False"),
        ("--image-size=16x7", "image_size 16x7 cannot be halved 1 times .*: resize the images to 16x6 or 16x8"),
        ("--channels=1", "--channels is 1, and .* has 3"),
        ("--variance=learned_range", "--variance is learned_range, and .* has fixed_large"),
        ("--schedule=betas", "schedule 'betas' is unknown"),
    ],
)
def test_options_that_contradict_the_model_are_refused(tmp_path, animals, option, words):
    done = begin(animals, tmp_path, save_model(tmp_path / "m.safetensors"), option, status=2)
    assert re.search(words, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_goes_on_with_images_of_another_size(tmp_path, animals):
    path = save_model(tmp_path / "m.safetensors", decoder_attention=(4,))
    said = begin(animals, tmp_path, path, "--image-size=16x12", "--attention=16", "--lr=1e-12").stdout
    assert "converted to 16x12 and RGB, where the model has 8x8" in said
    expected = df.load_model(path).model.config.to_dict()
    expected |= {"image_size": [16, 12], "attention_resolutions": [16], "decoder_attention": [8]}
    assert meta(tmp_path / "run")["unet"] == expected and meta(tmp_path / "run")["arguments"]["image_size"] == "16x12"
    theirs = df.load_model(path).model.state_dict()
    for name, tensor in checkpoint.take_prefix("ema.", weights(tmp_path / "run")).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)
    command(f"--out={tmp_path / 'run'}", "--resume", "--steps=2", "--image-size=16x12")
    assert meta(tmp_path / "run")["step"] == 2 and meta(tmp_path / "run")["unet"] == expected
    done = begin(animals, tmp_path / "x", path, "--image-size=16", "--attention=8", status=2)
    assert "--attention is 8, and" in done.stderr and "has 16" in done.stderr


def test_options_that_agree_and_changes_of_the_diffusion(tmp_path, animals):
    path = save_model(tmp_path / "m.safetensors")
    agreeing = ["--channel-mult= 1, 2", "--attention=8,8", "--model-channels=8", "--prediction=eps", "--dropout=0.5"]
    said = begin(animals, tmp_path, path, *agreeing, "--schedule=cosine", "--loss-weighting=min_snr").stdout
    assert "Changed from the model: loss_weighting none -> min_snr, schedule linear -> cosine" in said
    diffusion = meta(tmp_path / "run")["diffusion"]
    assert diffusion["schedule"] == {"kind": "cosine", "T": 50} and diffusion["prediction"] == "eps"
    assert diffusion["variance"] == "fixed_large" and meta(tmp_path / "run")["unet"]["dropout"] == 0.5
    own = save_model(tmp_path / "own.safetensors", df.Schedule.from_betas([0.1, 0.2]))
    done = begin(animals, tmp_path / "x", own, "--timesteps=20", status=2)
    assert "is a list of its own" in done.stderr


def test_the_range_of_a_float_model_is_kept(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "first.npy", rng.normal(0, 1, (6, 2, 8, 8)).astype(np.float32))
    np.save(tmp_path / "second.npy", rng.normal(0, 0.5, (6, 2, 8, 8)).astype(np.float32))
    options = ["--model-channels=4", "--channel-mult=1", "--num-res-blocks=1", *QUICK]
    command(f"--data={tmp_path / 'first.npy'}", f"--out={tmp_path / 'first'}", *options)
    before = meta(tmp_path / "first")["value_range"]
    begin(tmp_path / "second.npy", tmp_path, tmp_path / "first")
    assert meta(tmp_path / "run")["value_range"] == before
    begin(tmp_path / "second.npy", tmp_path / "other", tmp_path / "first", "--value-range=-4,4")
    assert meta(tmp_path / "other" / "run")["value_range"]["high"] == [4.0, 4.0]


def test_a_run_cannot_begin_with_itself_or_nothing(tmp_path, animals):
    done = begin(animals, tmp_path, tmp_path / "run", status=2)
    assert "--init-from is the folder of this run" in done.stderr
    done = begin(animals, tmp_path, "nosuch", status=2)
    assert "nosuch" in done.stderr


def test_a_trained_model_is_changed_more_slowly_than_a_new_one(tmp_path, animals):
    path = save_model(tmp_path / "m.safetensors")
    begin(animals, tmp_path, path)
    assert meta(tmp_path / "run")["arguments"]["lr"] == meta(tmp_path / "run")["training"]["lr"] == 1e-4
    command(f"--out={tmp_path / 'run'}", "--resume", "--steps=2")
    assert meta(tmp_path / "run")["training"]["lr"] == 1e-4
    begin(animals, tmp_path / "other", path, "--lr=2e-3")
    assert meta(tmp_path / "other" / "run")["training"]["lr"] == 2e-3
