"""Makes the pictures of docs/sampling.md with the shipped model: python docs/edits.py OUT_FOLDER

Also prints the table of round-trip errors. Five minutes on one core of a CPU.
"""

import io
import sys
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.data import load_dataset

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOADED = df.load_model("mnist")
MODEL, DIFFUSION = LOADED.model, LOADED.diffusion


def digits(which: list[int], skip: int = 3) -> Tensor:
    """A training image of each of the given digits, [N, 1, 28, 28] in [-1, 1]."""
    data = load_dataset("mnist5k")
    at = [int((data.labels == digit).nonzero()[skip]) for digit in which]
    return data.images[at].float() / 127.5 - 1


def table(path: Path, rows: dict[str, Tensor], columns: list[str] | None = None) -> None:
    """Rows of images [N, 1, H, W] in [-1, 1], each with its name, under the columns' names."""
    width = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows),
        width,
        figsize=(1.5 + 0.72 * width, 0.74 * len(rows) + 0.25),
        squeeze=False,
        gridspec_kw={"wspace": 0.06, "hspace": 0.06},
    )
    for (name, images), line in zip(rows.items(), axes, strict=True):
        for i, axis in enumerate(line):
            axis.set(xticks=[], yticks=[])
            axis.set_visible(i < len(images))
            if i < len(images):
                axis.imshow(images[i, 0], cmap="gray", vmin=-1, vmax=1)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
    for axis, name in zip(axes[0], columns or [], strict=False):
        axis.set_title(name, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
    Image.open(drawn, formats=["PNG"]).convert("L").save(path, optimize=True)  # a third of the bytes


def samplers() -> dict[str, Tensor]:
    choices = [("ddpm", 250), ("ddpm", 50), ("ddpm", 10), ("ddim", 10), ("dpmpp_2m", 10), ("ddim", 5), ("dpmpp_2m", 5)]
    options = {"spacing": "even", "labels": list(range(10))}
    return {
        f"{sampler}, {steps} steps": df.sample(MODEL, DIFFUSION, 10, sampler=sampler, steps=steps, **options)
        for sampler, steps in choices
    }


def guided(scales: list[float], **options) -> dict[str, Tensor]:
    return {
        f"guidance {scale:g}": df.sample(
            MODEL, DIFFUSION, 10, steps=50, labels=list(range(10)), guidance=scale, **options
        )
        for scale in scales
    }


def overexposed() -> dict[str, Tensor]:
    ways = {
        "clipped": {},
        "dynamic_threshold 0.995": {"dynamic_threshold": 0.995},
        "dynamic_threshold 0.9": {"dynamic_threshold": 0.9},
        "guidance_rescale 0.7": {"guidance_rescale": 0.7},
    }
    return {name: guided([10.0], **options)["guidance 10"] for name, options in ways.items()}


def image_to_image() -> tuple[dict[str, Tensor], list[str]]:
    strengths = [0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0]
    which = [2, 5, 7, 9]
    images = digits(which)
    results = [df.image_to_image(MODEL, DIFFUSION, images, strength, steps=50) for strength in strengths]
    rows = torch.stack([images, *results], dim=1)
    columns = ["original", *(f"strength\n{strength}" for strength in strengths)]
    return {f"a {digit}": row for digit, row in zip(which, rows, strict=True)}, columns


def inpainting() -> tuple[dict[str, Tensor], list[str]]:
    mask = torch.zeros(28, 28)
    mask[:14] = 1
    rows = {}
    for digit in (3, 5, 7):
        image = digits([digit])
        drawn = df.inpaint(MODEL, DIFFUSION, image.repeat(6, 1, 1, 1), mask, steps=50)
        rows[f"upper half of a {digit}"] = torch.cat([image, torch.where(mask > 0, image, 0), drawn])
    return rows, ["original", "known", *(f"drawn {i + 1}" for i in range(6))]


def interpolation() -> dict[str, Tensor]:
    a, b = digits([3, 8])
    noised = {"strength": 0.6, "steps": 50}
    return {
        "noised": df.interpolate(MODEL, DIFFUSION, a, b, 10, **noised),
        "DDIM": df.interpolate(MODEL, DIFFUSION, a, b, 10, sampler="ddim", steps=100),
    }


def round_trip(steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ten digits, their latents and what they are decoded to."""
    images, labels = digits(list(range(10))), list(range(10))
    latents = df.encode(MODEL, DIFFUSION, images, steps, labels)
    return images, latents, df.decode(MODEL, DIFFUSION, latents, steps, labels)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    table(out / "samplers.png", samplers())
    table(out / "guidance.png", guided([0.0, 1.0, 2.0, 4.0]))
    table(out / "thresholding.png", overexposed())
    table(out / "image-to-image.png", *image_to_image())
    table(out / "inpainting.png", *inpainting())
    table(out / "interpolation.png", interpolation())
    images, latents, decoded = round_trip(50)
    rows = {"original": images, "latent, halved": latents / 2, "decoded": decoded, "difference": decoded - images}
    table(out / "round-trip.png", rows)
    print("| steps | mean squared error | PSNR |\n|---|---|---|")
    for steps in (10, 20, 50, 100, 250, 1000):
        images, _, decoded = round_trip(steps)
        mse = (decoded - images).square().mean()
        print(f"| {steps} | {mse:.2g} | {10 * torch.log10(4 / mse):.1f} dB |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
