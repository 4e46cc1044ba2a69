"""A training step, data in to weights out: ours compared with the steps that one would write or call otherwise.

All keep an average of their weights and clip the gradient. Plain torch on our network, as the reference codes have it;
diffusers' documented loop on its own network with the same weights; and denoising-diffusion-pytorch's Trainer on its
own network, which cannot hold these, from image files, which is the only way in that it has.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ddpm_fast as df
from benchmarks import peers
from benchmarks.comparison import COMPILED, WAYS, Comparison
from benchmarks.operations import noised, scaled
from ddpm_fast.data import Dataset, batch_indices
from ddpm_fast.formats.diffusers import same_weights
from ddpm_fast.loops.training import TrainConfig, Trainer

# Of the first loss.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
IMAGES = 512  # in the dataset, at least, of random pixels; four batches where that is more
LEAST_BATCH = 16  # denoising-diffusion-pytorch's Trainer takes no smaller ones
# What a step reads and writes of each parameter besides the network's passes: the clipping 2, AdamW 7, the average 3.
PASSES_OF_PARAMETERS = 12


class PlainTraining:
    """A training step as the reference codes have it, on a copy of a network."""

    def __init__(self, model: nn.Module, diffusion: df.GaussianDiffusion, config: TrainConfig, dataset: Dataset):
        self.model, self.config, self.dataset = copy.deepcopy(model), config, dataset
        self.device = next(model.parameters()).device
        self.v_prediction = diffusion.objective.prediction == "v"
        self.table = diffusion.schedule.q_sample_table().to(self.device, torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]

    def output(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.model(x_t, t, labels)

    def noised(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return noised(images, t, self.table, noise)

    def target(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        if not self.v_prediction:
            return noise
        signal, sigma = self.table[t][:, :, None, None, None].unbind(1)
        return signal * noise - sigma * scaled(images)

    def loss(self, images: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None, autocast: bool) -> Tensor:
        x_t = self.noised(images, t, noise)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            output = self.output(x_t, t, labels)
        return F.mse_loss(output.float(), self.target(images, t, noise))

    def batch(self) -> tuple[Tensor, Tensor | None]:
        return self.dataset.batch(torch.randint(len(self.dataset), (self.config.batch_size,)))

    def average_weights(self) -> None:
        with torch.no_grad():
            for average, parameter in zip(self.average, self.model.parameters(), strict=True):
                average.mul_(self.config.ema_decay).add_(parameter, alpha=1 - self.config.ema_decay)

    def step(self) -> None:
        images, labels = (None if part is None else part.to(self.device) for part in self.batch())
        t = torch.randint(self.table.shape[0], (len(images),), device=self.device)
        noise = torch.randn(images.shape, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(images, t, noise, labels, autocast=self.config.precision == "bf16").backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.average_weights()


class DiffusersTraining(PlainTraining):
    """The loop of diffusers' unconditional training example with its EMA: DataLoader, DDPMScheduler.add_noise and
    get_velocity, UNet2DModel, EMAModel."""

    def __init__(self, model: df.UNet, diffusion: df.GaussianDiffusion, config: TrainConfig, dataset: Dataset):
        from diffusers.training_utils import EMAModel

        super().__init__(same_weights(model), diffusion, config, dataset)
        self.model.train()
        self.called: Callable = self.model
        self.chain = peers.diffusers_scheduler(diffusion)
        self.average = EMAModel(self.model.parameters(), decay=config.ema_decay)
        parts = [part for part in (dataset.images, dataset.labels) if part is not None]
        loader = DataLoader(TensorDataset(*parts), config.batch_size, shuffle=True, drop_last=True)
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def output(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.called(x_t, t, class_labels=labels).sample

    def noised(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.chain.add_noise(scaled(images), noise, t)

    def target(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.chain.get_velocity(scaled(images), noise, t) if self.v_prediction else noise

    def batch(self) -> tuple[Tensor, Tensor | None]:
        images, *labels = next(self.batches)
        return images, labels[0] if labels else None

    def average_weights(self) -> None:
        self.average.step(self.model.parameters())


def lucidrains_trainer(size: str, config: TrainConfig, dataset: Dataset, folder: Path):
    """denoising-diffusion-pytorch's Trainer on its own network, and on the dataset's images as files in a folder."""
    from accelerate.state import AcceleratorState
    from denoising_diffusion_pytorch import Trainer as TheirTrainer

    AcceleratorState._reset_state()  # it holds one precision a process, and a run has both
    pictures = folder / "images"
    pictures.mkdir()
    channels, side = dataset.images.shape[1:3]
    for i, image in enumerate(dataset.images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image.squeeze(-1) if channels == 1 else image).save(pictures / f"{i}.png")
    return TheirTrainer(
        peers.lucidrains_diffusion(peers.lucidrains_network(size, channels), side),
        str(pictures),
        train_batch_size=config.batch_size,
        train_lr=config.lr,
        train_num_steps=0,
        ema_update_every=1,
        ema_decay=config.ema_decay,
        augment_horizontal_flip=config.flip,
        max_grad_norm=config.grad_clip,
        amp=config.precision == "bf16",
        mixed_precision_type="bf16",
        save_and_sample_every=2**62,
        calculate_fid=False,
        results_folder=str(folder / "results"),
    )


def add_variants(made: Comparison) -> None:
    """Add the variants of case.steps training steps, compared by the first loss of those with the same weights."""
    case, device, diffusion, n = made.case, made.device, made.diffusion, made.case.batch
    network = dataclasses.replace(made.config, dropout=0.0)
    passes = made.work.bytes(n, case.torch_dtype.itemsize)
    made.counts["flops"] = n * made.work.training_flops
    made.counts["bytes"] = 3 * passes + 4 * PASSES_OF_PARAMETERS * made.work.parameters
    made.counts["normals"] = 2 * n * network.in_channels * network.image_size**2  # for x_t, and again for the loss
    config = TrainConfig(batch_size=n, precision=case.dtype, label_drop=0.0)
    generator = torch.Generator().manual_seed(0)
    size = (max(IMAGES, 4 * n), *made.shape[1:])
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(images)) % network.num_classes if network.num_classes else None
    dataset = Dataset(images, labels, None, "random pixels")

    def several(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(case.steps):
                step()

        return run

    trainers = {
        label: Trainer(network, diffusion, config, dataset, device, **options)
        for label, options in WAYS[device.type].items()
    }
    for trainer in trainers.values():
        trainer.model.load_state_dict(made.model.state_dict())
    first = next(iter(trainers.values()))
    plain = PlainTraining(first.model, diffusion, config, dataset)
    baselines = {"torch": plain}
    if made.has(peers.DIFFUSERS):
        baselines[peers.DIFFUSERS] = DiffusersTraining(first.model, diffusion, config, dataset)
        if made.compiles():
            baselines[COMPILED] = DiffusersTraining(first.model, diffusion, config, dataset)
            baselines[COMPILED].called = peers.freshly_compiled(baselines[COMPILED].model)
    # The first batch as ours draws it: its timesteps, noise and images.
    key = df.NoiseKey.of(config.seed, n, stream=df.Stream.TRAINING, device=device)
    t, _ = first.timestep_sampler.sample(dataclasses.replace(key, stream=df.Stream.TIMESTEP))
    pixels, classes = (
        None if part is None else part.to(device)
        for part in dataset.batch(batch_indices(config.seed, 0, n, len(dataset)))
    )
    noise = df.ops.normal(key, size[1:])
    truth = plain.loss(pixels, t, noise, classes, autocast=False).detach()
    for label, trainer in trainers.items():
        made.add_ours(label, several(trainer.train_step))
    for label, baseline in baselines.items():
        made.runs[label] = several(baseline.step)
        loss = baseline.loss(pixels, t, noise, classes, autocast=case.dtype == "bf16").detach()
        made.compare(label, loss, truth, TOLERANCE[case.dtype])
    # Ours last, as its comparison is a step that changes the weights.
    for label, trainer in trainers.items():
        made.compare(label, trainer.train_step()[0], truth, TOLERANCE[case.dtype])
    if made.has(peers.LUCIDRAINS):
        _add_lucidrains(made, config, dataset)


def _add_lucidrains(made: Comparison, config: TrainConfig, dataset: Dataset) -> None:
    if made.device.type == "cpu" and torch.cuda.is_available():
        made.absent[peers.LUCIDRAINS] = "its Trainer takes the GPU where there is one"
        return
    if made.case.batch < LEAST_BATCH:
        made.absent[peers.LUCIDRAINS] = f"its Trainer takes batches of at least {LEAST_BATCH}"
        return
    folder = tempfile.TemporaryDirectory()
    trainer = lucidrains_trainer(made.case.size, config, dataset, Path(folder.name))

    def steps(kept: tempfile.TemporaryDirectory = folder) -> None:  # the files last as long as what reads them
        trainer.train_num_steps += made.case.steps
        with peers.silent():
            trainer.train()

    made.runs[peers.LUCIDRAINS] = steps
    made.note_lucidrains("its Trainer, which reads image files in processes of its own")
