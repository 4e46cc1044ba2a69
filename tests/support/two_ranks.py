"""What two processes do that train together, started by torchrun. Each writes what it found to FOLDER/rank.pt.
One start serves many tests (loops/test_distributed.py), which compare it with what one process does.

TRAININGS is also what that one process does, so this file says what is trained, and nothing of what is expected.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from support.recording import recorded

import ddpm_fast as df
from ddpm_fast.data import Dataset
from ddpm_fast.loops import distributed, training_step
from ddpm_fast.loops.distributed import RanksDiffer
from ddpm_fast.loops.metrics import Metrics, NonFiniteLoss
from ddpm_fast.loops.timesteps import TIMESTEP_SAMPLINGS
from ddpm_fast.loops.training import TrainConfig, Trainer

STEPS = 20  # of each timestep sampler
FEW = 6  # of all else
BATCH = 8
SHORT = df.GaussianDiffusion(df.Schedule.cosine(4), variance="learned_range", loss="hybrid")
TRAININGS = {
    "uniform": {},
    "uniform, replayed": {"cuda_graph": None},
    "stratified": {"timestep_sampling": "stratified"},
    "loss_second_moment": {"timestep_sampling": "loss_second_moment", "diffusion": SHORT},
    "importance, replayed": {"timestep_sampling": "loss_second_moment", "diffusion": SHORT, "cuda_graph": None},
    "bf16, replayed": {"precision": "bf16", "cuda_graph": None},
    "fp16": {"precision": "fp16"},
    "dropout of version 1": {"dropout_version": 1},
    "compute again": {"grad_checkpoint": True},
    "augmented": {"augment": "rotate90,shift,small:0.3"},
    "four parts": {"timestep_sampling": "stratified", "micro_batch": 2},
    "four parts, replayed": {"timestep_sampling": "loss_second_moment", "micro_batch": 2, "cuda_graph": None},
}
ON_A_GPU = ("uniform", "uniform, replayed", "bf16, replayed", "four parts, replayed")


def trainer(diffusion=None, cuda_graph=False, grad_checkpoint=False, device="cpu", **options) -> Trainer:
    """With every source of randomness in use: dropout, dropped labels, flips."""
    diffusion = diffusion or df.GaussianDiffusion(df.Schedule.cosine(100))
    config = TrainConfig(**{"batch_size": BATCH, "warmup": 5, "flip": True, "label_drop": 0.3, "lr": 1e-3} | options)
    network = df.UNetConfig(
        image_size=8, in_channels=2, model_channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4,
        attention_resolutions=(), num_classes=3, dropout=0.3, learned_variance=diffusion.objective.learned,
        augment_channels=config.augmentation.channels if config.augmentation else 0,
    )  # fmt: skip
    images = torch.randint(0, 256, (50, 2, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset(images, torch.arange(50) % 3, None, "random pixels")
    return Trainer(network, diffusion, config, data, device, cuda_graph, False, grad_checkpoint)


def watch(subject: Trainer, seen: list) -> None:
    """Note the tensors that the network is given."""
    network = subject._network

    def call(*given):
        seen.append([x.clone() for x in given if x is not None and x.ndim])
        return network(*given)

    subject._network = call


def numbers_of(subject: Trainer) -> torch.Tensor:
    """What a training step says of itself: its loss, its gradient norm, and the sums of its losses by quarter of t."""
    numbers = torch.stack(subject.train_step())
    return torch.cat([numbers, subject.quarters.flatten()])


def train(name: str, steps: int | None = None, **others) -> dict:
    """All that a training gives: its losses and norms, what its network was given, and its state."""
    steps = steps or (STEPS if name in TIMESTEP_SAMPLINGS else FEW)
    options, seen = TRAININGS[name] | others, []
    on_a_cpu = options.get("device", "cpu") == "cpu"
    as_on_a_gpu = on_a_cpu and options.get("cuda_graph", False) is None
    with contextlib.ExitStack() as stack:
        if as_on_a_gpu:
            stack.enter_context(recorded())
            stack.enter_context(mock.patch.object(training_step, "copies_pay", lambda device: True))
        subject = trainer(**options)
        if on_a_cpu and not as_on_a_gpu:
            watch(subject, seen)
        metrics = torch.stack([numbers_of(subject) for _ in range(steps)])
    return {"metrics": metrics.cpu(), "given": seen, "state": dict(subject.snapshot({}).copied().tensors)}


def agreed_stop(rank: int) -> list[bool]:
    """Whether each training step was the last one, where the second process wants that during the third."""
    subject, stopping = trainer(), []
    for step in range(1, 6):
        subject.wants_stop = rank == 1 and step >= 3
        subject.train_step()
        stopping.append(subject.stopping)
    return stopping


def late_stop(rank: int) -> list[bool]:
    """As above, with numbers that arrive as from a GPU."""
    subject = trainer()
    subject._late_flags = 1
    stopping = []
    for step in range(1, 6):
        subject.wants_stop = rank == 1 and step == 3
        subject.train_step()
        stopping.append(subject.stopping)
    return stopping


def message(kind: type[Exception], act) -> str:
    """What act() raises."""
    try:
        act()
    except kind as error:
        return str(error)
    return "nothing was raised"


def not_finite(rank: int) -> str:
    """The second process alone has a gradient that is not finite, at step 3."""
    subject, metrics = trainer(), Metrics(0)
    backward = subject.loss_scale.backward
    subject.loss_scale.backward = lambda loss: backward(loss * torch.nan if rank == 1 and subject.step == 2 else loss)

    def run():
        for _ in range(5):
            metrics.add(*subject.train_step())
            metrics.look(wait=True)

    return message(NonFiniteLoss, run)


def differing(rank: int, folder: Path) -> str:
    """The second process has one other bit in its average, which no gradient shows."""
    subject = trainer()
    subject.train_step()
    if rank == 1:
        subject.ema.state_dict()["conv_in.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1
    return message(RanksDiffer, lambda: subject.save(folder))


def halves(folder: Path) -> None:
    """A training of 10 steps, to be gone on with by one process."""
    trainer(timestep_sampling="loss_second_moment", diffusion=SHORT).train(STEPS // 2, folder)


def start(folder: Path, device: str) -> str:
    """Start the two processes. Returns what they printed, once they have ended well."""
    root = Path(__file__).resolve().parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    run = subprocess.run(
        [*launch, __file__, str(folder), device],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def on_a_gpu(folder: Path) -> None:
    """The trainings that are tried on a GPU, which the two processes may share."""
    device = distributed.local_device("cuda")
    with distributed.join(device):
        found = {name: train(name, device=device) for name in ON_A_GPU}
        torch.save(found, folder / f"{distributed.rank()}.pt")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    with distributed.join(device):
        rank = distributed.rank()
        found = {
            "trainings": {name: train(name) for name in TRAININGS},
            "stop": agreed_stop(rank),
            "late stop": late_stop(rank),
            "not finite": not_finite(rank),
            "differing": differing(rank, folder / "differing"),
            "odd batch": message(df.InputError, lambda: trainer(batch_size=9)),
            "no folder": message(df.InputError, lambda: trainer().save(Path(__file__) / "run")),
        }
        halves(folder / "halves")
        with distributed.join(device):  # changes nothing
            found["group"] = (dist.get_backend(), distributed.world_size())
        found["kept"] = dist.is_initialized()
    found["left"] = not dist.is_initialized()
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    (main if sys.argv[2] == "cpu" else on_a_gpu)(Path(sys.argv[1]))
