"""Trains the digits' network on a CPU with our kernels and with plain torch, from two seeds each, and says how far the
loss curves are apart: python docs/loss_spread.py OUT.png [--steps 500] [--batch-size 64]

For each stretch of 50 steps it compares the mean loss of ours with that of plain torch, from the same seed. The measure
is how far plain torch's are apart from two seeds. Ours and plain torch see the same images and noise, so they differ by
rounding only: that of Winograd's convolutions, and of the fused norms and losses.
"""

import argparse
from pathlib import Path

import matplotlib
import torch

from ddpm_fast import GaussianDiffusion, Schedule, use_backend
from ddpm_fast.data import load_dataset
from ddpm_fast.loops.training import TrainConfig, Trainer
from ddpm_fast.nn import UNetConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STRETCH = 50  # steps
NETWORK = UNetConfig(
    image_size=28,
    in_channels=1,
    model_channels=32,
    channel_mult=(1, 2, 4),
    num_res_blocks=1,
    attention_resolutions=(7,),
    num_classes=10,
)
BACKENDS = {"ours": None, "plain torch": "reference"}
SEEDS = (0, 1)


def losses(backend: str | None, seed: int, steps: int, batch_size: int) -> torch.Tensor:
    """The mean loss of each stretch of a run."""
    diffusion = GaussianDiffusion(Schedule.cosine(1000), prediction="v", variance="fixed_small")
    config = TrainConfig(batch_size=batch_size, warmup=300, ema_decay=0.999, timestep_sampling="uniform", seed=seed)
    trainer = Trainer(NETWORK, diffusion, config, load_dataset("mnist5k", classes=True), torch.device("cpu"))
    with use_backend(backend):
        found = torch.stack([trainer.train_step()[0].double() for _ in range(steps)])
    return found.view(-1, STRETCH).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    curves = {}
    for seed in SEEDS:
        for name, backend in BACKENDS.items():
            curves[name, seed] = losses(backend, seed, options.steps, options.batch_size)
            print(f"{name}, seed {seed}:", *(f"{loss:.4f}" for loss in curves[name, seed]), flush=True)
    spread = (curves["plain torch", 0] - curves["plain torch", 1]).abs()
    print(f"plain torch, two seeds: {spread.mean():.2e} apart on average, {spread.max():.2e} at most")
    for seed in SEEDS:
        apart = (curves["ours", seed] - curves["plain torch", seed]).abs()
        print(f"ours and plain torch, seed {seed}: {apart.mean():.2e} on average, {apart.max():.2e} at most")
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    steps = torch.arange(STRETCH, options.steps + 1, STRETCH)
    for (name, seed), curve in curves.items():
        axes.plot(steps, curve, "-" if name == "ours" else ":", color=f"C{seed}", label=f"{name}, seed {seed}")
    axes.set(xlabel="step", ylabel=f"mean loss of {STRETCH} steps", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
