"""Evaluations while a model is trained: what they measure, what they keep, and that they change nothing."""

import errno
import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from support.acting import act_at, interrupt
from support.feature_networks import Tiny, scripted
from support.together import Together, nothing
from support.train_command import SMALL, command, meta, pictures, start, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ddpm_fast as df
from ddpm_fast.commands.training import best_model
from ddpm_fast.commands.training import quality as training_quality
from ddpm_fast.commands.training import reference as training_reference
from ddpm_fast.data import Dataset, load_dataset, split_as_recorded
from ddpm_fast.files import checkpoint
from ddpm_fast.loops.state import BatchState
from ddpm_fast.metrics.features.load import load_extractor
from ddpm_fast.nn import UNet, UNetConfig
from ddpm_fast.pictures.images import to_uint8

pytestmark = pytest.mark.usefixtures("wide_terminal")
N = 30
OPTIONS = ["--classes", "--held-out=10", "--steps=4", f"--evaluate-n={N}", "--evaluate-steps=3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight pictures of one class and twelve of another."""
    folder = tmp_path_factory.mktemp("data") / "data"
    for first in (0, 100):
        pictures(folder, ["cat", "dog"], first)
    return pictures(folder, ["dog"], 200)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A TorchScript file of a small random network."""
    return scripted(Tiny(), tmp_path_factory.mktemp("features") / "tiny.pt")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data, features):
    """A run of four steps that is evaluated twice: its folder, and what it said."""
    out = tmp_path_factory.mktemp("straight") / "out"
    return out, start(data, out, *OPTIONS, "--evaluate-every=2", f"--features={features}").stdout


def lines(out):
    return [json.loads(line) for line in (out / "quality.jsonl").read_text().splitlines()]


def without_time(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def quality_of(path):
    return checkpoint.load_model(path).config["training"]["quality"]


def let_distances_be(monkeypatch, values):
    """Let the kernel distances of the next evaluations be these."""
    left, measure = list(values), training_quality.measure

    def measured(fake, real, metrics):
        found = measure(fake, real, metrics)
        return found | {"kid": {**found["kid"], "value": left.pop(0)}} if "kid" in metrics else found

    monkeypatch.setattr(training_quality, "measure", measured)


# What is measured


def test_lines_curves_and_what_is_said(straight):
    out, told = straight
    records = lines(out)
    assert [record["step"] for record in records] == [2, 4]
    assert records[0]["about"] == {
        "features": "tiny", "resizing": records[0]["about"]["resizing"], "reference": "data", "n": N, "reference_n": 10,
    }  # fmt: skip
    curves = EventAccumulator(str(out / "curves")).Reload()
    shown = {
        "quality/kernel distance": lambda record: record["kid"]["value"],
        "quality/Frechet distance": lambda record: record["fid"]["value"],
        **{
            f"quality/{name}": lambda record, name=name: record["pr"][name]
            for name in ("precision", "recall", "density", "coverage")
        },
        **{
            f"memorisation/{name}": lambda record, name=name: record["memorisation"][name]
            for name in ("nearer", "z", "copies")
        },
        "held-out loss": lambda record: record["held_out"]["loss"],
        **{
            f"held-out loss by quarter of t/q{i}": lambda record, i=i: record["held_out"]["quarters"][i]
            for i in range(4)
        },
    }
    for tag, number in shown.items():
        points = curves.Scalars(tag)
        assert [point.step for point in points] == [2, 4]
        assert [point.value for point in points] == pytest.approx([number(record) for record in records], rel=1e-6)
    assert any(f"loss by quarter of t/q{i}" in curves.Tags()["scalars"] for i in range(4))
    for record in records:
        assert f"step {record['step']}: kernel distance x 1000 {1000 * record['kid']['value']:.3g}" in told
        assert f"held-out loss {record['held_out']['loss']:.4f}" in told
    assert "10 images 3x8x8 from data, 10 more held out" in told


def test_the_numbers_are_those_of_samples_drawn_from_the_state(straight, data, features):
    """Drawn again from the averages of the last state, and compared by a formula with another root."""
    out, _ = straight
    tensors, said = checkpoint.read_training(checkpoint.latest_checkpoint(out))
    model = UNet(UNetConfig.from_dict(said["unet"]))
    model.load_state_dict(checkpoint.take_prefix("ema.", tensors))
    diffusion = df.GaussianDiffusion.from_dict(said["diffusion"])
    training, held_out = split_as_recorded(load_dataset(data, classes=True), said["training"]["held_out"])
    counts = np.bincount(training.labels).tolist()
    assert counts == np.bincount(held_out.labels).tolist() == [4, 6]
    drawn_as = training_quality.in_proportion(counts, N).tolist()
    assert np.bincount(drawn_as).tolist() == [12, 18]
    x = df.sample(model, diffusion, N, sampler="dpmpp_2m", steps=3, seed=0, labels=drawn_as)
    network = load_extractor(features).compute
    fake, real, new = (
        network(images)[0].double().numpy()
        for images in (torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2), training.images, held_out.images)
    )
    between = sqrtm(np.cov(fake.T) @ np.cov(real.T)).real
    apart = ((fake.mean(0) - real.mean(0)) ** 2).sum()
    expected = apart + np.trace(np.cov(fake.T) + np.cov(real.T) - 2 * between)
    found = lines(out)[-1]
    assert found["fid"]["value"] == pytest.approx(expected, rel=1e-4)
    of_samples, of_new = ([min(np.linalg.norm(real - one, axis=1)) for one in some] for some in (fake, new))
    pairs = [a < b for a in of_samples for b in of_new]
    assert found["memorisation"]["nearer"] == pytest.approx(np.mean(pairs), abs=1e-9)
    assert found["memorisation"]["copies"] == pytest.approx(np.mean(np.array(of_samples) < min(of_new)), abs=1e-9)


# What it changes


def test_nothing_of_the_training_changes_and_a_resumed_run_is_the_uninterrupted_one(tmp_path, data, features, straight):
    plain, halves = tmp_path / "plain", tmp_path / "halves"
    start(data, plain, *OPTIONS)
    options = [option for option in OPTIONS if "--steps" not in option]
    start(data, halves, *options, "--steps=2", "--evaluate-every=2", f"--features={features}")
    (halves / "reference.npz").unlink()
    told = command("--out", halves, "--resume", "--steps=4").stdout
    a, b, c = (weights(out) for out in (straight[0], plain, halves))
    assert a.keys() == b.keys() == c.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) and torch.equal(value, c[name]), name
    assert without_time(lines(halves)) == without_time(lines(straight[0])) and "step 4: kernel distance" in told
    best = [checkpoint.read_model(out / "best.safetensors") for out in (straight[0], halves)]
    assert all(torch.equal(best[0][0][name], best[1][0][name]) for name in best[0][0])
    assert best[0][1]["training"]["quality"]["step"] == best[1][1]["training"]["quality"]["step"]
    assert "quality" not in meta(plain)["training"] and not (plain / "quality.jsonl").exists()


def test_no_held_out_image_is_trained_on_and_all_others_are(tmp_path, data, monkeypatch):
    seen = []
    batch = Dataset.batch

    def watched(dataset, indices):
        images, labels = batch(dataset, indices)
        seen.append(images)
        return images, labels

    monkeypatch.setattr(Dataset, "batch", watched)
    start(data, tmp_path / "out", "--held-out=0.2", "--steps=8")
    said = meta(tmp_path / "out")["training"]
    training, held_out = split_as_recorded(load_dataset(data), said["held_out"])
    assert (said["count"], said["held_out"]["count"]) == (20, 4)
    trained_on = {image.numpy().tobytes() for images in seen for image in images}
    assert trained_on == {image.numpy().tobytes() for image in training.images}, "32 examples are two epochs of 16"
    assert trained_on.isdisjoint(image.numpy().tobytes() for image in held_out.images)
    config = checkpoint.load_model(tmp_path / "out").config["training"]
    assert config["held_out"] == said["held_out"] and config["digest"] == load_dataset(data).digest


def test_what_is_held_out_stays_so(tmp_path, data, straight):
    out = tmp_path / "out"
    start(data, out, "--steps=1", "--held-out=4")
    for changed in ("--held-out=5", "--held-out=0.2"):
        refused = command("--out", out, "--resume", "--steps=2", changed, status=2).stderr
        assert "differs from the 4 this run was started with" in refused
    assert "4 more held out" in command("--out", out, "--resume", "--steps=2").stdout
    without = tmp_path / "without"
    start(data, without, "--steps=1")
    assert "held_out" not in meta(without)["training"]
    assert "--held-out 4 differs" in command("--out", without, "--resume", "--steps=2", "--held-out=4", status=2).stderr
    for wrong, why in (("20", "leaves none to train on"), ("1.5", "expected a number of images")):
        assert why in start(data, tmp_path / "no", f"--held-out={wrong}", status=2).stderr
    assert not (tmp_path / "no").exists()


# What is kept


def test_the_best_model_is_kept_over_resumes(tmp_path, data, features, monkeypatch):
    out, every = tmp_path / "out", ["--evaluate-every=1", f"--features={features}"]
    let_distances_be(monkeypatch, [3.0, 1.0, 2.0, 1.5, 0.5])
    start(data, out, *OPTIONS[:2], *OPTIONS[3:], *every, "--steps=3")
    assert quality_of(out / "best.safetensors")["step"] == 2
    command("--out", out, "--resume", "--steps=4")
    best = quality_of(out / "best.safetensors")
    assert best["step"] == 2 and best["best_by"] == best["kid"]["value"] == 1.0
    assert checkpoint.load_model(out / "best.safetensors").config["training"]["steps"] == 2
    command("--out", out, "--resume", "--steps=5")
    assert quality_of(out / "best.safetensors")["step"] == 5
    assert [record["best"] for record in lines(out)] == [True, True, False, False, True]
    tensors, averages = checkpoint.read_model(out / "best.safetensors")[0], weights(out)
    assert all(torch.equal(value, averages[f"ema.{name}"].bfloat16()) for name, value in tensors.items())


def test_what_was_measured_otherwise_is_not_compared_with(tmp_path, data, features, monkeypatch):
    out, every = tmp_path / "out", ["--evaluate-every=1", f"--features={features}"]
    let_distances_be(monkeypatch, [1.0, 2.0, 3.0])
    start(data, out, *OPTIONS[:2], *OPTIONS[3:], *every, "--steps=1")
    told = command("--out", out, "--resume", "--steps=2", "--evaluate-n=20").stdout
    assert "kept as best.safetensors.measured-otherwise" in told and quality_of(out / "best.safetensors")["step"] == 2
    (out / "best.safetensors").write_bytes(b"damaged")
    command("--out", out, "--resume", "--steps=3")
    assert quality_of(out / "best.safetensors")["step"] == 3


def test_lines_of_steps_that_were_taken_back_go(tmp_path):
    for step in (2, 4, 6, 4):
        best_model.add_line(tmp_path, {"step": step, "is": step})
    with open(tmp_path / "quality.jsonl", "a") as file:
        file.write('{"step": 5, "cut')
    best_model.add_line(tmp_path, {"step": 8})
    assert [record["step"] for record in lines(tmp_path)] == [2, 4, 8]


def test_the_reference_is_computed_once_for_the_same_images_and_features(tmp_path, data, features, monkeypatch):
    out, computed = tmp_path / "out", []
    compute = training_reference.Reference.compute
    monkeypatch.setattr(
        training_reference.Reference, "compute", lambda *given: (computed.append(given), compute(*given))[1]
    )
    options = [*OPTIONS[:2], *OPTIONS[3:], "--evaluate-every=1", f"--features={features}"]
    start(data, out, *options, "--steps=2")
    assert len(computed) == 1
    command("--out", out, "--resume", "--steps=3")
    assert len(computed) == 1
    (out / "reference.npz").write_bytes((out / "reference.npz").read_bytes()[:-200])
    command("--out", out, "--resume", "--steps=4")
    assert len(computed) == 2
    network = Tiny()
    network.first.weight.data.mul_(2)
    other = scripted(network, tmp_path / "other.pt")
    command("--out", out, "--resume", "--steps=5", f"--features={other}")
    assert len(computed) == 3


# The held-out loss alone


def test_without_samples_the_held_out_loss_is_the_measure(tmp_path, data):
    out = tmp_path / "out"
    told = start(data, out, "--held-out=4", "--steps=2", "--evaluate-every=1", "--evaluate-n=0").stdout
    records = lines(out)
    assert all(record.keys() == {"step", "held_out", "seconds", "best"} for record in records)
    least = min(records, key=lambda record: record["held_out"]["loss"])
    assert quality_of(out / "best.safetensors")["best_by"] == least["held_out"]["loss"]
    assert re.search(r"step 2: held-out loss \d\.\d{4}", told) and not (out / "reference.npz").exists()


# What goes wrong


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--features=missing.pt"], "missing.pt does not exist"),
        (["--evaluate-n=0"], "nothing to evaluate"),
        (["--evaluate-n=9"], "expected at least 10"),
        (["--evaluate-steps=0"], "--evaluate-steps is 0"),
        (["--evaluate-sampler=euler"], "euler"),
        (["--held-out=11"], "at least 10 images, and there are 9"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_the_first_step(tmp_path, data, features, options, why):
    wanted = ["--evaluate-every=1", f"--features={features}", "--steps=2", *options]
    assert why in start(data, tmp_path / "out", *wanted, status=2).stderr
    assert not (tmp_path / "out").exists()


def test_a_failing_evaluation_is_a_warning(tmp_path, data, features, monkeypatch):
    out, plain, calls = tmp_path / "out", training_quality.to_uint8, []

    def out_of_memory(x):
        calls.append(len(x))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(x)

    monkeypatch.setattr(training_quality, "to_uint8", out_of_memory)
    told = start(data, out, *OPTIONS, "--evaluate-every=1", f"--features={features}").stdout
    assert told.count("the evaluation of step 1 failed, and the training goes on: there is not enough memory") == 1
    assert [record["step"] for record in lines(out)] == [2, 3, 4] and "Done" in told


def test_a_disk_that_takes_neither_lines_nor_the_best_model_is_a_warning(tmp_path, data, features, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(training_quality, "add_line", full)
    monkeypatch.setattr(training_quality.BestModel, "offer", full)
    options = [*OPTIONS, "--evaluate-every=4", f"--features={features}"]
    told = start(data, tmp_path / "out", *options).stdout
    assert told.count("could not be kept, and the training goes on") == 2 and "Done" in told
    assert "step 4: kernel distance" in told


def test_a_signal_drops_the_evaluation_and_saves(tmp_path, data, features, monkeypatch):
    out = tmp_path / "out"
    rows = act_at(monkeypatch, BatchState, "advance", 2, interrupt())
    options = [*OPTIONS, "--evaluate-every=2", f"--features={features}"]
    told = start(data, out, *options, status=128 + signal.SIGTERM).stdout
    assert len(rows) == 2, "the evaluation went on"
    assert "Stopped at step 2, saved" in told and not (out / "quality.jsonl").exists()
    command("--out", out, "--resume")
    assert [record["step"] for record in lines(out)] == [4]


def stop_in_the_second_evaluation():
    """A signal arrives in this rank while it draws: an evaluation draws one batch in three sampling steps."""
    plain, calls = BatchState.advance, []

    def advance(*given):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return plain(*given)

    BatchState.advance = advance


def test_two_ranks_measure_what_one_does_and_a_signal_to_one_ends_the_evaluation_of_both(
    tmp_path, data, features, straight
):
    out = tmp_path / "out"
    options = [*SMALL, *OPTIONS, "--steps=6", "--evaluate-every=2", f"--features={features}"]
    befores = (nothing, stop_in_the_second_evaluation)
    ended = Together(tmp_path, f"--data={data}", f"--out={out}", *options, befores=befores).wait()
    assert ended.statuses == [143, 143] and "Rank 1 was asked to stop" in ended.said[0]
    assert meta(out)["step"] == 5, "the ranks agree on stopping with the next step"
    assert ended.said[1] == "" and ended.said[0].count("kernel distance") == 1
    (record,), expected = lines(out), lines(straight[0])[0]
    assert record["step"] == 2 and record["about"] == expected["about"]
    # The weights differ by the order of sums, and images by a level.
    assert record["fid"]["value"] == pytest.approx(expected["fid"]["value"], rel=1e-2)
    assert record["held_out"]["loss"] == pytest.approx(expected["held_out"]["loss"], rel=1e-4)
    assert record["held_out"]["quarters"] == pytest.approx(expected["held_out"]["quarters"], rel=1e-4)
    assert quality_of(out / "best.safetensors")["step"] == 2
