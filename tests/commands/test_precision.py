"""--precision: what auto is on each kind of device, how a CPU is measured for it, and commands in fp16."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import run, save_small_model
from support.train_command import pictures, start, weights
from typer.testing import CliRunner

import ddpm_fast as df
from ddpm_fast.commands import precision, sample
from ddpm_fast.commands.training import setup as training_setup
from ddpm_fast.files import checkpoint
from ddpm_fast.loops import loss_scale
from ddpm_fast.loops.options import SamplingOptions

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Makes this machine one with a GPU, as far as a command asks."""

    def make(capability, has_bf16, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
        monkeypatch.setattr(torch, "version", SimpleNamespace(hip=hip, cuda=None if hip else "13.0"))

    return make


@pytest.mark.parametrize(
    ("capability", "has_bf16", "hip", "training", "sampling"),
    [
        ((9, 0), True, None, "bf16", "bf16"),
        ((7, 5), False, None, "fp16", "fp32"),  # a Tesla T4
        ((6, 1), False, None, "fp32", "fp32"),  # whose fp16 is slower than its fp32
        ((9, 4), True, "7.0", "bf16", "bf16"),  # an AMD Instinct
    ],
    ids=["Hopper", "Turing", "Pascal", "ROCm"],
)
def test_auto_is_what_the_gpu_computes_fast(gpu, capability, has_bf16, hip, training, sampling):
    gpu(capability, has_bf16, hip)
    assert precision.automatic_precision(GPU) == training
    assert precision.DTYPE_NAMES[precision.choose_dtype("auto", GPU)] == sampling
    for name in ("fp32", "bf16", "fp16"):  # what is asked for is done
        arguments = {"precision": name, "variance": "fixed_small", "loss": None, "lr_schedule": "constant"}
        arguments |= {"average_every": 1, "lr": 1e-3, "warmup": 0}
        training_setup.choose(arguments, GPU)
        assert arguments["precision"] == name


def test_a_training_in_fp16_goes_on_after_an_overflow(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**24)
    out = tmp_path / "out"
    start(
        pictures(tmp_path / "data", ["cat"]),
        out,
        "--steps=16",
        "--precision=fp16",
        "--log-every=4",
        "--sample-every=16",
    )
    state = weights(out)
    skipped, taken = math.log2(2.0**24 / state["loss_scale.scale"]), state["optim.conv_in.weight.step"]
    assert skipped > 0 and taken > 0 and taken == 16 - skipped


def test_samples_in_fp16_are_those_of_fp32_nearly(tmp_path):
    drawn = {}
    for name in ("fp32", "fp16"):
        path = tmp_path / f"{name}.npz"
        arguments = ["--n=2", "--steps=3", "--device=cpu", f"--precision={name}", f"--out={path}"]
        done = CliRunner().invoke(sample.app, arguments, catch_exceptions=False)
        assert done.exit_code == 0 and name in done.stdout
        drawn[name] = np.load(path)["images"].astype(int)
    difference = np.abs(drawn["fp16"] - drawn["fp32"])
    assert difference.max() > 0 and difference.mean() < 2  # of 255


class Clock:
    """A clock that only the calls of a pretended network advance."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def perf_counter(self):
        return self.now

    def network(self, name, fixed, each, first=0.0):
        """A network whose call with n images takes fixed + each * n seconds, and `first` more at its first call."""
        waits = [first]

        def call(n):
            self.log.append((name, n))
            self.now += fixed + each * n + (waits.pop() if waits else 0)

        return call


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(precision, "time", clock := Clock())
    return clock


@pytest.mark.parametrize("each", [0.008, 0.012])
def test_a_small_batch_is_measured_as_it_will_be_called(clock, each):
    share = precision.bf16_share(
        clock.network("fp32", 0.001, 0.01, first=5), clock.network("bf16", 0.001, each, first=5), batch=8, calls=300
    )
    assert share == pytest.approx((0.001 + 8 * each) / 0.081)
    assert {n for _, n in clock.log} == {1, 8} and clock.now < 2 * 5 + 1.1  # a second, besides what is made once


def test_a_large_batch_is_measured_by_a_part_of_it(clock):
    calls, batch = 50, 64
    share = precision.bf16_share(clock.network("fp32", 0, 0.1), clock.network("bf16", 0, 0.07), batch, calls)
    assert share == pytest.approx(0.7)
    assert clock.now < max(1, 0.03 * calls * batch * 0.1)
    assert 1 < max(n for _, n in clock.log) < batch


def test_a_mode_that_is_dreadfully_slow_is_called_twice_and_no_more(clock):
    share = precision.bf16_share(clock.network("fp32", 0, 0.1), clock.network("bf16", 0, 3), batch=64, calls=1000)
    assert share == pytest.approx(30)
    assert clock.log.count(("bf16", 1)) == 2 and len(clock.log) == 4


@pytest.mark.parametrize(("each", "calls"), [(0.001, 50), (5.0, 10)], ids=["soon done", "one call takes too long"])
def test_too_little_work_is_not_measured(clock, each, calls):
    assert precision.bf16_share(clock.network("fp32", 0, each), clock.network("bf16", 0, each), 1, calls) is None
    assert clock.log == [("fp32", 1)] * 2


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Samples four images of a small model by --precision auto, on a CPU that has bf16 instructions or not, and where
    bf16 takes this share of fp32's time."""

    def draw(*arguments, fast=True, share=None):
        monkeypatch.setattr(precision, "fast_bf16", lambda device: fast)
        monkeypatch.setattr(precision, "bf16_share", lambda *of: share(*of) if callable(share) else share)
        path = tmp_path / "model.safetensors"
        if not path.exists():
            loaded = df.load_model(save_small_model(path))
            for parameter in loaded.model.parameters():  # a new network's output is 0 in any precision
                torch.nn.init.normal_(parameter, std=0.2)
            checkpoint.save_model(path, loaded.model.state_dict(), loaded.config)
        common = ["--model", path, "--n=4", "--steps=3", "--device=cpu"]
        return run("sample", *common, *arguments)

    return draw


@pytest.mark.parametrize(
    ("fast", "share", "said", "name"),
    [
        (False, 0.5, "this CPU has no fast bf16", "fp32"),
        (True, 0.8, "bf16 takes 0.80 of fp32's time here", "bf16"),
        (True, 0.97, "bf16 takes 0.97 of fp32's time here", "fp32"),  # too little for what it rounds
        (True, None, "too little to draw", "bf16"),
    ],
)
def test_auto_says_what_it_chose_and_that_draws_the_same_again(small, tmp_path, fast, share, said, name):
    drawn = []
    for option in ("--dtype=auto", f"--precision={name}"):
        out = tmp_path / f"{option}.npz"
        done = small(option, f"--out={out}", fast=fast, share=share)
        assert done.exit_code == 0 and f", {name}, cpu)" in done.stdout
        lines = [line for line in done.stdout.splitlines() if f"sampling in {name}" in line]
        assert (len(lines) == 1 and said in lines[0]) if "auto" in option else not lines
        drawn.append(np.load(out)["images"])
    np.testing.assert_array_equal(*drawn)
    other = tmp_path / "other.npz"
    assert small(f"--precision={'bf16' if name == 'fp32' else 'fp32'}", f"--out={other}").exit_code == 0
    assert (np.load(other)["images"] != drawn[0]).any()


def test_a_folder_is_continued_in_the_precision_that_it_was_begun_in(small, tmp_path):
    out = tmp_path / "out"
    assert small("--precision=auto", f"--out={out}", share=0.8).exit_code == 0
    assert json.loads((out / "samples.json").read_text())["precision"] == "bf16"
    done = small("--precision=auto", f"--out={out}", "--first-sample-id=4", share=1.2)
    assert done.exit_code == 0 and "the folder's images are in it: sampling in bf16" in done.stdout
    assert len(list(out.glob("*.png"))) == 8


def test_a_broken_record_is_refused(small, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples.json").write_text("{")
    done = small("--precision=auto", f"--out={tmp_path / 'out'}")
    assert done.exit_code == 2 and "cannot be read" in done.stderr


def test_auto_measures_the_network_as_it_will_be_called(small, tmp_path):
    """With the labels, and for guidance on twice the batch."""
    seen = []

    def share(exact, rounded, batch, calls):
        for call in (exact, rounded):
            handle = call._network.model.register_forward_pre_hook(
                lambda model, given: seen.append((given[0].dtype, len(given[0]), given[2].tolist()))
            )
            call(2)
            handle.remove()
        seen.append((batch, calls))
        return 1.5

    options = ["--guidance=2", "--labels=1", "--batch-size=3", f"--out={tmp_path / 'x.npz'}"]
    done = small("--precision=auto", *options, share=share)
    assert done.exit_code == 0, done.stderr
    assert seen == [(torch.float32, 4, [1, 1, 3, 3]), (torch.bfloat16, 4, [1, 1, 3, 3]), (3, 6)]


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_known_is_not_measured(tmp_path, monkeypatch, compiled):
    """A GPU with bf16 samples in it; so does a compiled network on a CPU, which would have to be compiled twice."""
    monkeypatch.setattr(precision, "fast_bf16", lambda device: True)
    monkeypatch.setattr(precision, "bf16_share", None)
    loaded = df.load_model(save_small_model(tmp_path / "model.safetensors"))
    if not compiled:
        monkeypatch.setattr(precision.Network, "of", lambda model: SimpleNamespace(device=GPU))
    settled = precision.settle(loaded, SamplingOptions(compile=compiled), 4, 3)
    assert next(settled.model.parameters()).dtype == torch.bfloat16


def test_an_edit_is_drawn_in_what_auto_chose(small, tmp_path):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(picture)
    done = small("--precision=auto", f"--init-image={picture}", f"--out={tmp_path / 'like.npz'}", share=0.5)
    assert done.exit_code == 0 and ", bf16, cpu)" in done.stdout
