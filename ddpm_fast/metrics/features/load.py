"""Which network turns images into features: the one of a package, or that of a file or module of the user's."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import nn

from ddpm_fast.errors import InputError
from ddpm_fast.files.pickles import read_pickle, state_dict
from ddpm_fast.files.tensorfile import check_is_file
from ddpm_fast.metrics.features import efficientnet, inception, module
from ddpm_fast.metrics.features.extractor import Extractor

_EXPECTED = (
    f"{efficientnet.NAME}, or a file: {inception.FILE} (weights of pytorch-fid and torch-fidelity), NVIDIA's "
    f"{inception.NAME}.pt, or another TorchScript file"
)


def load_extractor(
    source: str | Path | nn.Module | None = None, device: str | torch.device = "cpu", resize: int | None = None
) -> Extractor:
    """A network that turns images into vectors.

    | source | network | images it gets |
    |---|---|---|
    | None, "efficientnet-lite0" | the one of the extra [metrics] | 96x96, or resize |
    | pt_inception-2015-12-05-6726825d.pth | the Inception network of 2015 | 299x299, as TensorFlow 1 resizes |
    | inception-2015-12-05.pt (NVIDIA's) | the same, in TorchScript | as they are; it resizes as TensorFlow 1 does |
    | another TorchScript file, a module | any | uint8 RGB in 0..255, as they are, or resize |

    A TorchScript file is a program and is run: name none that is not from somebody you trust. Of other files no code
    is executed.

    Args:
        source: What the table says. What a module has to give is said at `module.of_module`.
        device: Where it computes, such as "cuda".
        resize: The side of the squares that the network gets; None: what it is made for.

    Raises:
        InputError: The file or package is missing or is something else, or the device cannot be used.
    """
    place = _usable(device)
    if source is None or source == efficientnet.NAME:
        return efficientnet.load(place, resize)
    if isinstance(source, nn.Module):
        return module.of_module(source, place, resize)
    if not isinstance(source, (str, Path)):
        raise InputError(f"features are {type(source).__name__:.100}; expected {_EXPECTED}, or a module")
    return _of_file(Path(source), place, resize)


def _of_file(path: Path, device: torch.device, resize: int | None) -> Extractor:
    check_is_file(path, _EXPECTED)
    if path.suffix in (".npy", ".npz"):
        raise InputError(f"{path} holds arrays, not a network; expected {_EXPECTED}")
    if path.suffix == ".pkl":
        raise InputError(
            f"{path} is a pickle, a program that may do anything, and is not run. Of NVIDIA's "
            f"{inception.NAME}.pkl there is the same network as TorchScript: give {inception.NAME}.pt (of "
            f"stylegan2-ada-pytorch), or {inception.FILE}"
        )
    if _is_torchscript(path):
        return module.load_torchscript(path, device, resize)
    state = state_dict(read_pickle(path), "state_dict")
    if not state:
        raise InputError(f"{path} holds no weights by names; expected {_EXPECTED}")
    return inception.load(path, state, device, resize)


def _is_torchscript(path: Path) -> bool:
    """Whether a file is an archive with the record that TorchScript has and torch.save has not."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return False  # read_pickle says what is wrong with it


def _usable(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"device {device!r:.100} cannot be used here ({reason:.200}); expected cpu or cuda") from None
    return place
