"""Makes pictures for docs/evaluating.md with the shipped model: python docs/evaluating.py OUT_FOLDER

The sweep takes most of the time, ten minutes of two idle cores of a CPU, and goes on where it was stopped. Its JSON and
its table are in the folder too.
"""

import subprocess
import sys
from pathlib import Path

from PIL import Image
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.data import load_dataset
from ddpm_fast.metrics import nearest, sample_densities
from ddpm_fast.metrics.features.extract import extract
from ddpm_fast.metrics.features.load import load_extractor
from ddpm_fast.pictures.canvas import save_figure
from ddpm_fast.pictures.figures import draw_samples

SWEEP = (
    "all --metrics fid,kid,pr --model mnist --reference mnist5k --n 500 "
    "--sweep steps=5,10,20 --sweep sampler=ddpm,ddim,dpmpp_2m --sweep guidance=1,2"
)
N, SHOWN = 500, 12


def features(images: Tensor) -> Tensor:
    """Those of uint8 images, fp32 [n, d]."""
    return extract(load_extractor(), images.split(100)).features


def among_real_images() -> tuple[list[Tensor], list[str]]:
    """Rows of samples: the nearest ones beside the training image that each is nearest to, the worst and the best."""
    loaded = df.load_model("mnist")
    labels = [i % 10 for i in range(N)]
    x = df.sample(loaded.model, loaded.diffusion, N, sampler="dpmpp_2m", steps=10, labels=labels, batch_size=100)
    fake = ((x + 1) * 127.5).round().clamp(0, 255).byte()
    real = load_dataset("mnist5k").images[::2]
    ours, theirs = features(fake), features(real)
    distances, indices = nearest(ours, theirs)
    closest = distances[:, 0].argsort()[:SHOWN]
    order = sample_densities(theirs, ours).argsort(stable=True)
    rows = [fake[closest], real[indices[closest, 0]], fake[order[:SHOWN]], fake[order.flip(0)[:SHOWN]]]
    return [row.float() / 127.5 - 1 for row in rows], ["nearest", "training image", "worst", "best"]


def smaller(path: Path) -> None:
    """Write a picture with 128 colours, which is a third of the bytes."""
    with Image.open(path, formats=("PNG",)) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sweep = folder / "evaluating-sweep.json"
    subprocess.run([sys.executable, "-m", "ddpm_fast.evaluate", *SWEEP.split(), "--out", sweep], check=True)
    save_figure(draw_samples(*among_real_images()), folder / "evaluating-page.png")
    for picture in (sweep.with_suffix(".png"), folder / "evaluating-page.png"):
        smaller(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
