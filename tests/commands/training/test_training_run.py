"""A training stops within a step of a signal, wherever it is, loses nothing, and outlives disks that are full, folders
that are deleted and terminals that are closed."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.acting import act_at, interrupt
from support.train_command import SMALL, command, meta, start, weights

from ddpm_fast.commands.precision import choose_dtype
from ddpm_fast.commands.training import log as training_log
from ddpm_fast.commands.training.log import TrainingLog, duration
from ddpm_fast.data import Dataset, reading
from ddpm_fast.files import checkpoint
from ddpm_fast.files.lock import FolderLock
from ddpm_fast.loops.metrics import Look
from ddpm_fast.loops.sampling import sample
from ddpm_fast.loops.state import BatchState
from ddpm_fast.loops.training import Trainer
from ddpm_fast.nn import EMA, UNet
from ddpm_fast.ops import norm as norm_ops
from ddpm_fast.pictures import images

CPU = torch.device("cpu")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


pytestmark = pytest.mark.usefixtures("wide_terminal")


# Signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_said_at_once_and_obeyed_after_the_update(tmp_path, data, monkeypatch, capfd, number):
    act_at(monkeypatch, EMA, "update", 3, interrupt(number))
    told = start(data, tmp_path / "out", "--steps=9", status=128 + number).stdout
    assert "Stopped at step 3, saved" in told and meta(tmp_path / "out")["step"] == 3
    assert f"{number.name}: saving, then stopping" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("owner", "name", "first"),
    [
        (Dataset, "batch", None),
        (UNet, "forward", None),
        (norm_ops, "kernel_for", "group_norm_backward"),
        (torch.nn.utils, "clip_grad_norm_", None),
    ],
    ids=["loading the batch", "before the network", "within the backward pass", "after the backward pass"],
)
def test_a_step_that_is_broken_off_leaves_no_trace(tmp_path, data, monkeypatch, owner, name, first):
    options = ["--steps=6", "--timesteps=2", "--variance=learned_range", "--timestep-sampling=loss_second_moment"]
    with monkeypatch.context() as patched:
        calls = act_at(patched, owner, name, None, None, first)
        start(data, tmp_path / "straight", *options)
    with monkeypatch.context() as patched:
        act_at(patched, owner, name, 2 * len(calls) // 6 + 1, interrupt(), first)
        told = start(data, tmp_path / "out", *options, status=143).stdout
    step = meta(tmp_path / "out")["step"]
    assert step == 2 and f"Stopped at step {step}, saved" in told
    command("--out", tmp_path / "out", "--resume")
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "out")
    assert a["timesteps.counts"].sum() == 24 and all(torch.equal(a[name], b[name]) for name in a)


def test_a_signal_in_a_grid_drops_it_and_saves(tmp_path, data, monkeypatch):
    rows = act_at(monkeypatch, BatchState, "advance", 5, interrupt())
    told = start(data, tmp_path / "out", "--steps=9", "--sample-every=2", status=143).stdout
    assert len(rows) == 5, "the grid went on"
    assert "Stopped at step 2, saved" in told and meta(tmp_path / "out")["step"] == 2
    assert not list((tmp_path / "out").glob("samples-*"))
    command("--out", tmp_path / "out", "--resume", "--steps=4")
    assert [path.name for path in (tmp_path / "out").glob("samples-*")] == ["samples-00000004.png"]


def test_a_signal_while_the_images_are_loaded_stops_there(tmp_path, data, monkeypatch):
    loaded = act_at(monkeypatch, reading, "open_picture", 3, interrupt())
    told = start(data, tmp_path / "out", status=143).stdout
    assert len(loaded) <= 8, "the pictures were decoded after their headers had been read"
    assert "Stopped before the first step" in told and not (tmp_path / "out").exists()


def test_a_signal_in_the_first_step_leaves_nothing_and_says_so(tmp_path, data, monkeypatch):
    act_at(monkeypatch, UNet, "forward", 1, interrupt())
    told = start(data, tmp_path / "out", "--steps=9", status=143).stdout
    assert "Stopped before the first step" in told and not (tmp_path / "out").exists()


def test_a_signal_while_a_state_is_read_does_not_take_it_for_damaged(tmp_path, data, monkeypatch):
    out = tmp_path / "out"
    start(data, out, "--steps=2")
    act_at(monkeypatch, checkpoint, "read_training", 1, interrupt())
    told = command("--out", out, "--resume", "--steps=4", status=143).stdout
    assert "Stopped before" in told and meta(out)["step"] == 2 and not list(out.glob("*.damaged"))


def test_a_signal_in_the_last_grid_loses_nothing(tmp_path, data, monkeypatch):
    act_at(monkeypatch, BatchState, "advance", 2, interrupt())
    start(data, tmp_path / "out", "--steps=2", "--sample-every=2", status=143)
    assert "Done" in command("--out", tmp_path / "out", "--resume").stdout


def spawn(data, out, **options):
    command_line = [sys.executable, "-m", "ddpm_fast.train", f"--data={data}", f"--out={out}", *SMALL]
    return subprocess.Popen([*command_line, "--steps=999999", "--save-every=5"], **options)


def wait_for_a_state(out):
    deadline = time.monotonic() + 180
    while checkpoint.latest_checkpoint(out) is None and time.monotonic() < deadline:
        time.sleep(0.05)


def test_processes_stop_at_signals_and_at_a_closed_terminal(tmp_path, data):
    """What is not the same in one process: the exit status, and a terminal and a pipe that are gone."""
    terminal, their_terminal = os.openpty()
    pipe, their_pipe = os.pipe()
    running = {
        "SIGTERM": spawn(data, tmp_path / "SIGTERM", stdout=subprocess.DEVNULL),
        "terminal": spawn(
            data,
            tmp_path / "terminal",
            stdin=their_terminal,
            stdout=their_terminal,
            stderr=their_terminal,
            preexec_fn=lambda: os.login_tty(their_terminal),
        ),
        "pipe": spawn(data, tmp_path / "pipe", stdout=their_pipe, stderr=their_pipe),
    }
    os.close(their_terminal)
    os.close(their_pipe)
    drain = threading.Thread(target=read_all, args=[terminal], daemon=True)
    drain.start()
    try:
        for name in running:
            wait_for_a_state(tmp_path / name)
        running["SIGTERM"].terminate()
        os.close(pipe)  # as when Ctrl-C ends the `tee` behind it first
        running["pipe"].send_signal(signal.SIGINT)
        os.close(terminal)  # what closing the window does: the system sends SIGHUP
        statuses = {name: process.wait(60) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    assert statuses == {"SIGTERM": 143, "terminal": 129, "pipe": 130}
    for name in running:
        step = meta(tmp_path / name)["step"]
        assert checkpoint.load_model(tmp_path / name / "model.safetensors").config["training"]["steps"] == step


def read_all(descriptor):
    try:
        while os.read(descriptor, 10_000):
            pass
    except OSError:
        return


# Saving


def test_a_state_that_cannot_be_saved_is_saved_at_the_next_occasion(tmp_path, data, monkeypatch):
    out = tmp_path / "out"
    plain = start(data, tmp_path / "plain", "--steps=7")
    assert "could not be saved" not in plain.stdout

    def block(*_):  # something that is not a file stands where the state is to be written
        (out / "step-00000004.safetensors").mkdir()

    act_at(monkeypatch, Trainer, "train_step", 3, block)
    told = start(data, out, "--steps=7", "--save-every=2").stdout
    assert "the state of step 4 could not be saved" in told
    assert (
        f"The training goes on and will be saved at the next occasion; until then the last saved state is {out}" in told
    )
    a, b = weights(out), weights(tmp_path / "plain")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stopped", [False, True], ids=["finished", "stopped"])
def test_a_last_state_that_cannot_be_saved_is_an_error(tmp_path, data, monkeypatch, stopped):
    out = tmp_path / "out"

    def block(*_):
        (out / "step-00000003.safetensors").mkdir()
        if stopped:
            signal.raise_signal(signal.SIGTERM)

    act_at(monkeypatch, EMA, "update", 3, block)
    told = start(data, out, f"--steps={9 if stopped else 3}", "--save-every=2", status=1).stdout
    assert "Stopped at step 3, which could not be saved." in told
    assert f"The last saved state is {out / 'step-00000002.safetensors'}" in told and "Done" not in told
    # Of a run that is over, the model is written all the same.
    steps = checkpoint.load_model(out / "model.safetensors").config["training"]["steps"]
    assert steps == (2 if stopped else 3) and ("the finished model" in told) != stopped
    (out / "step-00000003.safetensors").rmdir()
    assert "Resuming at step 2" in command("--out", out, "--resume").stdout


def delete(folder):
    """Delete a folder in which the thread that writes the curves may make a file at this moment."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def test_a_folder_that_is_deleted_is_made_again(tmp_path, data, monkeypatch, capfd):
    out = tmp_path / "out"
    act_at(monkeypatch, Trainer, "train_step", 4, lambda *_: delete(out))
    told = start(data, out, "--steps=6", "--save-every=2", "--sample-every=5").stdout
    assert "was deleted or moved" in told and meta(out)["step"] == 6
    assert checkpoint.load_model(out / "model.safetensors").config["training"]["steps"] == 6
    assert (out / "samples-00000005.png").exists() and list((out / "curves").iterdir())
    assert not (out / ".ddpm_fast.lock").exists() and "Traceback" not in capfd.readouterr().err


def test_a_folder_that_somebody_else_took_meanwhile_is_left_to_them(tmp_path, data, monkeypatch):
    out, theirs = tmp_path / "out", []

    def take(*_):
        delete(out)
        out.mkdir()
        theirs.append(FolderLock(out))
        theirs[0].acquire()

    act_at(monkeypatch, Trainer, "train_step", 2, take)
    told = start(data, out, "--steps=2", status=1).stdout
    theirs[0].release()
    assert "another process" in told and checkpoint.latest_checkpoint(out) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_grids_of_a_run_are_drawn_from_one_graph(tmp_path, data, recording, precision):
    options = ["--classes", "--steps=6", "--sample-every=3", f"--precision={precision}"]
    start(data, tmp_path / "out", *options)
    assert recording.captures == 2, "one of the training step, one of the grids' rows"
    assert recording.replays == (6 - 2) + (20 - 2) + 20
    # Each grid shows the averaged weights of its step, as `python -m ddpm_fast.sample` would.
    loaded = checkpoint.load_model(tmp_path / "out" / "model.safetensors", dtype=choose_dtype(precision, CPU))
    labels = [i % 2 for i in range(64)]
    x = sample(loaded.model, loaded.diffusion, 64, steps=20, labels=labels, cuda_graph=False)
    expected = images.make_grid(images.to_uint8(x), columns=2).astype(int)
    first, last = (np.array(Image.open(path)).astype(int) for path in sorted((tmp_path / "out").glob("samples-*.png")))
    assert abs(last - expected).max() <= 1 and abs(last - expected).mean() < 0.005  # rounding to 256 levels
    assert abs(first - expected).mean() > 0.03


def test_a_grid_for_which_there_is_no_memory_does_not_end_a_training(tmp_path, data, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        act_at(patched, BatchState, "advance", 2, fail)
        told = start(data, tmp_path / "out", "--steps=4", "--sample-every=2").stdout
    assert "samples-00000002.png could not be written, and the training goes on: CUDA out of memory" in told
    assert [path.name for path in (tmp_path / "out").glob("samples-*")] == ["samples-00000004.png"]


def test_curves_and_grids_that_cannot_be_written_do_not_end_a_training(tmp_path, data, monkeypatch, capfd):
    out = tmp_path / "out"

    def block(*_):
        delete(out / "curves")
        (out / "curves").write_text("")
        (out / "samples-00000004.png").mkdir()

    act_at(monkeypatch, Trainer, "train_step", 3, block)
    told = start(data, out, "--steps=6", "--sample-every=4").stdout
    assert told.count("curves could not be written") == told.count("the sample grid") == 1
    assert meta(out)["step"] == 6 and "Traceback" not in capfd.readouterr().err


# The log


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def lines(monkeypatch):
    """The lines that a log prints; the log's clock is in lines.clock."""
    printed = SimpleNamespace(clock=Clock(), text=[])
    monkeypatch.setattr(training_log, "time", printed.clock)
    monkeypatch.setattr(training_log, "say", printed.text.append)
    return printed


def run_log(lines, seconds, steps, run, pause=0.0, waiting=0.0):
    """Log the first `run` of `steps` training steps that take so many seconds each, as TrainingRun does."""
    trainer = SimpleNamespace(step=0, config=SimpleNamespace(batch_size=64), waited=7.0)
    with TrainingLog(trainer, [], steps) as log:
        for _ in range(run):
            trainer.step += 1
            trainer.waited += waiting
            lines.clock.now += seconds + (3 * seconds if trainer.step == 1 else 0)  # the first one warms up
            if log.is_early() or log.is_due() or trainer.step % 50 == 0:
                log.report([Look(trainer.step, 1, 0.5, 1.0)])
            with log.paused():
                lines.clock.now += pause


def test_slow_steps_are_estimated_after_the_second(lines):
    run_log(lines, seconds=6.5, steps=10_000, run=3)
    assert [line.split("  ")[0] for line in lines.text if line.startswith("step")] == ["step 1/10000", "step 2/10000"]
    (estimate,) = [line for line in lines.text if line.startswith("About")]
    assert estimate.startswith("About 18 h for 10,000 steps, at 6.5 s a step")


def test_the_estimate_leaves_the_pauses_out(lines):
    run_log(lines, seconds=6.0, steps=1000, run=3, pause=60.0)
    assert any(line.startswith("About 1.7 h for 1,000 steps, at 6 s a step") for line in lines.text)


def test_lines_come_early_and_then_in_time(lines):
    run_log(lines, seconds=1.0, steps=1000, run=140)
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines.text if line.startswith("step")]
    assert steps[:6] == [1, 2, 5, 10, 20, 50] and steps[6:] == [81, 112]


def test_waiting_for_images_is_said_where_it_takes_a_twentieth_of_the_time(lines):
    run_log(lines, seconds=2.0, steps=1000, run=2, waiting=0.5)
    assert [line.split(" images/s")[1].split("  ")[0] for line in lines.text if line.startswith("step")] == [
        "",  # the first images are always waited for
        ", 25% of the time waiting for them",
    ]
    lines.text.clear()
    run_log(lines, seconds=2.0, steps=1000, run=2, waiting=0.09)
    assert not any("waiting" in line for line in lines.text)


def test_a_short_run_is_not_estimated(lines):
    run_log(lines, seconds=0.1, steps=100, run=100)
    assert not any(line.startswith("About") for line in lines.text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.4, "5 s"), (90, "1.5 min"), (1800, "30 min"), (6 * 3600, "6.0 h"), (65_000, "18 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
