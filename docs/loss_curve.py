"""Draws the loss curve of a training run: python docs/loss_curve.py RUN_FOLDER OUT.png"""

import sys
from pathlib import Path

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(run: Path, out: Path) -> None:
    curves = EventAccumulator(str(run / "curves"))
    curves.Reload()
    points = curves.Scalars("loss")
    steps, losses = [p.step for p in points], [p.value for p in points]
    hours = (points[-1].wall_time - points[0].wall_time) / 3600
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot(steps, losses, linewidth=1)
    axes.set(xlabel="step", ylabel="mean loss of 50 steps", yscale="log", title=f"{run.name}: {hours:.2f} hours")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
