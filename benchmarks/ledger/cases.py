"""What is counted: a forward, a training step and a sampling step, of ours and of diffusers' network, on meta."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ddpm_fast as df
from benchmarks import networks, peers
from benchmarks.ledger.counting import Counter
from benchmarks.ledger.entries import Line
from benchmarks.ledger.pretence import META, as_on_a_gpu
from ddpm_fast.data import Dataset
from ddpm_fast.formats.diffusers.network import peer_network, scheduler
from ddpm_fast.loops.guidance import predictor
from ddpm_fast.loops.state import BatchState, DeviceTable, RowKind
from ddpm_fast.loops.training import TrainConfig, Trainer
from ddpm_fast.nn import UNet, UNetConfig
from ddpm_fast.nn.derived import held
from ddpm_fast.samplers import make_table
from tests.support.diffusers_loops import diffusers_step

OURS = "ddpm_fast"
FORWARD, TRAINING, SAMPLING = "forward", "training step", "sampling step"
WORK = (FORWARD, TRAINING, SAMPLING)
DTYPE = torch.bfloat16
STEPS = 50  # of the chain that the sampling step is one of


class Case(NamedTuple):
    """One piece of work of one of the two networks. work: of WORK. side: OURS or peers.DIFFUSERS."""

    work: str
    side: str
    size: str
    batch: int

    def __str__(self) -> str:
        return f"{self.work} {self.size} bf16 {self.batch}, {self.side}"


def cases(size: str) -> list[Case]:
    """Every case of a network: with a batch that fills a GPU, and one image at a time."""
    sides = (OURS, peers.DIFFUSERS)
    work = ((FORWARD, 256), (TRAINING, 128), (SAMPLING, 256), (SAMPLING, 1))
    return [Case(name, side, size, batch) for name, batch in work for side in sides]


def count(case: Case) -> list[Line]:
    """The lines of the second time that the work is done: what is made once and kept is left out."""
    with as_on_a_gpu():
        run = prepared(case, META)
        for counter in (Counter(), Counter()):
            with counter:
                run()
    return counter.lines


def prepared(case: Case, device: torch.device) -> Callable[[], object]:
    """The work, to be called on this device as often as wanted."""
    with device:
        return _MADE[case.work, case.side](networks.config(case.size), case.batch, device)


def _image(config: UNetConfig, batch: int, dtype: torch.dtype = DTYPE) -> Tensor:
    shape = (batch, config.in_channels, config.image_size, config.image_size)
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _ours(config: UNetConfig, device: torch.device) -> UNet:
    return UNet(config).to(device)


def _theirs(config: UNetConfig, device: torch.device) -> nn.Module:
    """diffusers' network in the memory format that suits a GPU."""
    return peer_network(config).to(device).to(memory_format=torch.channels_last)


def _diffusion() -> df.GaussianDiffusion:
    with torch.device("cpu"):
        return df.GaussianDiffusion(df.Schedule.linear(1000), variance="fixed_small")


def _forward(model: nn.Module, config: UNetConfig, batch: int) -> Callable[[], object]:
    model, x = model.to(DTYPE).eval(), _image(config, batch)
    t = torch.zeros(batch, dtype=torch.int64)
    return torch.no_grad()(lambda: model(x, t))


def _our_forward(config: UNetConfig, batch: int, device: torch.device) -> Callable[[], object]:
    return _forward(_ours(config, device), config, batch)


def _their_forward(config: UNetConfig, batch: int, device: torch.device) -> Callable[[], object]:
    return _forward(_theirs(config, device), config, batch)


def _data(config: UNetConfig, batch: int) -> tuple[TrainConfig, Dataset]:
    images = torch.zeros(
        batch, config.in_channels, config.image_size, config.image_size, dtype=torch.uint8, device="cpu"
    )
    return TrainConfig(batch_size=batch, precision="bf16", label_drop=0.0), Dataset(images, None, None, "black")


def _our_training(config: UNetConfig, batch: int, device: torch.device) -> Callable[[], object]:
    """A step of Trainer, without the copy of the batch to the device."""
    how, data = _data(config, batch)
    trainer = Trainer(dataclasses.replace(config, dropout=0.0), _diffusion(), how, data, device, cuda_graph=False)
    trainer.model.train()
    return trainer._compute


def _their_training(config: UNetConfig, batch: int, device: torch.device) -> Callable[[], object]:
    how, data = _data(config, batch)
    return diffusers_step(_ours(config, device), _diffusion(), how, data, tuned=True)


def _our_sampling(config: UNetConfig, batch: int, device: torch.device) -> Callable[[], object]:
    """A row of ancestral sampling, as the loop runs it and as its CUDA graph replays it."""
    model, diffusion = _ours(config, device).to(DTYPE).eval(), _diffusion()
    with torch.device("cpu"):
        table = make_table(diffusion, "ddpm", STEPS)
    key = df.NoiseKey.of(0, batch, device=device, stream=df.Stream.REVERSE)
    state = BatchState.of(
        _image(config, batch, torch.float32), DeviceTable.of(table, device, None), key, model_dtype=DTYPE
    )
    predict, open_ = predictor(model, None, learned=False), contextlib.ExitStack()
    open_.enter_context(held(model))  # for as long as the work can be done again

    @torch.no_grad()
    def run(_: contextlib.ExitStack = open_) -> None:
        state.advance(predict, RowKind(asks=True))

    return run


def _their_sampling(config: UNetConfig, batch: int, device: torch.device) -> Callable[[], object]:
    """A step of diffusers' scheduler on the network's answer; it keeps its state in the network's dtype."""
    model = _theirs(config, device).to(DTYPE).eval()
    with torch.device("cpu"):
        diffusion = _diffusion()
        chain = scheduler(diffusion, make_table(diffusion, "ddpm", STEPS).timesteps.tolist())
    image, t = _image(config, batch), chain.timesteps[0]
    return torch.no_grad()(lambda: chain.step(model(image, t).sample, t, image))


_MADE = {
    (FORWARD, OURS): _our_forward,
    (FORWARD, peers.DIFFUSERS): _their_forward,
    (TRAINING, OURS): _our_training,
    (TRAINING, peers.DIFFUSERS): _their_training,
    (SAMPLING, OURS): _our_sampling,
    (SAMPLING, peers.DIFFUSERS): _their_sampling,
}
