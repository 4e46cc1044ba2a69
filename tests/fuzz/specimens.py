"""Good files, as bytes: a model, a training state, pictures of every format, arrays and archives. All are small."""

from __future__ import annotations

import functools
import io
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, features

import ddpm_fast as df
from ddpm_fast.data import Dataset
from ddpm_fast.files import checkpoint
from ddpm_fast.loops.training import TrainConfig, Trainer

CONFIG = df.UNetConfig(
    image_size=4,
    in_channels=1,
    model_channels=4,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    num_classes=2,
    norm_groups=2,
)


@functools.cache
def trainer() -> Trainer:
    images = torch.arange(4 * 16).reshape(4, 1, 4, 4).to(torch.uint8)
    data = Dataset(images, torch.tensor([0, 1, 0, 1]), ["cat", "dog"], "made")
    diffusion = df.GaussianDiffusion(df.Schedule.cosine(8), "v")
    return Trainer(CONFIG, diffusion, TrainConfig(batch_size=2, warmup=1), data, torch.device("cpu"))


class States(NamedTuple):
    model: bytes
    training: bytes


@functools.cache
def states() -> States:
    """The files that a training run leaves."""
    with tempfile.TemporaryDirectory() as name:
        made = trainer()
        made.train_step()
        path = made.save(Path(name), {"data": "made", "steps": 1})
        return States((Path(name) / "model.safetensors").read_bytes(), path.read_bytes())


@functools.cache
def model_state() -> tuple[dict[str, torch.Tensor], dict]:
    """What the model's file holds."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "m.safetensors"
        path.write_bytes(states().model)
        return checkpoint.read_model(path)


@functools.cache
def training_state() -> tuple[dict[str, torch.Tensor], dict]:
    """What the training state's file holds."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "s.safetensors"
        path.write_bytes(states().training)
        return checkpoint.read_training(path)


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@functools.cache
def pictures() -> dict[str, bytes]:
    """Files of 12x10 pixels by suffix."""
    y, x = np.mgrid[:10, :12]
    colour = Image.fromarray(np.stack([20 * x, 25 * y, 10 * (x + y)], 2).astype(np.uint8))
    grey = colour.convert("L")
    made = {
        "png": _encoded(colour, "PNG"),
        "grey.png": _encoded(grey, "PNG"),
        "16.png": _encoded(Image.fromarray(257 * np.asarray(grey).astype(np.uint16)), "PNG"),
        "palette.png": _encoded(colour.quantize(16), "PNG"),
        "alpha.png": _encoded(colour.convert("RGBA"), "PNG"),
        "jpg": _encoded(colour, "JPEG"),
        "exif.jpeg": _encoded(colour, "JPEG", exif=_orientation()),
        "gif": _encoded(colour.quantize(8), "GIF"),
        "two.gif": _encoded(colour.quantize(8), "GIF", save_all=True, append_images=[grey]),
        "bmp": _encoded(colour, "BMP"),
        "tif": _encoded(colour, "TIFF"),
        "lzw.tiff": _encoded(colour, "TIFF", compression="tiff_lzw"),
        "tga": _encoded(colour, "TGA"),
        "ico": _encoded(colour, "ICO"),
        "ppm": _encoded(colour, "PPM"),
        "pgm": _encoded(grey, "PPM"),
    }
    for name, suffix, form in (("webp", "webp", "WEBP"), ("avif", "avif", "AVIF"), ("jpg_2000", "jp2", "JPEG2000")):
        if features.check(name):
            made[suffix] = _encoded(colour, form)
    return made


def _orientation() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return exif.tobytes()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
# What must not be opened as a picture, whatever its name.
FOREIGN = {
    "postscript": POSTSCRIPT,
    "html": b"<html><body>no picture</body></html>",
    "pdf": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "xbm": b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {0,1,2,3,4,5,6,7};\n",
    "pcx": b"\x0a\x05\x01\x08" + bytes(124),
    "empty": b"",
    "zeros": bytes(100),
    "text": b"hello",
}


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    images = np.arange(6 * 5 * 5 * 3).reshape(6, 5, 5, 3).astype(np.uint8)
    names = np.array(["cat", "dog", "fish"])
    return {"images": images, "labels": np.array([0, 1, 2, 0, 1, 2]), "label_names": names}


def npz(given: dict[str, np.ndarray], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **given)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def archive(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as made:
        for name, content in members:
            made.writestr(zipfile.ZipInfo(name), content, compression)
    return file.getvalue()


@functools.cache
def bomb(name: str, megabytes: int, start: bytes = b"") -> bytes:
    """An archive whose member of that name unpacks to so many zeros behind a start."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made, made.open(name, "w") as member:
        member.write(start)
        for _ in range(megabytes):
            member.write(bytes(1 << 20))
    return file.getvalue()


@functools.cache
def make_all() -> None:
    """Everything, once, before workers are forked."""
    states()
    model_state()
    training_state()
    pictures()
    arrays()
