"""A training goes on while a state is written, which holds what was reached when it was due; and what goes wrong with
it is told in time."""

import errno
import os
import signal
import threading
import time

import pytest
import torch
from support.train_command import command, meta, start, weights

from ddpm_fast.commands import stopping
from ddpm_fast.commands.training import saving
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.files.lock import FolderLock
from ddpm_fast.loops.snapshot import Snapshot
from ddpm_fast.loops.training import Trainer

SECONDS = 60  # until a test that would hang fails


pytestmark = pytest.mark.usefixtures("wide_terminal")


@pytest.fixture
def write(monkeypatch):
    """write(act): before the state of a step is written, act(step) is called, in the thread that writes."""
    plain = checkpoint.save_training

    def patch(act):
        monkeypatch.setattr(
            checkpoint, "save_training", lambda path, tensors, said: (act(said["step"]), plain(path, tensors, said))
        )

    return patch


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_training_goes_on_while_a_state_is_written(tmp_path, data, monkeypatch, write):
    out, on_disk = tmp_path / "out", []
    start(data, tmp_path / "until 2", "--steps=2")
    gone_on = threading.Event()

    def hold(step):
        if step == 2:
            assert gone_on.wait(SECONDS), "the training waited for the disk"
        else:
            on_disk.append(weights(out))

    def train_step(self, *arguments):
        result = step_of(self, *arguments)
        if self.step == 4:
            gone_on.set()
        return result

    step_of = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", train_step)
    write(hold)
    start(data, out, "--steps=5", "--save-every=2")
    assert equal(on_disk[0], weights(tmp_path / "until 2")), "it is not what had been reached at step 2"
    steps = [meta(out)["step"], checkpoint.load_model(out / "model.safetensors").config["training"]["steps"]]
    assert steps == [5, 5] and len(list(out.glob("step-*"))) == 2


def test_a_save_waits_for_the_one_before(tmp_path, data, write):
    steps, at_once = [], [0]

    def slow(step):
        steps.append(step)
        at_once.append(at_once.pop() + 1)
        assert at_once == [1]
        time.sleep(0.05)
        at_once[0] -= 1

    write(slow)
    start(data, tmp_path / "out", "--steps=5", "--save-every=1")
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_state_is_written_lets_it_finish(tmp_path, data, write, number):
    steps = []

    def interrupt(step):
        steps.append(step)
        if step == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    write(interrupt)
    told = start(data, tmp_path / "out", "--steps=999999", "--save-every=2", status=128 + number).stdout
    step = meta(tmp_path / "out")["step"]
    assert steps == [2, step] if step > 2 else steps == [2]
    assert f"Stopped at step {step}, saved" in told
    assert checkpoint.load_model(tmp_path / "out" / "model.safetensors").config["training"]["steps"] == step


def test_a_second_ctrl_c_waits_for_no_disk_and_names_the_last_state(tmp_path, data, monkeypatch, write, capfd):
    out, said, released, threads = tmp_path / "out", threading.Event(), threading.Event(), []
    say = stopping._say
    monkeypatch.setattr(stopping, "_say", lambda text: (say(text), said.set()))

    def twice(step):
        if step == 4:
            threads.append(threading.current_thread())
            os.kill(os.getpid(), signal.SIGINT)
            assert said.wait(SECONDS)
            os.kill(os.getpid(), signal.SIGINT)
            assert released.wait(SECONDS), "the command waited for the disk"

    write(twice)
    start(data, out, "--steps=999999", "--save-every=2", status=130)
    assert f"aborted; the last saved state is {out / 'step-00000002.safetensors'}" in capfd.readouterr().err
    with pytest.raises(InputError, match="another process"):  # the thread still writes there
        FolderLock(out).acquire()
    released.set()
    threads[0].join(SECONDS)
    assert meta(out)["step"] == 4


@pytest.mark.parametrize(
    ("number", "after", "failed", "kept"),
    [(errno.ENOSPC, "model", "state of step 4", 2), (errno.EDQUOT, "step-00000004", "model of step 4", 4)],
)
def test_a_full_disk_stops_the_run_with_the_last_good_state(tmp_path, data, monkeypatch, number, after, failed, kept):
    out, last = tmp_path / "out", tmp_path / "out" / f"step-{kept:08d}.safetensors"
    plain = os.fsync

    def fsync(descriptor):
        if (out / f"{after}.safetensors").exists():
            raise OSError(number, os.strerror(number))
        plain(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        told = start(data, out, "--steps=999999", "--save-every=2", status=1).stdout
    assert f"the {failed} could not be saved: cannot write {out}" in told and "so the training stops" in told
    assert f"{os.strerror(number)}; free some space" in told and f"The last saved state is {last}" in told
    assert checkpoint.latest_checkpoint(out) == last and not list(out.glob(".*"))
    assert f"Resuming at step {kept}" in command("--out", out, "--resume", "--steps=5").stdout


def test_what_nobody_expected_of_a_save_ends_the_command_where_it_began(tmp_path, data, write):
    def fail(step):
        raise ZeroDivisionError

    write(fail)
    with pytest.raises(ZeroDivisionError):
        start(data, tmp_path / "out", "--steps=999999", "--save-every=1")


@pytest.mark.parametrize("known", [True, False], ids=["known before", "found out"])
def test_without_memory_for_a_copy_the_training_waits_for_the_disk(tmp_path, data, monkeypatch, write, known):
    start(data, tmp_path / "usual", "--steps=4", "--save-every=2")
    threads = []

    def refuse(self):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    if known:
        monkeypatch.setattr(saving, "available_memory", lambda: 1000)
    else:
        monkeypatch.setattr(Snapshot, "copied", refuse)
    write(lambda step: threads.append(threading.current_thread()))
    told = start(data, tmp_path / "out", "--steps=4", "--save-every=2").stdout
    assert told.count("there is no memory for a copy of the training state") == 1
    assert threads == [threading.main_thread()] * 2
    assert equal(weights(tmp_path / "usual"), weights(tmp_path / "out"))
