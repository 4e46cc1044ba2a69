"""--precision: what each kind of device computes in by default, and commands in fp16."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.train_command import pictures, start, weights
from typer.testing import CliRunner

from ddpm_fast.commands import common, sample, training_setup
from ddpm_fast.loops import loss_scale

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
    arguments = {"precision": "auto", "variance": "fixed_small", "loss": None}
    training_setup.choose(arguments, GPU)
    assert arguments["precision"] == training
    assert common.DTYPE_NAMES[common.choose_dtype("auto", GPU)] == sampling
    for name in ("fp32", "bf16", "fp16"):  # what is asked for is done
        arguments["precision"] = name
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
    for precision in ("fp32", "fp16"):
        path = tmp_path / f"{precision}.npz"
        arguments = ["--n=2", "--steps=3", "--device=cpu", f"--precision={precision}", f"--out={path}"]
        done = CliRunner().invoke(sample.app, arguments, catch_exceptions=False)
        assert done.exit_code == 0 and precision in done.stdout
        drawn[precision] = np.load(path)["images"].astype(int)
    difference = np.abs(drawn["fp16"] - drawn["fp32"])
    assert difference.max() > 0 and difference.mean() < 2  # of 255
