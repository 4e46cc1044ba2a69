"""`--log wandb`: without a network, without questions, and one run there for one training run."""

import builtins
import json
from importlib.util import find_spec

import numpy as np
import pytest
from support.train_command import command, start

from ddpm_fast.commands.training import weights_and_biases
from ddpm_fast.commands.training.weights_and_biases import WandbRun
from ddpm_fast.errors import InputError
from ddpm_fast.loops.metrics import Look

pytestmark = pytest.mark.usefixtures("wide_terminal")


class Library:
    """What of the library is used, with what was done in `done`."""

    Error = RuntimeError

    def __init__(self, mode="online", logged_in=True, fails=""):
        self.done, self.fails, self.logged_in = [], fails, logged_in
        self.settings = type("settings", (), {"mode": mode, "project": None})()
        self.url, self.dir = None, "somewhere"

    def setup(self):
        return self

    def login(self, prompt):
        assert prompt is False, "nobody sits at the terminal"
        return self.logged_in

    def Settings(self, **settings):
        assert settings["silent"] and settings["console"] == "off"
        return settings

    def Image(self, array):
        return array.shape

    def init(self, **options):
        self._act("init", options)
        return self

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, values):
        self._act("log", values)

    def finish(self):
        self._act("finish", None)

    def _act(self, name, values):
        if self.fails == name:
            raise self.Error("the network is down\x1b[31m")
        self.done.append((name, values))


@pytest.fixture
def library(monkeypatch):
    def install(**options):
        made = Library(**options)
        monkeypatch.setattr(weights_and_biases, "library", lambda: made)
        return made

    return install


def test_the_course_of_a_run_and_its_options_arrive(tmp_path, library):
    made = library()
    run = WandbRun(tmp_path, {"lr": 0.5, "out": "x"}, resumes=False)
    run.look(Look(50, 50, 0.25, 1.5, quarters=(0.1, float("nan"), 0.3, 0.4)), 12.5, 0.0)
    run.grid(np.zeros((8, 6, 1), np.uint8), 50)
    run.close()
    (_, options), (_, point), (_, grid), (last, _) = made.done
    assert options["config"]["lr"] == 0.5 and options["dir"] == str(tmp_path) and options["name"] == tmp_path.name
    assert point["training step"] == 50 and point["loss"] == 0.25 and "loss by quarter of t/q1" not in point
    assert grid == {"training step": 50, "samples": (8, 6)} and last == "finish"


def test_a_training_run_has_one_run_there(tmp_path, library):
    made = library()
    for resumes in (False, True, True, False):
        WandbRun(tmp_path, {}, resumes)
    first, second, third, new = [options["id"] for _, options in made.done]
    assert first == second == third != new
    assert all(options["resume"] == "allow" for _, options in made.done)


@pytest.mark.parametrize("content", ["", "[]", '{"id": 3}', '{"id": "../x"}', '{"id": "' + "a" * 5000 + '"}'])
def test_a_damaged_id_gives_a_new_run(tmp_path, library, content):
    made = library()
    (tmp_path / "wandb.json").write_text(content)
    WandbRun(tmp_path, {}, resumes=True)
    said = json.loads((tmp_path / "wandb.json").read_text())
    assert said["id"] == made.done[0][1]["id"] and len(said["id"]) == 8


def test_nobody_is_asked_to_log_in(tmp_path, library):
    library(logged_in=False)
    with pytest.raises(InputError, match=r"nobody is logged in.*WANDB_MODE=offline"):
        WandbRun(tmp_path, {}, resumes=False)
    library(logged_in=False, mode="offline")
    WandbRun(tmp_path, {}, resumes=False)


NEEDED = pytest.mark.skipif(
    find_spec("wandb") is None, reason="the library of Weights & Biases is missing (extra wandb)"
)


@NEEDED
def test_what_fails_at_the_start_ends_the_run_before_its_first_step(tmp_path, data, library):
    library(fails="init")
    told = start(data, tmp_path / "out", "--steps=1", "--log=wandb", status=2).stderr
    assert r"could not be started (the network is down\x1b[31m)" in told and not (tmp_path / "out").exists()


@NEEDED
def test_what_fails_later_is_said_once_and_ends_nothing(tmp_path, data, library):
    library(fails="log")
    told = start(data, tmp_path / "out", "--steps=3", "--log=tensorboard,wandb").stdout
    assert told.count("the run at Weights & Biases could not be written, and the training goes on") == 1
    assert "Done" in told and (tmp_path / "out" / "curves").exists()


def test_a_library_that_is_missing_is_named_before_anything_happens(tmp_path, data, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    told = start(data, tmp_path / "out", "--steps=1", "--log=wandb", status=2).stderr
    assert "pip install 'ddpm-fast[wandb]'" in told and not (tmp_path / "out").exists()


@NEEDED
def test_the_library_itself_offline(tmp_path, data, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": "", "WANDB_CONFIG_DIR": str(tmp_path / "c")}.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    told = start(data, out, "--steps=2", "--log=wandb")
    identity = json.loads((out / "wandb.json").read_text())["id"]
    assert "Weights & Biases: " in told.stdout and len(list((out / "wandb").glob(f"offline-run-*-{identity}"))) == 1
    command("--out", out, "--resume", "--steps=3")
    runs = list((out / "wandb").glob(f"offline-run-*-{identity}"))
    assert json.loads((out / "wandb.json").read_text())["id"] == identity and len(runs) in (1, 2)  # of one second
    assert all(any(path.stat().st_size for path in run.glob("*.wandb")) for run in runs)
