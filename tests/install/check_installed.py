"""Whether an installed package works: the check of a wheel. Run it from a folder that is not a clone:

python FOLDER/tests/install/check_installed.py          # a wheel with kernels
python FOLDER/tests/install/check_installed.py pure     # one of pure Python
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

import ddpm_fast as df
from ddpm_fast.ops.backends import cpu

CLONE = Path(__file__).resolve().parents[2]


def check(pure: bool) -> None:
    where = Path(df.__file__).resolve().parent
    assert CLONE not in where.parents, f"{where} is the clone's: run this from another folder, with the wheel installed"
    assert pure == bool(cpu.unavailable), cpu.unavailable or "there are kernels in a wheel of pure Python"

    key = df.NoiseKey.of(seed=3, n=5)
    with df.use_backend("reference"):
        expected = df.ops.normal(key, (1000,))
    assert torch.equal(df.ops.normal(key, (1000,)), expected), "the noise has other bits"

    names = df.available_models()
    assert names, "no model is in the wheel"
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            picture = Path(folder) / f"{name}.png"
            command = ["ddpm_fast.sample", "--model", name, "--n", "4", "--steps", "4", "--out", str(picture)]
            subprocess.run([sys.executable, "-m", *command], cwd=folder, check=True)
            with Image.open(picture, formats=("PNG",)) as image:
                low, high = image.convert("L").getextrema()
            assert high - low > 100, f"{name} drew nothing"
    subprocess.run([sys.executable, "-m", "ddpm_fast.info"], check=True)


if __name__ == "__main__":
    check(pure="pure" in sys.argv[1:])
    print("the installed package works")
