"""Features of any network: a TorchScript file, which NVIDIA's Inception is one of, or a module in Python.

A TorchScript file is a program. It is run, and so only the user's own word may bring it here.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.errors import InputError, check_integer, printable
from ddpm_fast.files.digest import sha256_of
from ddpm_fast.files.memory import is_out_of_memory
from ddpm_fast.metrics.feature_set import Kind
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.features.network import extractor_of, in_full_precision
from ddpm_fast.metrics.features.resizing import as_rgb, bicubic_uint8

_TRIED = 64  # pixels of the images that a network is tried with where no size is given
_CLOSE = 1e-4  # how far two ways to the same probabilities may differ


def load_torchscript(path: Path, device: torch.device, resize: int | None) -> Extractor:
    """The network of a TorchScript file, which is a program and is run.

    Args:
        path: The file.
        device: Where it computes.
        resize: See `of_module`.

    Raises:
        InputError: The file is damaged, or the network is none of features.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which is how such files are read
            module = torch.jit.load(path, map_location=device)
    except Exception as error:  # a damaged file may raise anything
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path} cannot be read as TorchScript ({_reason(error)}): fetch or save it again") from error
    return _tried(module, path.stem, sha256_of(path), device, resize)


def of_module(module: nn.Module, device: torch.device, resize: int | None) -> Extractor:
    """A module in Python as an extractor. It is copied, and the copy is in eval mode.

    Args:
        module: Takes uint8 RGB images [n, 3, H, W] in 0..255; gives features [n, d], or a pair of these and logits
            [n, classes]. If its forward has an argument return_features, as NVIDIA's Inception has, that is set for
            the features; without it, but with no_output_bias, if it has that too, it gives probabilities.
        device: Where it computes.
        resize: The side of the squares that it gets, by antialiased bicubic interpolation, rounded to 0..255; None: it
            gets images of the size that they have.

    Raises:
        InputError: The module fails, or gives something else.
    """
    state = module.state_dict()
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    name = getattr(module, "original_name", type(module).__name__)  # TorchScript's classes are all called the same
    with torch.no_grad():  # else TorchScript's copies are results of the originals, not leaves
        own = copy.deepcopy(module).to(device)
    return _tried(own, name, digest.hexdigest(), device, resize)


def _tried(module: nn.Module, name: str, digest: str, device: torch.device, resize: int | None) -> Extractor:
    """An extractor of a network that has been tried with two images."""
    if resize is not None:
        check_integer("resize", resize, 1, 4096)
    module.eval()
    name = printable(name)[:100]
    side = resize or _TRIED
    levels = torch.arange(2 * 3 * side * side).mul_(2654435761).bitwise_right_shift_(13).bitwise_and_(255)
    images = levels.view(2, 3, side, side).to(torch.uint8).to(device)
    with in_full_precision(device):
        try:
            run = _nvidia(module, images) if "return_features" in _arguments(module) else module
            features, logits = _pair(run(images), len(images), name)
        except InputError:
            raise
        except Exception as error:  # a network may raise anything
            if is_out_of_memory(error):
                raise
            size = "" if resize else "; say by resize (--feature-size) what size it takes"
            raise InputError(
                f"{name} fails for uint8 images {list(images.shape)} on {device.type} ({_reason(error)}); expected a "
                f"network that takes uint8 RGB images [n, 3, H, W] in 0..255{size}"
            ) from error
    widths = (features.shape[1], None if logits is None else logits.shape[1])

    def compute(images: Tensor) -> tuple[Tensor, Tensor | None]:
        images = as_rgb(images if resize is None else bicubic_uint8(images, resize)).contiguous()
        features, logits = _pair(run(images), len(images), name)
        found = (features.shape[1], None if logits is None else logits.shape[1])
        if found != widths:
            raise InputError(
                f"{name} gives {found} features and logits for images {list(images.shape)}, and {widths} for others; "
                "say by resize (--feature-size) what size it takes"
            )
        return features, logits

    resizing = "as the network does" if resize is None else f"bicubic, antialiased, rounded, to {resize}x{resize}"
    return extractor_of(Kind(name, resizing, digest), features.shape[1], device, compute)


def _arguments(module: nn.Module) -> set[str]:
    """The names of the arguments of a module's forward."""
    if isinstance(module, torch.jit.ScriptModule):
        schema: Any = getattr(module.forward, "schema", None)
        return {argument.name for argument in schema.arguments} if schema is not None else set()
    return set(inspect.signature(module.forward).parameters)


def _nvidia(module: nn.Module, images: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Features and logits of a network that gives features if return_features is set, and else probabilities.

    The logits are without the bias, if the network can leave it out. They take a second pass, unless the network's
    probabilities for `images` are those of its features and output.weight.
    """
    without_bias = {"no_output_bias": True} if "no_output_bias" in _arguments(module) else {}

    def twice(images: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = module(images, **without_bias).float()
        # Softmax of the logarithm gives the probabilities again.
        return module(images, return_features=True), probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()

    weight = module.state_dict().get("output.weight")
    features, logits = twice(images)
    if not isinstance(weight, Tensor) or not without_bias or tuple(weight.shape[1:]) != tuple(features.shape[1:]):
        return twice
    matrix = weight.float()

    def once(images: Tensor) -> tuple[Tensor, Tensor]:
        features = module(images, return_features=True)
        return features, F.linear(features.float(), matrix)

    apart = once(images)[1].softmax(1) - logits.softmax(1)
    return once if bool((apart.abs() <= _CLOSE).all()) else twice


def _pair(given: object, n: int, name: str) -> tuple[Tensor, Tensor | None]:
    """What a network gave, checked: fp32 features and logits."""
    parts = list(given) if isinstance(given, (tuple, list)) else [given]
    floats = [part.float() for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    if 1 <= len(floats) == len(parts) <= 2 and all(p.ndim == 2 and len(p) == n and p.shape[1] for p in floats):
        return floats[0], floats[1] if len(floats) == 2 else None
    shown = ", ".join(
        f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__ for part in parts[:4]
    )
    raise InputError(
        f"{name} gives {shown:.300} for {n} images; expected floats: features [{n}, d], or a pair of features "
        f"and logits [{n}, classes]"
    )


def _reason(error: Exception) -> str:
    """The last line of what an exception says: TorchScript puts a traceback before it."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{printable(lines[-1].strip()):.200}"
