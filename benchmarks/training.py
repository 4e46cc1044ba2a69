"""A training step, data in to weights out: ours compared with those that one would write or call otherwise. All keep an
average of their weights and clip the gradient."""

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

import ddpm_fast as df
from benchmarks import peers
from benchmarks.comparison import Comparison
from ddpm_fast.data import Dataset, batch_indices
from ddpm_fast.loops.training import TrainConfig, Trainer
from tests.support.diffusers_loops import diffusers_step
from tests.support.plain import PlainStep, reference_step

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of the first loss
IMAGES = 512  # in the dataset, at least, of random pixels; four batches where that is more
LEAST_BATCH = 16  # denoising-diffusion-pytorch's Trainer takes no smaller ones
# What a step reads and writes of each parameter besides the network's passes: the clipping 2, AdamW 7, the average 3.
PASSES_OF_PARAMETERS = 12


def add_variants(made: Comparison) -> None:
    """Add the variants of case.steps training steps, compared by the first loss of those with the same weights."""
    case, device, diffusion, n = made.case, made.device, made.diffusion, made.case.batch
    made.counts["flops"] = n * made.work.training_flops
    made.counts["bytes"] = 3 * made.work.bytes(n, case.torch_dtype.itemsize)
    made.counts["bytes"] += 4 * PASSES_OF_PARAMETERS * made.work.parameters
    made.counts["normals"] = 2 * math.prod(made.shape)  # for x_t, and again for the loss
    config = TrainConfig(batch_size=n, precision=case.dtype, label_drop=0.0)
    size = (max(IMAGES, 4 * n), *made.shape[1:])
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(len(images)) % made.config.num_classes if made.config.num_classes else None
    data = Dataset(images, labels, None, "random pixels")

    def several(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(case.steps):
                step()

        return run

    trainers = _trainers(made, config, data)
    first = next(iter(trainers.values()))
    plain = {"torch": reference_step(first.model, diffusion, config, data)}
    if made.has(peers.DIFFUSERS):
        plain[peers.DIFFUSERS] = diffusers_step(first.model, diffusion, config, data)
    # The first batch as ours draws it: its timesteps, noise and images.
    key = df.NoiseKey.of(config.seed, n, stream=df.Stream.TRAINING, device=device)
    t, *_ = first.timestep_sampler.sample(dataclasses.replace(key, stream=df.Stream.TIMESTEP))
    batch = data.batch(batch_indices(config.seed, 0, n, len(data)))
    pixels, classes = (None if part is None else part.to(device) for part in batch)
    noise = df.ops.normal(key, size[1:])
    truth = plain["torch"].loss(pixels, t, noise, classes, autocast=False).detach()

    def add(label: str, step: PlainStep) -> None:
        made.runs[label] = several(step)
        loss = step.loss(pixels, t, noise, classes, autocast=case.dtype == "bf16").detach()
        made.compare(label, loss, truth, TOLERANCE[case.dtype])

    def add_compiled(label: str, compiled: Callable) -> None:
        add(label, diffusers_step(first.model, diffusion, config, data, compiled, tuned=True))

    for label, step in plain.items():
        add(label, step)
    if peers.DIFFUSERS in plain:
        made.add_compiled(add_compiled)
    for label, trainer in trainers.items():  # last, as what is compared is a step that changes the weights
        with made.run.surviving(f"{case}, {label}"):
            made.compare(label, trainer.train_step()[0], truth, TOLERANCE[case.dtype])
            made.ours.append(label)
            made.runs[label] = several(trainer.train_step)
    if made.has(peers.LUCIDRAINS):
        _add_lucidrains(made, config, data)


def _trainers(made: Comparison, config: TrainConfig, data: Dataset) -> dict[str, Trainer]:
    """Ours, by the way in which a step is run, all from the same weights; those that cannot be had are put down."""
    network, trainers = dataclasses.replace(made.config, dropout=0.0), {}
    for label, options in made.ways().items():
        with made.run.surviving(f"{made.case}, {label}"):
            trainers[label] = Trainer(network, made.diffusion, config, data, made.device, **options)
            trainers[label].model.load_state_dict(made.model.state_dict())
    return trainers


def _add_lucidrains(made: Comparison, config: TrainConfig, data: Dataset) -> None:
    """denoising-diffusion-pytorch's Trainer on its own network, and on the images as files in a folder."""
    if made.device.type == "cpu" and torch.cuda.is_available():
        made.absent(peers.LUCIDRAINS, "its Trainer takes the GPU where there is one")
        return
    if made.case.batch < LEAST_BATCH:
        made.absent(peers.LUCIDRAINS, f"its Trainer takes batches of at least {LEAST_BATCH}")
        return
    from accelerate.state import AcceleratorState
    from denoising_diffusion_pytorch import Trainer as TheirTrainer

    AcceleratorState._reset_state()  # it holds one precision a process, and a run has both
    folder = tempfile.TemporaryDirectory()
    for i, image in enumerate(data.images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(Path(folder.name) / f"{i}.png")
    network = peers.lucidrains_network(made.case.size, made.config.in_channels)
    options = {"train_batch_size": config.batch_size, "train_num_steps": 0, "train_lr": config.lr}
    options |= {"ema_update_every": 1, "ema_decay": config.ema_decay, "augment_horizontal_flip": config.flip}
    options |= {"max_grad_norm": config.grad_clip, "amp": config.precision == "bf16", "mixed_precision_type": "bf16"}
    options |= {"save_and_sample_every": 2**62, "calculate_fid": False, "results_folder": f"{folder.name}/results"}
    trainer = TheirTrainer(
        peers.lucidrains_diffusion(network, made.config.image_size),
        folder.name,
        **options,
    )

    def steps(kept: tempfile.TemporaryDirectory = folder) -> None:  # the files last as long as what reads them
        trainer.train_num_steps += made.case.steps
        with peers.silent():
            trainer.train()

    made.runs[peers.LUCIDRAINS] = steps
    made.note_lucidrains("its Trainer, which reads image files in processes of its own")
