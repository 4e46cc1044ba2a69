"""Which network turns images into features: the one of a package, or that of a file or module of the user's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ddpm_fast.errors import InputError
from ddpm_fast.metrics.features import efficientnet
from ddpm_fast.metrics.features.extractor import Extractor


def load_extractor(
    source: str | Path | nn.Module | None = None, device: str | torch.device = "cpu", resize: int | None = None
) -> Extractor:
    """A network that turns images into vectors.

    Args:
        source: None or "efficientnet-lite0": the network of the extra [metrics].
        device: Where it computes, such as "cuda".
        resize: The side that images get before they reach the network; None: what the network is made for.

    Raises:
        InputError: The file or package is missing or is something else, or the device cannot be used.
    """
    place = _usable(device)
    if source is None or source == efficientnet.NAME:
        return efficientnet.load(place, resize)
    raise InputError(f"features {source!r:.200} are not known; expected {efficientnet.NAME}")


def _usable(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"device {device!r:.100} cannot be used here ({reason:.200}); expected cpu or cuda") from None
    return place
