"""What the loops need to know of a network: where it is, what it takes and returns, and which labels fit it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.nn import UNet
from ddpm_fast.objective import output_channels


@dataclass(frozen=True, eq=False)
class Network:
    """A model, and the answers to what the loops ask about it. Make one with Network.of.

    Attributes:
        model: Called as model(x, t) or model(x, t, labels), with x [N, C, ...] and t int64 [N].
        device: Where its parameters are. The CPU for a model without parameters.
        dtype: The dtype of its parameters. None for a model without parameters, which is given x as it is.
        shape: The shape of one sample, (C, H, W), if no other is asked for. None for a network of one's own, which does
            not say.
        in_channels: C. None for a network of one's own.
        out_channels: The channels of its output. None for a network of one's own, which shows them when it is called.
        classes: The number of classes, 0 for an unconditional model. The null class has this number. None for a network
            of one's own, which does not say.
        may_wait: Whether calling it may wait for the device, which a CUDA graph does not allow. A UNet never does.
    """

    model: nn.Module
    device: torch.device
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None
    in_channels: int | None
    out_channels: int | None
    classes: int | None
    may_wait: bool

    @classmethod
    def of(cls, model: nn.Module) -> Network:
        """Ask a model everything once.

        Raises:
            InputError: If the model is not a torch.nn.Module.
        """
        if not isinstance(model, nn.Module):
            raise InputError(
                f"the model is a {type(model).__name__}; expected a torch.nn.Module, called as model(x, t)"
            )
        parameter = next(model.parameters(), None)
        config = model.config if isinstance(model, UNet) else None
        return cls(
            model=model,
            device=torch.device("cpu") if parameter is None else parameter.device,
            dtype=None if parameter is None else parameter.dtype,
            shape=None if config is None else config.shape,
            in_channels=None if config is None else config.in_channels,
            out_channels=None if config is None else config.out_channels,
            classes=None if config is None else config.num_classes,
            may_wait=type(model) is not UNet,  # a subclass may do more
        )

    @property
    def name(self) -> str:
        """The name of the model's class, for error messages."""
        return type(self.model).__name__

    def sample_shape(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        """The shape of one sample: the given one, or the network's own.

        Raises:
            InputError: If neither is known, if the given one is no shape, or if the network takes none of that shape.
        """
        if shape is not None and (not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) == 0):
            raise InputError(f"shape is {shape!r}; expected that of one sample, such as (3, 32, 32)")
        if shape is None:
            if self.shape is None:
                raise InputError(f"the shape of a {self.name}'s samples is not known: give shape=(C, H, W)")
            return self.shape
        given = tuple(check_integer(f"shape[{i}]", size, 1) for i, size in enumerate(shape))
        self.check_shape(given, f"shape is {given}")
        return given

    def check_shape(self, shape: tuple[int, ...], found: str) -> None:
        """Check that the network takes samples of a shape. A U-Net takes every height and width that its levels halve.

        Args:
            shape: The shape of one sample.
            found: What has this shape, for the message: a sentence such as "shape is (3, 64, 32)".

        Raises:
            InputError: If it has other channels, or cannot be halved. The message says which sizes can.
        """
        if not isinstance(self.model, UNet):
            return
        config = self.model.config
        if len(shape) != 3 or shape[0] != config.in_channels:
            raise InputError(f"{found}; this U-Net takes [{config.in_channels}, H, W], and was made for {config.shape}")
        if near := config.near_sizes(*shape[1:]):
            raise InputError(
                f"{found}; a height and a width have to be halved {len(config.channel_mult) - 1} times for the levels "
                f"of this U-Net: take {' or '.join(near)}"
            )

    def check_output(self, learned: bool) -> None:
        """Check that the output has the channels that the diffusion reads, where the network says how many it has.

        Args:
            learned: Whether the diffusion's variance is learned (Objective.learned).

        Raises:
            InputError: If it has other channels.
        """
        if self.in_channels is not None and self.out_channels is not None:
            check_channels(self.out_channels, self.in_channels, learned)

    def check_labels(self, labels: int | Sequence[int] | Tensor | None, n: int) -> Tensor | None:
        """The labels of n samples as int64 [n] on the CPU, or None.

        Raises:
            InputError: If the labels are not integers, are neither one nor n, or are not classes of the network.
        """
        if labels is None:
            return None
        tensor = _integers(labels, n)
        if tensor.ndim == 0:
            tensor = tensor.expand(n)
        if tensor.shape != (n,):
            raise InputError(
                f"labels have shape {tuple(tensor.shape)}; expected one class, or {n}, one for each sample"
            )
        if self.classes is None:
            return tensor
        if self.classes == 0:
            raise InputError("this model is unconditional (it was trained without classes): leave the labels out")
        if n and not 0 <= int(tensor.min()) <= int(tensor.max()) <= self.classes:
            raise InputError(
                f"labels run from {int(tensor.min())} to {int(tensor.max())}; this model has the classes "
                f"0..{self.classes - 1} (and {self.classes} for none)"
            )
        return tensor


def check_channels(found: int, channels: int, learned: bool) -> None:
    """Check the number of channels of an output.

    Args:
        found: The channels that the output has.
        channels: The channels of the image, C.
        learned: Whether the diffusion's variance is learned (Objective.learned).

    Raises:
        InputError: If the output does not have output_channels(channels, learned).
    """
    expected = output_channels(channels, learned)
    if found == expected:
        return
    if learned:
        raise InputError(
            f"the network's output has {found} channels; a diffusion with a learned variance expects 2C = {expected}, "
            "the prediction and then the variance: build the U-Net with learned_variance=True, or the diffusion with "
            "the fixed variance that it was trained with"
        )
    raise InputError(
        f"the network's output has {found} channels; a diffusion with a fixed variance expects C = {expected}, the "
        "prediction alone: build the diffusion with variance='learned_range' or 'learned' if the network was trained "
        "so, or the U-Net with learned_variance=False"
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode. Afterwards each of its modules is in the mode that it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _integers(labels: int | Sequence[int] | Tensor, n: int) -> Tensor:
    try:
        tensor = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"labels are {labels!r:.100}; expected one class, or {n}, one for each sample ({error})"
        ) from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        is_empty_list = tensor.ndim > 0 and not tensor.numel()  # torch makes floats of it
        if not is_empty_list:
            raise InputError(f"labels are {tensor.dtype}; expected integers, the numbers of classes")
    return tensor.long()
