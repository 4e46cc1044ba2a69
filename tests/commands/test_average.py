"""The commands: a run keeps averages, and models of other widths are made of them, which draw as other models do."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.feature_networks import Tiny, scripted
from support.train_command import meta, start, weights
from typer.testing import CliRunner

from ddpm_fast.commands import average, evaluate
from ddpm_fast.commands import train as training
from ddpm_fast.data import open_dataset
from ddpm_fast.files.averages import average_prefix, saved_averages
from ddpm_fast.files.checkpoint import latest_checkpoint, load_model, take_prefix
from ddpm_fast.formats.facts import facts
from ddpm_fast.loops.held_out import evaluate_losses

pytestmark = pytest.mark.usefixtures("wide_terminal")
KEPT = "--average-widths=0.05,0.1"


def command(*arguments, status=0, app=average.app):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == status, done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(4):
        picture = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """Forty steps, whose averages are saved every two, without being told to."""
    out = tmp_path_factory.mktemp("runs") / "run"
    start(data, out, "--steps=40", KEPT)
    return out


def test_a_run_saves_averages_evenly_and_in_its_state(run):
    assert [saved.profile for saved in saved_averages(run)] == [(s, w) for s in range(2, 41, 2) for w in (0.05, 0.1)]
    assert (meta(run)["arguments"]["average_every"], meta(run)["training"]["average_widths"]) == (2, [0.05, 0.1])
    assert {name.split(".")[0] for name in weights(run)} >= {"average", "ema", "model", "optim"}


def test_the_average_of_a_width_that_was_kept(run, tmp_path):
    said = command(run, "--width", 0.1, "--out", tmp_path / "m.safetensors").stdout
    assert "40 that were saved from step 2 to 40 with the widths 0.05, 0.1" in said
    assert "width 0.1: within 0.00% of its profile" in said
    loaded = load_model(tmp_path / "m.safetensors")
    expected = take_prefix(average_prefix(0.1), weights(run))
    for name, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=2**-8 + 2**-11, atol=1e-6)  # bf16 of fp16
    assert loaded.config["training"]["steps"] == 40
    assert facts(loaded)["Averaged"] == "with the width 0.1"


def test_several_widths_at_an_earlier_step_go_to_a_folder(run, tmp_path):
    command(run, "--width=0.03,0.15", "--step=20", "--out", tmp_path / "models")
    for width in (0.03, 0.15):
        loaded = load_model(tmp_path / "models" / f"width-{width}.safetensors")
        assert loaded.config["average"]["width"] == width
        assert loaded.config["average"]["step"] == loaded.config["training"]["steps"] == 20


def test_a_resumed_run_saves_what_the_uninterrupted_one_does(run, data, tmp_path):
    out = tmp_path / "out"
    start(data, out, "--steps=20", KEPT, "--average-every=2", "--save-every=9")
    for path in out.glob("step-*20.safetensors"):
        path.unlink()
    assert latest_checkpoint(out).name == "step-00000018.safetensors"
    command(f"--out={out}", "--resume", "--steps=40", "--save-every=40", app=training.app)
    assert [s.profile for s in saved_averages(out)] == [s.profile for s in saved_averages(run)]
    for one, other in zip(saved_averages(out), saved_averages(run), strict=True):
        mine, theirs = (load_model(saved.path).model.state_dict() for saved in (one, other))
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items()), one.path


def test_a_run_that_began_without_averages_goes_on_without(data, tmp_path):
    start(data, tmp_path, "--steps=2")
    said = command(f"--out={tmp_path}", "--resume", "--steps=4", KEPT, app=training.app, status=2).stderr
    assert "--average-widths 0.05,0.1 differs from" in said
    command(f"--out={tmp_path}", "--resume", "--steps=4", app=training.app)
    said = command(tmp_path, "--width=0.1", "--out", tmp_path / "m.safetensors", status=2).stderr
    assert "started with --average-widths 0.05,0.1" in said


def test_averages_that_cannot_be_saved_are_told_of_and_the_training_goes_on(data, tmp_path):
    tmp_path.joinpath("averages").write_text("in the way")
    said = start(data, tmp_path, "--steps=3", KEPT, "--average-every=2").stdout
    assert "averages of the widths 0.05, 0.1 are saved every 2 steps: 0 MiB after 3 steps" in said
    assert said.count("could not be saved") == 2 and "the averages of step 2" in said
    assert meta(tmp_path)["step"] == 3


WIDTHS = "--sweep=0.03,0.07,0.15"


def models(run, folder):
    """The models of the widths that a sweep measures, by width."""
    command(run, "--width=0.03,0.07,0.15", "--out", folder)
    return {width: folder / f"width-{width}.safetensors" for width in (0.03, 0.07, 0.15)}


def test_a_sweep_by_the_loss_writes_the_width_of_the_least(run, data, tmp_path):
    """The losses are those of the models that --width writes, on the same images, timesteps and noise."""
    out = tmp_path / "best.safetensors"
    said = command(run, WIDTHS, "--by=loss", f"--reference={data}", "--out", out).stdout
    report = json.loads(out.with_suffix(".json").read_text())
    losses, images = {}, open_dataset(str(data))
    for width, path in {**models(run, tmp_path / "models"), None: run / "model.safetensors"}.items():
        loaded = load_model(path)
        found = evaluate_losses(loaded.unet, loaded.diffusion, images, slice(0, 512), 0)
        losses[width] = found.double().mean().item()
    plain = losses.pop(None)
    assert {row["width"]: row["loss"]["value"] for row in report["widths"]} == pytest.approx(losses, rel=1e-6)
    assert report["model"]["loss"]["value"] == pytest.approx(plain, rel=1e-6)
    best = min(losses, key=losses.get)
    assert (report["best"], report["by"], report["step"]) == (best, "loss", 40)
    assert len(set(losses.values())) == 3 and f"{losses[best]:.5f} (the best)" in said
    assert out.read_bytes() == models(run, tmp_path / "again")[best].read_bytes()
    assert Image.open(out.with_suffix(".png")).width > 500


def test_a_sweep_by_fid_measures_what_evaluate_does(run, data, tmp_path):
    features = scripted(Tiny(), tmp_path / "made.pt")
    options = ["--n=6", "--steps=3", "--sampler=ddim", f"--reference={data}", f"--features={features}"]
    out = tmp_path / "best.safetensors"
    command(run, WIDTHS, *options, "--out", out)
    report = json.loads(out.with_suffix(".json").read_text())
    found = {}
    for width, path in models(run, tmp_path / "models").items():
        command("fid", f"--model={path}", *options, "--out", tmp_path / "q.json", app=evaluate.app)
        found[width] = json.loads((tmp_path / "q.json").read_text())["fid"]["value"]
    assert {row["width"]: row["fid"]["value"] for row in report["widths"]} == pytest.approx(found, rel=1e-6)
    assert report["best"] == min(found, key=found.get) and "6 samples against" in report["on"]


def test_the_loss_is_that_on_the_images_that_were_held_out(data, tmp_path):
    start(data, tmp_path / "run", "--steps=4", KEPT, "--held-out=2")
    out = tmp_path / "best.safetensors"
    command(tmp_path / "run", "--sweep=0.1", "--by=loss", f"--reference={data}", "--out", out)
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["on"].startswith("2 images") and report["on"].endswith("that were held out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width=0.1", "--out=models"], "--out is models; expected a name ending in .safetensors"),
        (["--width=0.1,0.2", "--out=m.safetensors"], "expected a folder for the models of several widths"),
        (["--width=0.4", "--out=m.safetensors"], "--width is 0.4; expected a width from 0.001 to 0.288"),
        (["--width=0.1,0.1", "--out=models"], "expected different widths"),
        (["--width=", "--out=models"], "expected different widths"),
        (["--width=x", "--out=models"], "expected numbers"),
        (["--width=0.1", "--step=41", "--out=m.safetensors"], "has averages of steps 2 to 40"),
        (["--out=m.safetensors"], "give either --width"),
        (["--width=0.1", "--sweep=0.1", "--out=m.safetensors"], "give either --width"),
        (["--sweep=0.1", "--out=m.safetensors"], "--reference is missing"),
        (["--width=0.1", "--reference=mnist5k", "--out=m.safetensors"], "--reference is for --sweep"),
        (["--sweep=0.1", "--by=is", "--out=m.safetensors"], "--by is 'is'; expected one of fid, kid, loss"),
        (["--sweep=0.1,0.2", "--out=models"], "expected a name ending in .safetensors, for the best"),
    ],
)
def test_wrong_options(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in command(run, *arguments, status=2).stderr
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_profile_that_is_far_from_all_that_were_kept_is_warned_of(run, tmp_path):
    said = command(run, "--width=0.005", "--out", tmp_path / "m.safetensors").stderr
    assert "is far from those that were saved" in said
