"""What else `python -m ddpm_fast.sample` draws by: a classifier that guides, and the images that a model enlarges."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.commands.edit import read_bytes, with_channels
from ddpm_fast.errors import InputError
from ddpm_fast.files.classifier import digest_of
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.load_classifier import load_classifier
from ddpm_fast.loops.network import Network
from ddpm_fast.nn.classifier import Classifier


@dataclass(frozen=True)
class Guide:
    """A classifier that guides.

    Attributes:
        classifier: The classifier.
        scale: The factor of its gradient.
    """

    classifier: Classifier
    scale: float

    @classmethod
    def of(
        cls, source: str | None, scale: float | None, flags: str | None, device: torch.device, dtype: torch.dtype
    ) -> Guide | None:
        """The guide that the options ask for, or None. Raises InputError for options that do not belong together."""
        if source is None:
            for name, value in (("--classifier-scale", scale), ("--classifier-flags", flags)):
                if value is not None:
                    raise InputError(f"{name} is for a classifier: give its file with --classifier")
            return None
        return cls(load_classifier(source, device, dtype, flags), 1.0 if scale is None else scale)

    def settings(self) -> dict[str, Any]:
        """What an image depends on, as JSON's types."""
        return {"classifier": self._digest, "classifier_scale": self.scale}

    @cached_property
    def _digest(self) -> str:
        return digest_of(self.classifier)


@dataclass(frozen=True)
class SecondImages:
    """The images that a model is given beside the noised one, used in turn.

    Attributes:
        images: uint8 [K, C, h, w].
    """

    images: Tensor

    @classmethod
    def read(cls, path: Path, loaded: LoadedModel) -> SecondImages:
        """Those in a file. Raises InputError for a file that does not fit the model."""
        channels = Network.of(loaded.model).condition_channels
        if not channels:
            raise InputError(
                "--condition is for a model that enlarges images, and this one draws from noise alone: leave it out, "
                "or edit a picture with --init-image"
            )
        return cls(with_channels(read_bytes(path, "--condition"), channels, path, "--condition"))

    def of(self, ids: range) -> Tensor:
        """Those of the images with these sample ids, [len(ids) or 1, C, h, w]."""
        count = len(self.images)
        return self.images if count == 1 else self.images[[i % count for i in ids]]

    def settings(self) -> dict[str, Any]:
        """What an image depends on, as JSON's types."""
        return {"condition": hashlib.sha256(self.images.contiguous().numpy().tobytes()).hexdigest()}
