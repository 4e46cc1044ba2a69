"""--profile: a trace that viewers open, with the parts of the steps by name, and a table; paths are refused first."""

import gzip
import json

import numpy as np
import pytest
import torch
from support.train_command import SMALL, command, pictures, start
from typer.testing import CliRunner

from ddpm_fast.commands import profiling, sample
from ddpm_fast.loops.parts import PREFIX, part
from ddpm_fast.loops.prepared import Prepared

TRAINING = {"load", "draw", "forward", "loss", "backward", "update", "average"}


@pytest.fixture
def data(tmp_path):
    return pictures(tmp_path / "data", ["cat"])


def draw(*arguments):
    return CliRunner().invoke(sample.app, ["--device=cpu", "--n=2", *map(str, arguments)], catch_exceptions=False)


def parts(trace):
    """How often each part of ours is in a trace, by its name, and how many steps there are."""
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    ours = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    return {name: ours.count(name) for name in ours}, sum(name.startswith("ProfilerStep#") for name in names)


def test_a_training_is_profiled_by_its_parts(tmp_path, data, monkeypatch):
    monkeypatch.setattr(profiling, "RECORDED", 3)
    trace = tmp_path / "new" / "trace.json"
    told = start(data, tmp_path / "out", "--steps=10", f"--profile={trace}").stdout
    found, steps = parts(json.loads(trace.read_text()))
    assert found == dict.fromkeys(TRAINING, 3) and steps == 3
    assert (
        "The steps 6 to 8, by the time" in told
        and f"Wrote {trace}" in told
        and "Self CPU" in told
        and "aten::" in told
        and "Done" in told
    )
    # It is no property of the run: what goes on with it is not profiled again, nor refused for lack of it.
    trace.unlink()
    command("--out", tmp_path / "out", "--resume", "--steps=11")
    assert not trace.exists()


def test_sampling_is_profiled_by_its_parts_over_all_batches(tmp_path):
    trace = tmp_path / "trace.json.gz"
    done = draw("--steps=4", "--batch-size=1", f"--profile={trace}", "--out", tmp_path / "x.npz")
    assert done.exit_code == 0, done.stderr
    found, _ = parts(json.loads(gzip.decompress(trace.read_bytes())))
    assert found == {"network": 3, "step": 3}  # of 8 rows those after the fifth
    plain = draw("--steps=4", "--batch-size=1", "--out", tmp_path / "y.npz")
    assert plain.exit_code == 0 and "Self CPU" in done.stdout and "Self CPU" not in plain.stdout
    assert np.array_equal(np.load(tmp_path / "x.npz")["images"], np.load(tmp_path / "y.npz")["images"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("trace.txt", "expected a name ending in .json or .json.gz"), ("text/trace.json", "cannot write")],
)
def test_a_path_that_cannot_be_written_is_refused_before_anything_starts(tmp_path, data, monkeypatch, name, message):
    monkeypatch.setattr(Prepared, "batches", None)
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "text").write_text("no folder")
    path = tmp_path / name
    done = draw("--steps=9", f"--profile={path}", "--out", tmp_path / "x.npz")
    assert done.exit_code == 2 and message in done.stderr and not (tmp_path / "x.npz").exists()
    out = tmp_path / "out"
    done = command(f"--data={data}", f"--out={out}", *SMALL, "--steps=9", f"--profile={path}", status=2)
    assert message in done.stderr and not out.exists()


def test_what_goes_wrong_with_a_trace_is_said_and_ends_nothing(tmp_path, data, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    few = start(data, tmp_path / "few", "--steps=5", f"--profile={tmp_path / 'few.json'}").stdout
    assert "nothing was profiled, because there were no more than 5 steps" in few and "Done" in few
    monkeypatch.setattr(profiling, "_write", full)
    told = start(data, tmp_path / "out", "--steps=7", f"--profile={tmp_path / 'trace.json'}").stdout
    assert "the profile could not be written" in told and "No space left" in told and "Done" in told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
@pytest.mark.parametrize("graph", ["--cuda-graph", "--no-cuda-graph"])
def test_a_profile_on_a_gpu_has_its_kernels(tmp_path, data, graph):
    trace = tmp_path / "trace.json"
    told = start(data, tmp_path / "out", "--steps=10", "--device=cuda", graph, f"--profile={trace}").stdout
    kernels = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("cat") == "kernel"]
    assert len(kernels) > 100 and "Self CUDA" in told and "Done" in told
    found, _ = parts(json.loads(trace.read_text()))
    assert set(found) == ({"load"} if graph == "--cuda-graph" else TRAINING)
    with torch.autograd.profiler.emit_nvtx():
        assert isinstance(part("load"), torch.profiler.record_function)


def test_parts_are_named_only_while_somebody_looks():
    assert not isinstance(part("load"), torch.profiler.record_function)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert isinstance(part("load"), torch.profiler.record_function)
    assert not isinstance(part("load"), torch.profiler.record_function)
