"""What a run's folder says of the run: its options, its surroundings, and where its course goes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from support.acting import act_at, interrupt
from support.train_command import SMALL, command, meta, start, weights

import ddpm_fast as df
from ddpm_fast.commands.training.records import parse_logs, repository
from ddpm_fast.errors import InputError
from ddpm_fast.nn import EMA

pytestmark = pytest.mark.usefixtures("wide_terminal")


def starts(out):
    return json.loads((out / "environment.json").read_text())["starts"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_options_of_a_run_start_the_same_run_again(tmp_path, data):
    first, again = tmp_path / "first", tmp_path / "again"
    start(data, first, "--steps=3", "--flip", "--lr=3e-4", "--average-widths=0.05,0.1", "--held-out=2")
    options = yaml.safe_load((first / "config.yaml").read_text())
    assert (options["lr"], options["flip"], options["steps"], options["out"]) == (3e-4, True, 3, str(first))
    assert options["data"] == str(data) and options["loss"] == "simple" and "resume" not in options
    command("--config", first / "config.yaml", "--out", again)
    assert same(weights(first), weights(again)) and meta(again)["arguments"]["lr"] == 3e-4
    told = command("--config", first / "config.yaml", status=2).stderr
    assert "holds a run already" in told


def test_a_run_goes_on_by_its_own_options_and_refuses_others(tmp_path, data):
    out = tmp_path / "out"
    start(data, out, "--steps=2")
    command("--config", out, "--resume", "--steps=4")
    assert meta(out)["step"] == 4
    assert yaml.safe_load((out / "config.yaml").read_text())["steps"] == 4
    other = tmp_path / "other.yaml"
    other.write_text(f"out: {out}\nlr: 0.5\nsteps: 6\n")
    told = command("--config", other, "--resume", status=2).stderr
    assert "--lr 0.5 differs" in told and f"lr in {other}" in told
    command("--config", other, "--resume", "--change")
    assert meta(out)["step"] == 6 and meta(out)["arguments"]["lr"] == 0.5


def test_each_start_of_a_run_tells_of_its_surroundings(tmp_path, data):
    out = tmp_path / "out"
    start(data, out, "--steps=2")
    command("--out", out, "--resume", "--steps=3")
    first, second = starts(out)
    assert (first["step"], second["step"]) == (0, 2)
    assert first["versions"]["torch"] == torch.__version__ and first["versions"]["ddpm_fast"] == df.__version__
    assert first["machine"]["threads"] == torch.get_num_threads() and first["command"] == sys.orig_argv


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"starts": 3}', b"[" * 10**5], ids=len)
def test_a_damaged_file_of_the_surroundings_is_replaced(tmp_path, data, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "environment.json").write_bytes(content)
    start(data, out, "--steps=1")
    assert len(starts(out)) == 1


def test_the_commit_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert repository() is None

    def git(*arguments):
        name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *name, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert repository() is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "first")
    assert repository() == {"commit": git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "a").write_text("2")
    assert repository()["changed"] is True
    monkeypatch.setenv("PATH", "")
    assert repository() is None


def test_a_run_that_did_nothing_leaves_nothing_and_one_that_stops_leaves_its_options(tmp_path, data, monkeypatch):
    with monkeypatch.context() as patch:
        act_at(patch, df.UNet, "forward", 1, interrupt())
        start(data, tmp_path / "out", "--steps=9", status=143)
    assert not (tmp_path / "out").exists()
    act_at(monkeypatch, EMA, "update", 2, interrupt())
    start(data, tmp_path / "out", "--steps=9", status=143)
    assert {"config.yaml", "environment.json", "log.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_file_of_the_user_in_the_folder_is_kept(tmp_path, data):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("mine: 1\n")
    told = start(data, out, "--steps=1").stdout
    assert "config.yaml is not written, and the training goes on" in told
    assert (out / "config.yaml").read_text() == "mine: 1\n"


def test_curves_are_written_where_they_are_asked_for(tmp_path, data):
    start(data, tmp_path / "out", "--steps=1", "--log=")
    assert not (tmp_path / "out" / "curves").exists() and (tmp_path / "out" / "log.csv").exists()
    assert parse_logs(" tensorboard,tensorboard ") == ("tensorboard",) and parse_logs("") == ()
    with pytest.raises(InputError, match="expected tensorboard or wandb"):
        parse_logs("tensorboard,mlflow")
    told = start(data, tmp_path / "other", "--steps=1", "--log=csv", status=2).stderr
    assert "--log is 'csv'" in told and not (tmp_path / "other").exists()


def test_the_options_of_a_run_are_those_of_small_runs_too(tmp_path, data):
    """Every option of the command is written, or has no value: so a later default changes nothing."""
    start(data, tmp_path / "out", "--steps=1")
    options = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    given = {option.partition("=")[0].removeprefix("--") for option in SMALL}
    assert given <= options.keys() and len(options) > 45
    stored = {name.replace("_", "-"): value for name, value in meta(tmp_path / "out")["arguments"].items()}
    assert all(np.array_equal(stored[name], value) for name, value in options.items())
