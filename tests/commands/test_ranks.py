"""Several ranks draw and evaluate what one process does, bit for bit, and share the work as a launcher says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import run, save_small_model
from support.made_features import features_of, save_network

from ddpm_fast.commands import everywhere, precision
from ddpm_fast.commands.likelihood import finished_part
from ddpm_fast.commands.ranks import Ranks, ranks_of_environment
from ddpm_fast.data import open_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.loops.likelihood import BitsPerDim

BASE = ("--steps", 3, "--batch-size", 2)
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """environment(RANK=1, ...) sets the variables of a launcher, and no others."""

    def put(**variables):
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    put()
    return put


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model") / "small.safetensors", names=["1", "2", "hen & hare"])


RECORDS = ("samples.json", "config.yaml")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in RECORDS}


# What a launcher says


def test_ranks_are_read_as_torchrun_accelerate_and_srun_set_them(environment):
    assert ranks_of_environment() == Ranks(0, 1, 0)
    environment(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1)
    assert ranks_of_environment() == Ranks(5, 8, 1)
    environment(SLURM_PROCID=2, SLURM_STEP_NUM_TASKS=3, SLURM_LOCALID=0)
    assert ranks_of_environment() == Ranks(2, 3, 0)
    # torchrun in a task of srun: the ranks are torchrun's.
    environment(SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=2, RANK=3, WORLD_SIZE=4, LOCAL_RANK=1)
    assert ranks_of_environment() == Ranks(3, 4, 1)
    environment(SLURM_PROCID=0, SLURM_NTASKS=8)  # a batch script is one process, whatever it starts later
    assert ranks_of_environment() == Ranks(0, 1, 0)


@pytest.mark.parametrize(("rank", "world"), [("x", "2"), ("0", ""), ("2", "2"), ("-1", "2"), ("0", "1.5"), ("٣", "4")])
def test_variables_that_are_no_ranks_are_refused_by_name(environment, small, tmp_path, rank, world):
    environment(RANK=rank, WORLD_SIZE=world)
    with pytest.raises(InputError, match="start the command by torchrun"):
        ranks_of_environment()
    result = run("sample", "--model", small, "--out", tmp_path / "s")
    assert result.exit_code == 2 and "start the command by torchrun" in result.stderr


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_each_batch_is_for_exactly_one_rank(world):
    owners = [[rank for rank in range(world) if Ranks(rank, world).owns(batch)] for batch in range(20)]
    assert owners == [[batch % world] for batch in range(20)]


def test_each_rank_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    third = Ranks(rank=6, world_size=8, local_rank=2)
    assert third.device_name("auto") == third.device_name("cuda") == "cuda:2"
    assert third.device_name("cuda:1") == "cuda:1" and third.device_name("cpu") == "cpu"
    assert Ranks().device_name("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as srun --gpus-per-task=1 shows them
    assert third.device_name("auto") == "cuda:0"


# Sampling


@pytest.mark.parametrize("format", ["png", "npz"])
def test_ranks_draw_what_one_process_draws_and_only_the_first_one_speaks(environment, small, tmp_path, format):
    arguments = ("--model", small, "--n", 9, *BASE, "--format", format)
    assert run("sample", *arguments, "--out", tmp_path / "one").exit_code == 0
    seen = []
    for rank in (2, 1, 0):  # one after the other: the first rank is then the last to come, and has nobody to wait for
        environment(RANK=rank, WORLD_SIZE=3)
        result = run("sample", *arguments, "--out", tmp_path / "three")
        assert result.exit_code == 0 and not result.stderr and bool(result.stdout) is (rank == 0)
        seen.append({int(name[:6]) for name in contents(tmp_path / "three")})
    batches = [{4, 5}, {2, 3}, {0, 1, 6, 7}] if format == "png" else [{4}, {2, 8}, {0, 6}]
    if format == "png":
        batches[1] |= {8}
    assert [seen[0], seen[1] - seen[0], seen[2] - seen[1]] == batches
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert (tmp_path / "three/samples.json").read_bytes() == (tmp_path / "one/samples.json").read_bytes()
    assert "3 ranks" in result.stdout and result.stdout.count("Wrote") == 1


@pytest.mark.parametrize("format", ["png", "npz"])
def test_what_killed_ranks_leave_is_completed_by_any_number_of_ranks(environment, small, tmp_path, format):
    arguments = ("--model", small, "--n", 8, *BASE, "--format", format)
    run("sample", *arguments, "--out", tmp_path / "one")
    environment(RANK=1, WORLD_SIZE=2)  # rank 0 never came
    run("sample", *arguments, "--out", tmp_path / "s")
    (tmp_path / "s/.ddpm_fast-0123456789abcdef.tmp").write_text("half of a picture")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob(f"*.{format}")}
    assert before
    for rank in (2, 1, 0):
        environment(RANK=rank, WORLD_SIZE=3)
        result = run("sample", *arguments, "--out", tmp_path / "s")
    assert contents(tmp_path / "s") == contents(tmp_path / "one")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "finished images must be kept"
    environment()
    result = run("sample", *arguments, "--out", tmp_path / "s")
    assert "8 of 8 images are in" in result.stdout and "images/s" not in result.stdout


def test_a_folder_of_parts_is_evaluated_as_one_data_set(small, tmp_path):
    for out in (("s", "--format", "npz"), ("s.npz",)):
        run("sample", "--model", small, "--n", 7, *BASE, "--out", tmp_path / out[0], *out[1:])
    for name in ("s", "s.npz"):
        arguments = ("--model", small, "--data", tmp_path / name, "--steps", 2, "--out", tmp_path / f"{name}.json")
        assert run("evaluate", "nll", *arguments).exit_code == 0
    parts, one = (json.loads((tmp_path / name).read_text()) for name in ("s.json", "s.npz.json"))
    assert {**parts, "data": ""} == {**one, "data": ""} and parts["images"] == 7
    assert open_dataset(tmp_path / "s").label_names == ["1", "2", "hen & hare"]


def test_labels_are_part_of_what_a_folder_of_parts_was_drawn_with(small, tmp_path):
    arguments = ("--model", small, "--n", 2, *BASE, "--format", "npz", "--out", tmp_path / "s")
    run("sample", *arguments)
    result = run("sample", *arguments, "--labels", "hen & hare")
    assert result.exit_code == 2 and "labels [0, 1, 2] instead of [2]" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "s.npz", "--format", "npz"), "--format says what a folder holds"),
        (("--out", "s", "--format", "gif"), "--format is 'gif'; expected png or npz"),
    ],
)
def test_a_format_that_does_not_fit_is_refused(small, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run("sample", "--model", small, "--n", 2, *BASE, *arguments)
    assert result.exit_code == 2 and message in result.stderr and not list(tmp_path.iterdir())


def test_a_rank_with_other_settings_is_refused(environment, small, tmp_path):
    environment(RANK=1, WORLD_SIZE=2)
    run("sample", "--model", small, "--n", 4, *BASE, "--out", tmp_path / "s")
    environment(RANK=0, WORLD_SIZE=2)
    result = run("sample", "--model", small, "--n", 4, *BASE, "--seed", 1, "--out", tmp_path / "s")
    assert result.exit_code == 2 and "seed 0 instead of 1" in result.stderr
    environment(RANK=1, WORLD_SIZE=2)
    result = run("sample", "--model", small, "--n", 4, *BASE, "--seed", 1, "--out", tmp_path / "s")
    assert result.exit_code == 2 and "Error (rank 1):" in result.stderr and not result.stdout


def test_the_first_rank_does_not_wait_for_ever(environment, small, tmp_path, monkeypatch):
    monkeypatch.setattr(everywhere, "PATIENCE", 0.1)
    monkeypatch.setattr(everywhere, "_BATCHES", 0)
    environment(RANK=0, WORLD_SIZE=2)
    result = run("sample", "--model", small, "--n", 5, *BASE, "--out", tmp_path / "s")
    assert result.exit_code == 0 and len(contents(tmp_path / "s")) == 3
    assert "3 of 5 images are in" in result.stdout and "The same command draws the rest" in result.stdout
    assert "3 images of 3x8x8" in result.stdout


def test_precision_is_not_measured_by_each_rank_for_itself(environment, small, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: True)
    monkeypatch.setattr(precision, "bf16_share", lambda *_: pytest.fail("ranks may measure different things"))
    environment(RANK=1, WORLD_SIZE=2)
    arguments = ("--model", small, "--n", 2, *BASE, "--precision", "auto", "--out", tmp_path / "s")
    assert run("sample", *arguments).exit_code == 0
    assert json.loads((tmp_path / "s/samples.json").read_text())["precision"] == "bf16"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "others", [("--out", "s.png"), ("--out", "s.npz"), (), ("--out", "s", "--gif", "s.gif")], ids=str
)
def test_a_single_file_is_not_drawn_by_several_ranks(environment, small, tmp_path, monkeypatch, others, rank):
    monkeypatch.chdir(tmp_path)
    environment(RANK=rank, WORLD_SIZE=2)
    result = run("sample", "--model", small, "--n", 2, *BASE, *others)
    assert result.exit_code == 2 and "only a folder is drawn by several" in result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_comparing_samplers_is_for_one_process(environment, small, tmp_path):
    environment(RANK=1, WORLD_SIZE=2)
    result = run("evaluate", "samplers", "--model", small, "--out", tmp_path / "s.json")
    assert result.exit_code == 2 and "in one process" in result.stderr


def test_likelihoods_need_a_way_for_the_ranks_to_find_each_other(environment, small, tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    np.savez(tmp_path / "data.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    arguments = ("nll", "--model", small, "--data", tmp_path / "data.npz", "--out", tmp_path / "n.json")
    environment(RANK=1, WORLD_SIZE=2)
    result = run("evaluate", *arguments)
    assert result.exit_code == 2 and "MASTER_ADDR" in result.stderr and "torchrun" in result.stderr
    environment(SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=2)
    result = run("evaluate", *arguments)
    assert result.exit_code == 2 and "2 ranks were started, but not by torchrun" in result.stderr


# Two real processes at once


def quality(small, folder):
    """Which metrics to compute of which samples."""
    arguments = [f"--model={small}", "--n=11", "--steps=3", "--batch-size=2", f"--reference={folder}/data.npz"]
    return ["all", *arguments, f"--features={save_network(folder / 'made.pt')}"]


@pytest.fixture(scope="module")
def together(small, tmp_path_factory):
    """Two ranks of torchrun, which run some commands at the same time: their folder, and what each of them said."""
    folder = tmp_path_factory.mktemp("together")
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images, labels=np.arange(9) % 3)
    nll = ["nll", f"--model={small}", f"--data={folder}/data.npz", "--batch-size=2", "--steps=5"]  # at most once
    commands = [
        ("sample", [f"--model={small}", "--n=9", "--steps=3", "--batch-size=2", f"--out={folder}/s"]),
        ("evaluate", [*nll, f"--out={folder}/nll.json"]),
        ("evaluate", [*quality(small, folder), f"--out={folder}/all.json", f"--write-reference={folder}/real.npz"]),
        ("evaluate", [*quality(small, folder), f"--out={folder}/kept.json", f"--keep={folder}/kept"]),
    ]
    tests = Path(__file__).parents[1]
    script = [str(tests / "support/ranks_script.py"), str(folder), json.dumps(commands)]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script],
        env={**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]
    assert all(one["status"] == 0 for rank in said for one in rank), said
    return folder, said


def test_two_processes_draw_one_folder_at_once(together, small, tmp_path):
    folder, said = together
    run("sample", "--model", small, "--n", 9, *BASE, "--out", tmp_path / "one")
    assert contents(folder / "s") == contents(tmp_path / "one")
    assert "2 ranks" in said[0][0]["stdout"] and not said[1][0]["stdout"] and not said[1][0]["stderr"]


def test_the_likelihood_of_two_ranks_is_that_of_one_bit_for_bit(together, small, tmp_path):
    folder, said = together
    arguments = ("--model", small, "--data", folder / "data.npz", "--batch-size", 2, "--steps", 5)
    assert run("evaluate", "nll", *arguments, "--out", tmp_path / "one.json").exit_code == 0
    one, two = (json.loads(path.read_text()) for path in (tmp_path / "one.json", folder / "nll.json"))
    assert one == two and one["images"] == 9
    assert "2 ranks" in said[0][1]["stdout"] and not said[1][1]["stdout"]


def test_metrics_of_two_ranks_are_those_of_one(together, small, tmp_path):
    folder, said = together
    arguments = quality(small, folder)
    assert run("evaluate", *arguments, "--out", tmp_path / "one.json").exit_code == 0
    one = json.loads((tmp_path / "one.json").read_text())
    for k, name in enumerate(("all", "kept"), 2):
        two = json.loads((folder / f"{name}.json").read_text())
        for metric in ("fid", "kid", "pr", "is"):
            assert two[metric] == pytest.approx(one[metric], rel=1e-6)
        assert one["ranks"] == 1 and two["ranks"] == 2 and not said[1][k]["stdout"]
    assert len(list((folder / "kept").glob("*.png"))) == 11
    with np.load(folder / "data.npz") as data, np.load(folder / "real.npz") as statistics:
        np.testing.assert_allclose(statistics["mu"], features_of(data["images"]).mean(0), rtol=1e-5)


def test_an_npz_of_samples_is_kept_by_one_process(environment, small, tmp_path):
    environment(RANK=1, WORLD_SIZE=2)
    np.savez(tmp_path / "data.npz", images=np.zeros((9, 8, 8, 3), np.uint8))
    result = run("evaluate", *quality(small, tmp_path), "--keep", tmp_path / "s.npz")
    assert result.exit_code == 2 and "give --keep a folder" in result.stderr


def test_a_likelihood_that_was_stopped_is_that_of_the_images_before_the_first_gap():
    def batch(n):
        x = torch.zeros(n)
        return BitsPerDim(x, x, x, x, x, x, x)

    parts = {6: batch(2), 0: batch(2), 2: batch(2)}  # the rank of batch 4 was stopped
    assert [len(part.total) for part in finished_part(parts)] == [2, 2]
    assert finished_part({}) == [] and finished_part({2: batch(2)}) == []
