"""Writing and reading classifiers of noised images: model files whose config describes a classifier."""

import hashlib
import json
import os
from pathlib import Path

import torch

from ddpm_fast.errors import InputError
from ddpm_fast.files import tensorfile
from ddpm_fast.files.fit import build_classifier, check_finite
from ddpm_fast.nn.classifier import Classifier


def save_classifier(path: str | os.PathLike, classifier: Classifier, dtype: torch.dtype | None = None) -> None:
    """Write a classifier's file.

    Args:
        path: The file to write.
        classifier: On any device.
        dtype: What its weights are cast to; None for none.

    Raises:
        InputError: If it is no Classifier, weights are not finite (in `dtype`), or the path cannot be written; an older
            file stays untouched.
    """
    if not isinstance(classifier, Classifier):
        raise InputError(f"the classifier is a {type(classifier).__name__}; expected a ddpm_fast.Classifier")
    tensors = {name: value.detach().to(dtype) for name, value in classifier.state_dict().items()}
    check_finite(f"the classifier to be saved as {path}", tensors)
    tensorfile.write(path, tensorfile.MODEL, tensors, {"classifier": classifier.config.to_dict()})


def read_classifier(path: Path) -> Classifier:
    """The classifier that `save_classifier` wrote, in eval mode, with float32 weights on the CPU.

    Raises:
        InputError: For a file that is missing or damaged, or that is no classifier's.
    """
    _, state, config = tensorfile.read(path, tensorfile.MODEL)
    return build_classifier(path, state, config).eval()


def digest_of(classifier: Classifier) -> str:
    """The SHA-256 of a classifier's config and weights, wherever it is from: 64 hexadecimal digits."""
    found = hashlib.sha256(json.dumps(classifier.config.to_dict()).encode())
    for name, value in classifier.state_dict().items():
        found.update(name.encode())
        found.update(value.float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
