"""A model that has been loaded, wherever it is from: its network, its diffusion, and what else its file says."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files.digest import sha256_of
from ddpm_fast.nn.unet import UNet
from ddpm_fast.values import ValueRange


@dataclass
class LoadedModel:
    """A model to sample from.

    Attributes:
        model: The network, in eval mode: a UNet, or another library's network that is called as one.
        diffusion: What it was trained with.
        config: The config that it was saved with. Of another library's model it says where it is from ("origin"), and
            it has no "unet" if the network is not ours.
        label_names: One name for each class, or None.
        path: The file, or the folder of another library's model.
        value_range: What [-1, 1] stands for in the data that it was trained on, or None: 8-bit images.
        files: Another library's files, from which the weights and the config were read; none for a file of ours.
    """

    model: nn.Module
    diffusion: GaussianDiffusion
    config: dict[str, Any]
    label_names: list[str] | None
    path: Path
    value_range: ValueRange | None = None
    files: tuple[Path, ...] = ()

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file: 64 hexadecimal digits. Of several files, or with flags, that of their list."""
        if not self.files:
            return sha256_of(self.path)
        parts = [f"{file.name} {sha256_of(file)}" for file in self.files] + [self.origin.get("flags") or ""]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def name(self) -> str:
        """What to call it in a report: the file's name, or the place on the Hub."""
        return self.origin.get("hub") or self.path.name

    @property
    def origin(self) -> dict[str, Any]:
        """Where another library's model, or one of the Hub, is from; empty for a file that was trained here."""
        return self.config.get("origin") or {}

    @property
    def unet(self) -> UNet:
        """The model, which is our U-Net.

        Raises:
            InputError: If the network is another library's.
        """
        if not isinstance(self.model, UNet):
            raise InputError(
                f"{self.path} is {self.network_name}, another library's network, which can be sampled from and "
                "measured. To be trained further, converted or exported it would have to be a U-Net of ours"
            )
        return self.model

    @property
    def network_name(self) -> str:
        """What the network is called: "U-Net", or of another library's its format and class."""
        if isinstance(self.model, UNet):
            return "U-Net"
        name = self._described("name") or type(self.model).__name__
        return f"{self.origin['format']}'s {name}" if self.origin.get("format") else str(name)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one sample, (C, H, W).

        Raises:
            InputError: If the network is another library's and does not say.
        """
        shape = self._described("shape")
        if shape is None:
            raise InputError(f"{self.path} does not say what shape its samples have: give df.sample the shape")
        return shape

    @property
    def classes(self) -> int:
        """The number of classes; 0 of an unconditional model."""
        return (self.model.config.num_classes if isinstance(self.model, UNet) else self._described("classes")) or 0

    @property
    def has_null_class(self) -> bool:
        """Whether it can be called without labels: an unconditional model, or one with a null class."""
        if isinstance(self.model, UNet):
            return not self.classes or self.model.config.null_class
        return not self._described("needs_labels")

    def _described(self, name: str) -> Any:
        """What our network's config, or another library's network itself, says; None if it does not."""
        return getattr(self.model.config if isinstance(self.model, UNet) else self.model, name, None)

    def to_values(self, x: Tensor) -> Tensor:
        """Samples in the units of the data that the model was trained on: float32 [N, C, H, W].

        Args:
            x: What `sample` and the editing functions return, [N, C, H, W] in [-1, 1].

        Raises:
            InputError: If the model was trained on 8-bit images, or x has other channels.
        """
        return self._range().to_values(x)

    def to_model(self, values: Tensor) -> Tensor:
        """Values in the units of the data that the model was trained on, as the editing functions take them.

        Args:
            values: Floats [N, C, H, W]. Those beyond the range of the training data are clipped to it.

        Returns:
            float32 [N, C, H, W] in [-1, 1].

        Raises:
            InputError: If the model was trained on 8-bit images, or the values have other channels.
        """
        return self._range().to_model(values)

    def _range(self) -> ValueRange:
        if self.value_range is None:
            raise InputError(
                f"{self.path} was trained on 8-bit images, which have no units; x in [-1, 1] is the grey level "
                "(x + 1) * 127.5, and the editing functions take uint8 as it is"
            )
        return self.value_range
