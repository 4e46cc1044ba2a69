"""The network alone as an ONNX file, for programs without PyTorch (pip install 'ddpm-fast[onnx]').

Inputs are x, t and, where the network has them, labels and condition; the batch is free, the size is the config's. A
sampling loop around it is the reader's, so the file also holds the diffusion as JSON, under the key "ddpm_fast".
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.outputs import Inputs
from ddpm_fast.nn.pending import unfused
from ddpm_fast.nn.unet import UNet
from ddpm_fast.ops import use_backend

OPSET = 18  # of December 2022; from it on GroupNormalization and Resize are what PyTorch's exporter writes
_MOST_BYTES = 2**31 - 2**24  # a file of protobuf cannot be larger than 2 GiB
_NAMES = ("x", "t", "labels", "condition")


def export_onnx(loaded: LoadedModel, path: str | os.PathLike) -> float | None:
    """Write a network as an ONNX file.

    Args:
        loaded: The model, in fp32 on the CPU.
        path: The file to write.

    Returns:
        How far onnxruntime's outputs are from ours, the largest difference relative to the root mean square of the
        outputs; None if onnxruntime is not installed.

    Raises:
        InputError: If the network is another library's, is larger than such a file may be, or the path cannot be
            written; and if the package onnxscript is missing, which PyTorch's exporter needs.
    """
    model = loaded.unet
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size > _MOST_BYTES:
        raise InputError(
            f"{loaded.path} has {size:,} bytes of weights; an ONNX file holds at most 2 GiB: export others"
        )
    inputs = Inputs.of(model.config, loaded.diffusion.num_timesteps, longest_side=None)
    given = {name: value for name in _NAMES if (value := getattr(inputs, name)) is not None}
    batch = torch.export.Dim("n", min=1)
    try:
        with _quiet(), use_backend("reference"), unfused(), torch.no_grad():
            program = torch.onnx.export(
                model,
                kwargs=given,
                dynamo=True,
                input_names=list(given),
                output_names=["output"],
                dynamic_shapes={name: {0: batch} for name in given},
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except ImportError as error:
        raise InputError(
            f"an ONNX file needs the packages onnx and onnxscript ({error}); install them: pip install "
            "'ddpm-fast[onnx]'"
        ) from error
    assert program is not None
    program.model.metadata_props["ddpm_fast"] = json.dumps(
        {name: loaded.config.get(name) for name in ("diffusion", "label_names", "value_range")}
    )
    with atomic_path(path) as temporary:
        program.save(os.fspath(temporary))
        return _difference(temporary, model, given)


def _difference(path: Path, model: UNet, given: dict[str, Tensor]) -> float | None:
    """How far onnxruntime's outputs are from ours, of all inputs and of the first one alone."""
    try:
        import onnxruntime  # an optional dependency
    except ImportError:
        return None
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for n in (len(given["x"]), 1):
        part = {name: value[:n] for name, value in given.items()}
        (found,) = session.run(None, {name: value.numpy() for name, value in part.items()})
        with torch.inference_mode():
            expected = model(**part)
        apart = (torch.from_numpy(found) - expected).abs().max() / expected.square().mean().sqrt()
        worst = max(worst, float(apart))
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, PyTorch's exporter does not tell of packages that it does not find and of what it will change."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
