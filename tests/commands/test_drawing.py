"""Sampling that is stopped loses nothing that was finished, and goes on from there to the same images."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from support.commands import run, save_small_model

from ddpm_fast.commands import drawing, stopping
from ddpm_fast.commands.drawing import partial_path, unused_path

STEPS = 3
BASE = ("--steps", STEPS, "--batch-size", 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model") / "small.safetensors", names=["1", "2", "hen & hare"])


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(k, signal): the signal arrives during step k of the command, counted over all batches from 0."""

    def arrange(k, number=signal.SIGINT):
        steps, before = [], drawing.Drawing.on_step

        def on_step(self, step):
            before(self, step)
            if len(steps) == k:
                os.kill(os.getpid(), number)
            steps.append(step)

        monkeypatch.setattr(drawing.Drawing, "on_step", on_step)
        return steps

    return arrange


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stopped_folder_is_continued_to_the_same_images(small, tmp_path, stop_at, monkeypatch, number, status):
    arguments = ("--model", small, "--n", 5, *BASE)
    assert run("sample", *arguments, "--out", tmp_path / "whole").exit_code == 0
    steps = stop_at(STEPS + 1, number)  # in the second of three batches
    result = run("sample", *arguments, "--out", tmp_path / "part")
    assert result.exit_code == status and len(steps) == STEPS + 2, "the step after the signal must not be run"
    assert f"2 of 5 images are in {tmp_path / 'part'}. The same command draws the rest." in result.stdout
    assert len(pictures(tmp_path / "part")) == 2
    monkeypatch.undo()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").glob("*.png")}
    result = run("sample", *arguments, "--out", tmp_path / "part")
    assert result.exit_code == 0 and "2 of 5 images are in" in result.stdout and "3 images of 3x8x8" in result.stdout
    assert pictures(tmp_path / "part") == pictures(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == before for path, before in times.items()), "finished images must be kept"


def test_the_files_names_have_the_label_and_the_class(small, tmp_path):
    result = run("sample", "--model", small, "--n", 3, *BASE, "--out", tmp_path / "s")
    assert list(pictures(tmp_path / "s")) == [
        "000000_label0_1.png",
        "000001_label1_2.png",
        "000002_label2_hen_hare.png",
    ]
    assert "classes: 1 (0), 2 (1), hen & hare (2)" in result.stdout


def test_a_folder_is_extended_by_a_larger_n_and_by_later_sample_ids(small, tmp_path):
    for n in (2, 7):
        run("sample", "--model", small, "--n", n, *BASE, "--out", tmp_path / "a")
    run("sample", "--model", small, "--n", 2, *BASE, "--out", tmp_path / "b")
    run("sample", "--model", small, "--n", 5, "--first-sample-id", 2, *BASE, "--out", tmp_path / "b")
    assert len(pictures(tmp_path / "a")) == 7 and pictures(tmp_path / "a") == pictures(tmp_path / "b")


@pytest.mark.parametrize(
    ("other", "message"),
    [(("--seed", 1), "seed 0 instead of 1"), (("--sampler", "ddim"), '"ddpm" instead of "ddim"')],
    ids=["seed", "sampler"],
)
def test_a_folder_of_other_settings_is_refused_and_left_alone(small, tmp_path, other, message):
    run("sample", "--model", small, "--n", 2, *BASE, "--out", tmp_path / "s")
    before = pictures(tmp_path / "s")
    result = run("sample", "--model", small, "--n", 4, *BASE, *other, "--out", tmp_path / "s")
    assert result.exit_code == 2 and message in result.stderr and "give another folder" in result.stderr
    assert pictures(tmp_path / "s") == before


def test_another_models_images_and_images_of_unknown_settings_are_refused(small, tmp_path):
    run("sample", "--model", small, "--n", 1, *BASE, "--out", tmp_path / "s")
    other = save_small_model(tmp_path / "other.safetensors", classes=0)
    result = run("sample", "--model", other, "--n", 1, *BASE, "--out", tmp_path / "s")
    assert result.exit_code == 2 and "samples drawn with model" in result.stderr
    for damaged in (None, "{"):
        (tmp_path / "s" / "samples.json").unlink(missing_ok=True)
        if damaged:
            (tmp_path / "s" / "samples.json").write_text(damaged)
        result = run("sample", "--model", small, "--n", 1, *BASE, "--out", tmp_path / "s")
        assert result.exit_code == 2 and "how" in result.stderr and "drawn" in result.stderr


def test_an_edit_is_not_continued_as_another_edit(small, tmp_path):
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    arguments = ("--model", small, "--n", 1, *BASE, "--out", tmp_path / "s", "--init-image")
    assert run("sample", *arguments, tmp_path / "red.png").exit_code == 0
    assert run("sample", *arguments, tmp_path / "red.png").exit_code == 0
    result = run("sample", *arguments, tmp_path / "blue.png")
    assert result.exit_code == 2 and "drawn with pictures" in result.stderr
    result = run("sample", *arguments, tmp_path / "red.png", "--strength", 0.9)
    assert result.exit_code == 2 and "strength null instead of 0.9" in result.stderr


@pytest.mark.parametrize("name", ["s.npz", "s.png"])
def test_a_file_that_was_stopped_becomes_a_partial_one_and_says_how_to_draw_the_rest(small, tmp_path, stop_at, name):
    (tmp_path / name).write_text("the result of an earlier command")
    stop_at(2 * STEPS)
    result = run("sample", "--model", small, "--n", 5, "--first-sample-id", 10, *BASE, "--out", tmp_path / name)
    assert result.exit_code == 130
    assert (tmp_path / name).read_text() == "the result of an earlier command"
    partial = partial_path(tmp_path / name)
    assert f"the first 4 of 5 images are in {partial}" in result.stdout
    assert "--first-sample-id 14 --n 1" in result.stdout
    assert partial.name == f"s.partial{partial.suffix}" and partial.exists()


def test_the_finished_and_the_rest_are_the_whole(small, tmp_path, stop_at, monkeypatch):
    arguments = ("--model", small, *BASE)
    run("sample", *arguments, "--n", 5, "--out", tmp_path / "whole.npz")
    stop_at(2 * STEPS)
    run("sample", *arguments, "--n", 5, "--out", tmp_path / "s.npz")
    monkeypatch.undo()
    run("sample", *arguments, "--n", 1, "--first-sample-id", 4, "--out", tmp_path / "rest.npz")
    whole, first, rest = (np.load(tmp_path / name) for name in ("whole.npz", "s.partial.npz", "rest.npz"))
    assert np.concatenate([first["labels"], rest["labels"]]).tolist() == whole["labels"].tolist() == [0, 1, 2, 0, 1]
    both = np.concatenate([first["images"], rest["images"]]).astype(int)
    assert np.abs(both - whole["images"]).max() <= 1  # the network's rounding


def test_stopped_before_the_first_batch_nothing_is_written(small, tmp_path, stop_at):
    stop_at(0)
    result = run("sample", "--model", small, "--n", 2, *BASE, "--out", tmp_path / "s.npz")
    assert result.exit_code == 130 and "no batch was finished, so nothing was written" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["--round-trip", "--interpolate-with"])
def test_encoding_looks_at_signals_too(small, tmp_path, mode, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    other = () if mode == "--round-trip" else (tmp_path / "a.png", "--sampler", "ddim", "--n", 2)
    looks, real = [], stopping.Stopping.check

    def check(self, *_):
        looks.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        real(self)

    monkeypatch.setattr(stopping.Stopping, "check", check)
    result = run(
        "sample", "--model", small, *BASE, "--init-image", tmp_path / "a.png", mode, *other, "--out", tmp_path / "x.png"
    )
    assert result.exit_code == 130 and "nothing was written" in result.stdout and looks == [1]


def test_a_second_ctrl_c_aborts_and_names_what_there_is(small, tmp_path, monkeypatch, capfd):
    def on_step(self, step):
        if step.first == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(drawing.Drawing, "on_step", on_step)
    result = run("sample", "--model", small, "--n", 4, *BASE, "--out", tmp_path / "s")
    said = capfd.readouterr().err
    assert result.exit_code == 130 and "SIGINT: stopping after this step" in said and "aborted: 2 images are in" in said


def test_an_animation_of_a_folder_that_is_continued_shows_all_images(small, tmp_path):
    run("sample", "--model", small, "--n", 2, *BASE, "--out", tmp_path / "s")
    for gif, out in (("a.gif", "s"), ("b.gif", "t")):
        arguments = ("--model", small, "--n", 4, *BASE, "--out", tmp_path / out, "--gif", tmp_path / gif)
        assert run("sample", *arguments).exit_code == 0
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_a_default_name_never_replaces_a_file(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert run("sample", "--model", small, "--n", 1, *BASE).exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["samples-2.png", "samples-3.png", "samples.png"]
    assert {path.stem for path in tmp_path.glob("*.yaml")} == {"samples", "samples-2", "samples-3"}  # their options
    assert unused_path(tmp_path / "nll.json") == tmp_path / "nll.json"


def test_a_folder_that_is_removed_meanwhile_can_be_continued_afterwards(small, tmp_path, monkeypatch):
    before = drawing.Drawing.on_step

    def on_step(self, step):
        before(self, step)
        if step.first == 2:
            shutil.rmtree(tmp_path / "s", ignore_errors=True)

    monkeypatch.setattr(drawing.Drawing, "on_step", on_step)
    arguments = ("--model", small, "--n", 6, *BASE)
    assert run("sample", *arguments, "--out", tmp_path / "s").exit_code == 0
    assert len(pictures(tmp_path / "s")) == 4
    monkeypatch.undo()
    assert run("sample", *arguments, "--out", tmp_path / "s").exit_code == 0
    assert len(pictures(tmp_path / "s")) == 6


def test_what_a_killed_command_left_is_removed(small, tmp_path):
    (tmp_path / "s").mkdir()
    for place in (tmp_path, tmp_path / "s"):
        (place / ".ddpm_fast-0123456789abcdef.tmp").write_text("half of a picture")
    for out in ("s", "s.npz"):
        assert run("sample", "--model", small, "--n", 1, *BASE, "--out", tmp_path / out).exit_code == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_record_says_how_the_images_were_drawn(small, tmp_path):
    run("sample", "--model", small, "--n", 1, *BASE, "--seed", 5, "--out", tmp_path / "s")
    record = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert record["seed"] == 5 and record["sampler"] == "ddpm" and record["steps"] == str(STEPS)
    assert len(record["model"]) == 64
