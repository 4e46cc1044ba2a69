"""Several processes train as one: the same bits, one set of files, one voice, and one end for all of them."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.together import ROOTS, SECONDS, Together, nothing, wait_for_step, wait_until
from support.train_command import SMALL, meta, pictures, weights

from ddpm_fast.files import checkpoint
from ddpm_fast.files.averages import saved_averages
from ddpm_fast.loops.training import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "data", ["cat", "dog"])


def options(data, out, *more):
    plain = ["--classes", "--flip", "--dropout=0.3", "--average-widths=0.05,0.1", "--average-every=5"]
    return [f"--data={data}", f"--out={out}", *SMALL, *plain, *more]


def run(folder, *arguments, ranks=2, befores=None):
    return Together(folder, *arguments, befores=befores or (nothing,) * ranks).wait()


@pytest.fixture(scope="module")
def two(tmp_path_factory, data):
    """A run of ten steps on two ranks: its folder, and how it ended."""
    folder = tmp_path_factory.mktemp("two")
    return folder / "out", run(folder, *options(data, folder / "out", "--steps=10", "--sample-every=10"))


@pytest.fixture(scope="module")
def one(tmp_path_factory, data):
    """The same on one rank, in as many micro-batches, and then ten steps more: the folder of each."""
    folder = tmp_path_factory.mktemp("one")
    more = ["--steps=20", "--save-every=10", "--sample-every=10", "--micro-batch=2"]
    assert run(folder, *options(data, folder / "out", *more), ranks=1).statuses == [0]
    return folder / "out"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_ranks_train_what_one_does_and_one_of_them_speaks_and_writes(two, one):
    out, ended = two
    assert ended.statuses == [0, 0] and ended.said[1] == ""
    assert ended.said[0].count("step 10/10") == ended.said[0].count("Done") == 1
    names = {path.name for path in out.iterdir()}
    told = {"config.yaml", "curves", "environment.json", "log.csv"}
    assert names == told | {"averages", "model.safetensors", "samples-00000010.png", "step-00000010.safetensors"}
    assert {saved.profile for saved in saved_averages(out)} == {(5, 0.05), (5, 0.1), (10, 0.05), (10, 0.1)}
    tensors, said = checkpoint.read_training(out / "step-00000010.safetensors")
    expected, expected_said = checkpoint.read_training(one / "step-00000010.safetensors")
    assert same(tensors, expected)
    assert said["machine"]["ranks"] == 2 and said["examples"] == expected_said["examples"]
    grids = [np.array(Image.open(folder / "samples-00000010.png")).astype(int) for folder in (out, one)]
    assert abs(grids[0] - grids[1]).max() <= 1, "beyond the rounding to 256 levels"


def test_a_run_goes_on_with_fewer_ranks_and_is_the_uninterrupted_one(tmp_path, two, one):
    ended = run(tmp_path, f"--out={two[0]}", "--resume", "--steps=20", "--micro-batch=2", ranks=1)
    assert ended.statuses == [0] and "Resuming at step 10" in ended.said[0]
    assert "bits" not in ended.said[0], "two micro-batches add up to the same, whoever has computed them"
    assert same(weights(two[0]), weights(one))
    more = run(tmp_path, f"--out={two[0]}", "--resume", "--steps=21", "--micro-batch=1", ranks=2)
    assert "on 1 ranks and in micro-batches of 2 until here, and goes on on 2 ranks" in more.said[0]
    assert more.statuses == [0, 0] and meta(two[0])["step"] == 21


@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, [1]), (signal.SIGINT, [0, 1])], ids=["to one", "to all"])
def test_a_signal_stops_all_at_the_same_step(tmp_path, data, number, to):
    together = Together(tmp_path, *options(data, tmp_path / "out", "--steps=999999", "--save-every=5"))
    wait_for_step(tmp_path / "out", 5)
    together.signal(number, *to)
    ended = together.wait()
    step = meta(tmp_path / "out")["step"]
    assert ended.statuses == [128 + number] * 2 and ended.said[1] == ""
    assert ended.said[0].count(f"Stopped at step {step}, saved") == 1
    asked = f"Rank 1 was asked to stop ({signal.Signals(number).name})"
    assert ended.said[0].count(asked if to == [1] else "SIGINT: saving, then stopping") == 1
    assert checkpoint.load_model(tmp_path / "out").config["training"]["steps"] == step


def test_a_loss_that_is_not_finite_stops_all_and_is_told_once(tmp_path, data):
    wild = ["--lr=1e18", "--warmup=400", "--grad-clip=1e30", "--save-every=1", "--steps=30"]
    ended = run(tmp_path, *options(data, tmp_path / "out", *wild))
    assert ended.statuses == [1, 1] and ended.said[1] == ""
    assert ended.said[0].count("gave the loss") == 1 and ended.said[0].count("Stopped") == 1


def fill_the_disk(out):
    """From the first state on there is no room."""
    plain = os.fsync

    def fsync(descriptor):
        if list(out.glob("step-*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(descriptor)

    os.fsync = fsync


def test_a_full_disk_stops_all(tmp_path, data):
    out = tmp_path / "out"
    arguments = options(data, out, "--steps=999999", "--save-every=2")
    ended = run(tmp_path, *arguments, befores=(partial(fill_the_disk, out), nothing))
    assert ended.statuses == [1, 1] and ended.said[1] == ""
    assert "so the training stops" in ended.said[0] and meta(tmp_path / "out")["step"] == 2


def drift():
    """This process computes something else than the others."""
    plain = Trainer.snapshot

    def snapshot(trainer, arguments):
        if trainer.step == 4:
            with torch.no_grad():
                next(trainer.model.parameters()).add_(1e-6)
        return plain(trainer, arguments)

    Trainer.snapshot = snapshot


def test_a_rank_with_other_weights_is_found_at_the_next_save(tmp_path, data):
    arguments = options(data, tmp_path / "out", "--steps=999999", "--save-every=2")
    ended = run(tmp_path, *arguments, befores=(nothing, drift))
    assert ended.statuses == [1, 1] and ended.said[1] == ""
    assert ended.said[0].count("the state of step 4 differs between the ranks") == 1
    assert meta(tmp_path / "out")["step"] == 2


def test_what_is_wrong_in_one_or_in_all_is_told_once_and_ends_all(tmp_path, data, two):
    out = tmp_path / "out"
    more = pictures(tmp_path / "more", ["cat", "dog"])
    pictures(more, ["cat"], first=100)
    wrong = {
        "holds a run already": options(data, two[0]),
        "batch_size is 5, which 2 processes cannot share equally: give 4 or 6": options(data, out, "--batch-size=5"),
        "rank 1: ": options([data, tmp_path / "nowhere"], out),
    }
    wrong["rank 1: "][0] = [f"--data={data}", f"--data={tmp_path / 'nowhere'}"]
    differing = options(data, out)
    differing[0] = [f"--data={data}", f"--data={more}"]
    wrong["rank 1 has 12 images instead of 8, which rank 0 has"] = differing
    for message, arguments in wrong.items():
        ended = run(tmp_path, *arguments)
        assert ended.statuses == [2, 2] and ended.said[1] == "", ended
        assert ended.said[0].count("Error") == 1 and message in ended.said[0], ended
    assert not out.exists()


def test_a_rank_that_is_killed_costs_the_steps_since_the_last_save_and_torchrun_stops_as_one(tmp_path, data):
    """Under the real torchrun, which starts all ranks again when one has died, and hands on signals."""
    out, log = tmp_path / "out", tmp_path / "log"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*launcher, "-m", "ddpm_fast.train", *options(data, out, "--steps=999999", "--save-every=5")]
    environment = os.environ | {"PYTHONPATH": str(ROOTS[1]), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    with log.open("w") as file:
        torchrun = subprocess.Popen([*command, "--auto-resume"], env=environment, stdout=file, stderr=file)
    try:
        wait_for_step(out, 5)
        os.kill(rank_of(torchrun.pid, 1), signal.SIGKILL)
        wait_until(lambda: "Resuming at step" in log.read_text())
        resumed = int(re.search(r"Resuming at step (\d+)", log.read_text())[1])
        wait_for_step(out, resumed + 5)
        torchrun.terminate()
        torchrun.wait(SECONDS)
    finally:
        torchrun.kill()
    said, step = log.read_text(), meta(out)["step"]
    assert resumed % 5 == 0 and step > resumed, "it went on from a save"
    since = said.partition("Resuming at step")[2]  # before it, torchrun may have ended the other rank with SIGTERM
    assert since.count("SIGTERM: saving, then stopping") == since.count(f"Stopped at step {step}, saved") == 1, said
    assert said.count("Stopped at step") == 1, said
    assert said.count("another rank has ended") <= 1, "a rank said so, or was ended by torchrun first"
    assert torchrun.returncode != 0


def rank_of(launcher, number):
    """The process of a rank, by the environment that the launcher gave it."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"\0RANK={number}\0" in "\0" + (process / "environ").read_text():
                return int(process.name)
    raise AssertionError(f"no rank {number}")
