"""`load_classifier`: a classifier of noised images, from a file of ours or of guided-diffusion."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ddpm_fast.errors import InputError
from ddpm_fast.files.classifier import read_classifier
from ddpm_fast.files.pickles import read_pickle
from ddpm_fast.formats import hub
from ddpm_fast.formats.load import is_pickle
from ddpm_fast.formats.openai import classifier as openai_classifier
from ddpm_fast.formats.repository import PREFIX
from ddpm_fast.nn.classifier import Classifier


def load_classifier(
    source: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    flags: str | None = None,
) -> Classifier:
    """Load a classifier of noised images, which guides a sampler: df.sample(..., classifier=...).

    Args:
        source: A file that save_classifier wrote; a .pt file of guided-diffusion's classifier; or either of these on
            the Hugging Face Hub, as `hf:OWNER/NAME@REVISION/FILE`.
        device: Where to put it.
        dtype: The dtype of the parameters; None means float32.
        flags: What guided-diffusion's scripts were given, such as "--image_size 128 --classifier_width 128". A file
            says nearly all of it itself; what contradicts it is refused.

    Returns:
        The classifier, in eval mode.

    Raises:
        InputError: For a source that is missing, damaged or no classifier, and for flags that do not fit it.
    """
    return _read(_path_of(source), flags).to(device=device, dtype=dtype)


def is_other_classifier(source: str | os.PathLike) -> bool:
    """Whether a source is another library's classifier, so that `load_model` cannot load it.

    Raises:
        InputError: For a checkpoint of PyTorch that is damaged or unsafe, and for a source that cannot be downloaded.
    """
    path = _path_of(source)
    return is_pickle(path) and openai_classifier.claims(read_pickle(path))


def _path_of(source: str | os.PathLike) -> Path:
    name = os.fspath(source)
    return hub.download(name)[0] if name.startswith(PREFIX) else Path(os.path.expanduser(name))


def _read(path: Path, flags: str | None) -> Classifier:
    if not is_pickle(path):
        if flags is not None:
            raise InputError(f"{path} says itself how its classifier is made: leave the flags out")
        return read_classifier(path)
    content = read_pickle(path)
    if not openai_classifier.claims(content):
        raise InputError(f"{path} holds no classifier of guided-diffusion; expected its parameters under its names")
    return openai_classifier.read(content, path, flags)
