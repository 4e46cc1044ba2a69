"""The train command run in this process, on images and with a network so small that a run takes a fraction of a
second."""

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from ddpm_fast.commands import train
from ddpm_fast.files import checkpoint

SMALL = [
    "--model-channels=4",
    "--channel-mult=1",
    "--num-res-blocks=1",
    "--timesteps=20",
    "--batch-size=4",
    "--warmup=1",
    "--log-every=1",
    "--sample-every=0",
    "--precision=fp32",
    "--device=cpu",
]


def command(*arguments, status=0):
    """Run the command, which must end with this exit status: its result has stdout and stderr."""
    run = CliRunner().invoke(train.app, [str(a) for a in arguments], catch_exceptions=False)
    assert run.exit_code == status, run.stderr + run.stdout
    return run


def start(data, out, *arguments, status=0):
    """Start a small run."""
    return command(f"--data={data}", f"--out={out}", *SMALL, *arguments, status=status)


def pictures(folder, classes, first=0):
    """Write four 8x8 pictures of each class into a sub-folder of its name; their contents follow from `first`."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            rng = np.random.default_rng([first, number, i])
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            image.save(folder / name / f"{first + i}.png")
    return folder


def meta(out):
    """What the newest state in a folder says about itself."""
    return checkpoint.read_training(checkpoint.latest_checkpoint(out))[1]


def weights(out):
    """All tensors of the newest state in a folder."""
    return checkpoint.read_training(checkpoint.latest_checkpoint(out))[0]
