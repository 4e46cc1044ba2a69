"""What the loops need to know of a network: where it is, what it takes and returns, and which labels fit it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.loops.inputs import check_condition, labels_of
from ddpm_fast.nn import UNet
from ddpm_fast.nn.foreign import Foreign
from ddpm_fast.objective import output_channels

Call = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Network:
    """A model, and the answers to what the loops ask about it. Make one with Network.of.

    Attributes:
        model: The module whose weights and mode these are: the network itself, or the Foreign around a function.
        device: Where its parameters are, or its buffers. The CPU for a model without either.
        dtype: The dtype of its parameters. None for a model without parameters, which is given x as it is.
        shape: The shape of one sample, (C, H, W), unless another is asked for. None for a network that does not say.
        in_channels: C. None for a network that does not say.
        out_channels: The channels of its output. None for a network that does not say: it shows them when it is called.
        classes: The number of classes, 0 for an unconditional model. None for a network that does not say.
        null_class: Whether class number `classes` stands for "no class".
        takes_labels, needs_labels: Whether it may, and must, be called with labels.
        condition_channels: The channels of a second image that it is given beside x. 0 for none.
        divisor: What the height and width of an image must be divisible by.
        may_wait: Whether calling it may wait for the device, which a CUDA graph does not allow. A UNet never does.
        foreign: What calls a model that is not ours in its own way. None for a UNet, and for a Foreign itself.
    """

    model: nn.Module
    device: torch.device
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None
    in_channels: int | None
    out_channels: int | None
    classes: int | None
    null_class: bool
    takes_labels: bool
    needs_labels: bool
    condition_channels: int
    divisor: int
    may_wait: bool
    foreign: Foreign | None

    @classmethod
    def of(cls, model: Callable[..., Any]) -> Network:
        """Ask a model everything once.

        Args:
            model: A UNet, a Foreign, diffusers' UNet2DModel, or any module or function of (x, t) or (x, t, labels).

        Raises:
            InputError: If the model is none of these.
        """
        return cls._of_unet(model) if isinstance(model, UNet) else cls._of_foreign(model)

    @classmethod
    def _of_unet(cls, model: UNet) -> Network:
        config = model.config
        device, dtype = _place(model)
        return cls(
            model=model,
            device=device,
            dtype=dtype,
            shape=config.shape,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            classes=config.num_classes,
            null_class=config.num_classes > 0 and config.null_class,
            takes_labels=config.num_classes > 0,
            needs_labels=config.num_classes > 0 and not config.null_class,
            condition_channels=config.condition_channels,
            divisor=2 ** (len(config.channel_mult) - 1),
            may_wait=type(model) is not UNet,  # a subclass may do more
            foreign=None,
        )

    @classmethod
    def _of_foreign(cls, model: Callable[..., Any]) -> Network:
        foreign = model if isinstance(model, Foreign) else Foreign(model)
        # A module stands for itself: what is kept beside it, such as its graphs, is found by it in the next call.
        module = model if isinstance(model, nn.Module) else foreign
        device, dtype = _place(module)
        return cls(
            model=module,
            device=device,
            dtype=dtype,
            shape=foreign.shape,
            in_channels=None if foreign.shape is None else foreign.shape[0],
            out_channels=foreign.out_channels,
            classes=foreign.classes,
            null_class=False,
            takes_labels=foreign.takes_labels,
            needs_labels=foreign.needs_labels,
            condition_channels=0,
            divisor=foreign.divisor,
            may_wait=True,
            foreign=None if module is foreign else foreign,
        )

    @property
    def name(self) -> str:
        """What the network is called, for error messages."""
        return self.model.name if isinstance(self.model, Foreign) else type(self.model).__name__

    def called(self, call: Call | None = None) -> Call:
        """What is called as call(x, t) or call(x, t, labels) and answers with a tensor.

        Args:
            call: What is called in the model's place, such as a compiled copy. None for the model itself.
        """
        call = self.model if call is None else call
        return call if self.foreign is None else self.foreign.adapted(call)

    def sample_shape(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        """The shape of one sample: the given one, or the network's own.

        Raises:
            InputError: If neither is known, if the given one is no shape, or if it does not fit the network.
        """
        if shape is None:
            if self.shape is None:
                raise InputError(f"the shape of a {self.name}'s samples is not known: give shape=(C, H, W)")
            return self.shape
        if not isinstance(shape, Sequence) or isinstance(shape, str) or not shape:
            raise InputError(f"shape is {shape!r:.200}; expected that of one sample, such as (3, 32, 32)")
        wanted = tuple(check_integer(f"shape[{i}]", size, 1) for i, size in enumerate(shape))
        if misfit := self.misfit(wanted):
            raise InputError(f"shape is {wanted}, but {misfit}, or leave shape out")
        return wanted

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Why samples cannot have this shape, and what to do; or the empty string."""
        if self.shape is None:
            return ""
        if len(shape) != len(self.shape) or shape[0] != self.shape[0]:
            places = "".join(f", {letter}" for letter in "DHW"[4 - len(self.shape) :])
            return f"this {self.name} draws ({self.shape[0]}{places}): give as many dimensions and channels"
        if wrong := [size for size in shape[1:] if size % self.divisor]:
            return (
                f"this {self.name} halves the sides of an image until they are 1/{self.divisor}, and {wrong[0]} is not "
                f"divisible by {self.divisor}: give {-(-wrong[0] // self.divisor) * self.divisor}"
            )
        return ""

    def check_output(self, learned: bool) -> None:
        """Check that the output has the channels that the diffusion reads, where the network says how many it has.

        Args:
            learned: Whether the diffusion's variance is learned (Objective.learned).

        Raises:
            InputError: If it has other channels.
        """
        if self.in_channels is not None and self.out_channels is not None:
            check_channels(self.out_channels, self.in_channels, learned)

    def check_condition(self, condition: Tensor | None, n: int) -> Tensor | None:
        """The second image of n samples, as inputs.check_condition has it. Raises InputError where it does."""
        return check_condition(condition, n, self.condition_channels, self.name)

    def check_labels(self, labels: int | Sequence[int] | Tensor | None, n: int) -> Tensor | None:
        """The labels of n samples as int64 [n] on the CPU, or None.

        Raises:
            InputError: If the labels are not integers, are neither one nor n, or are not classes of the network.
        """
        if labels is None:
            if self.needs_labels and n:
                known = f", 0 to {self.classes - 1}" if self.classes else ""
                raise InputError(f"this {self.name} cannot be called without labels: give labels, its classes{known}")
            return None
        if self.classes != 0 and not self.takes_labels:
            raise InputError(f"the {self.name} takes x and t alone: leave the labels out")
        tensor = labels_of(labels, n)
        if self.classes is None:
            return tensor
        if self.classes == 0:
            raise InputError("this model is unconditional (it was trained without classes): leave the labels out")
        last = self.classes if self.null_class else self.classes - 1
        if n and not 0 <= int(tensor.min()) <= int(tensor.max()) <= last:
            none = f" (and {self.classes} for none)" if self.null_class else ""
            raise InputError(
                f"labels run from {int(tensor.min())} to {int(tensor.max())}; this model has the classes "
                f"0..{self.classes - 1}{none}"
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


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode, and no gradient of its parameters is recorded: what a gradient of its input
    needs takes less memory then. Afterwards all is as it was before."""
    recorded = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        try:
            for parameter in recorded:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in recorded:
                parameter.requires_grad_(True)


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where a model is, and the dtype of its parameters, if it has any."""
    parameter = next(model.parameters(), None)
    if parameter is not None:
        return parameter.device, parameter.dtype
    buffer = next(model.buffers(), None)
    return torch.device("cpu") if buffer is None else buffer.device, None
