"""Training with low-precision copies of the weights gives, bit for bit, what autocast's own casts give: on the path of
a CPU, and on the path that the network takes on a GPU."""

import contextlib
from unittest import mock

import pytest
import torch
from support.recording import tensors
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast.data import Dataset
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.loops import training_step
from ddpm_fast.loops.training import TrainConfig, Trainer
from ddpm_fast.nn import UNetConfig, products
from ddpm_fast.nn.block import memory_of
from ddpm_fast.nn.convolution import Conv2d
from ddpm_fast.nn.layers import Upsample
from ddpm_fast.schedule import Schedule
from tests.nn.test_pending import fused

SMALL = {"image_size": 8, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 8}
CONFIGS = {
    "as Ho et al.": {"attention_resolutions": (4,), "downsample_padding": "asymmetric", "dropout": 0.1},
    "as Nichol and Dhariwal": {"scale_shift": True, "num_heads": 2, "num_classes": 3, "attention_resolutions": (4, 8)},
    "resampling residual blocks": {"resample": "resblock", "num_classes": 3, "attention_resolutions": ()},
}
PATHS = {"the CPU's path": contextlib.nullcontext, "a GPU's path": fused}


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch):
    """Products in bf16 on any CPU: where it lacks the instructions, they would be computed of the weights in fp32."""
    monkeypatch.setitem(products._IS_NATIVE, torch.bfloat16, True)


def trainer(copies, name="as Nichol and Dhariwal", precision="bf16", cuda_graph=None):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8, generator=generator)
    config = UNetConfig(**(SMALL | CONFIGS[name]))
    labels, names = (torch.arange(32) % 3, ["a", "b", "c"]) if config.num_classes else (None, None)
    how = TrainConfig(batch_size=4, precision=precision, warmup=2, grad_clip=0.5)
    with mock.patch.object(training_step, "copies_pay", lambda device: copies):
        diffusion = GaussianDiffusion(Schedule.cosine(100))
        return Trainer(
            config, diffusion, how, Dataset(images, labels, names, "random"), torch.device("cpu"), cuda_graph
        )


def state(subject):
    optimizer = {name: value["exp_avg_sq"] for name, value in subject.optimizer.state_dict()["state"].items()}
    return {**subject.model.state_dict(), **{f"ema.{k}": v for k, v in subject.ema.state_dict().items()}, **optimizer}


def check_equal(one, other):
    expected = state(other)
    for name, value in state(one).items():
        assert torch.equal(value, expected[name]), name
    assert one.model.conv_in.weight.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_are_autocasts_bit_for_bit(name, path, monkeypatch):
    # As on a GPU: Winograd's convolution of a CPU rounds no weight, so there the copies would make a difference.
    monkeypatch.setattr(Conv2d, "takes_winograd", lambda self, x: False)
    with PATHS[path]():
        subjects = trainer(True, name), trainer(False, name)
        assert memory_of(list(subjects[0].model.parameters())) is not None
        for _ in range(4):
            metrics = [torch.stack(subject.train_step()) for subject in subjects]
            assert torch.equal(*metrics) and metrics[0][1] > 0.5  # so that the gradient is clipped
    check_equal(*subjects)


def test_in_fp32_the_parameters_only_move():
    subjects = trainer(True, precision="fp32"), trainer(False, precision="fp32")
    for _ in range(3):
        assert torch.equal(*(torch.stack(subject.train_step()) for subject in subjects))
    check_equal(*subjects)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    straight, second = trainer(True), trainer(True)
    for _ in range(3):
        straight.train_step()
    path = straight.save(tmp_path, {})
    straight.train_step()
    second.load(path)
    second.train_step()
    check_equal(second, straight)


def test_a_graph_holds_them(recording):
    eager, replayed = trainer(True, "as Ho et al.", cuda_graph=False), trainer(True, "as Ho et al.")
    for _ in range(6):
        assert torch.equal(torch.stack(eager.train_step()), torch.stack(replayed.train_step()))
    assert (recording.captures, recording.replays) == (1, 4)
    check_equal(replayed, eager)


def test_a_step_that_is_stopped_changes_nothing():
    subject = trainer(True)
    subject.train_step()
    before = {name: value.clone() for name, value in state(subject).items()}

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        subject.train_step(stop)
    assert all(torch.equal(value, before[name]) for name, value in state(subject).items())
    twin = trainer(True)
    for _ in range(3):
        twin.train_step()
    for _ in range(2):
        subject.train_step()
    check_equal(subject, twin)


class Casts(TorchDispatchMode):
    """The addresses of the fp32 tensors that are cast."""

    def __init__(self):
        super().__init__()
        self.addresses = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.addresses.update(tensor.data_ptr() for tensor in tensors(args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", PATHS)
def test_the_forward_casts_no_filter_or_matrix(path):
    with PATHS[path]():
        subject = trainer(True)
        with Casts() as casts:
            subject.train_step()
    cast = {name for name, p in subject.model.named_parameters() if p.ndim > 1 and p.data_ptr() in casts.addresses}
    upsampling = {f"{name}.conv.weight" for name, module in subject.model.named_modules() if type(module) is Upsample}
    assert len(upsampling) == 1 and cast <= upsampling
