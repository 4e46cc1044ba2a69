"""`ValueRange`: what [-1, 1] stands for in float data, such as latents, temperatures or pressures.

A diffusion works on [-1, 1]. 8-bit images have one way there and back; floats have a range of their own in each
channel, which a model therefore keeps, so that its samples come out in the units of its data.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.errors import InputError

LAYOUTS = ("NCHW", "NHWC", "NHW")  # how float arrays are laid out; the last has no channels, which counts as one
_MOST_CHANNELS = 1 << 14
_LARGEST = torch.finfo(torch.float32).max  # what comes out is float32
_NAMED = 8  # of many channels, so many are named in a message


@dataclass(frozen=True)
class ValueRange:
    """The range of each channel's values, and the layout of the arrays that they come in.

    A channel whose values are all the same (low = high) is 0 in [-1, 1].

    Attributes:
        low: What -1 stands for, a number for each channel.
        high: What 1 stands for, as many numbers.
        layout: One of LAYOUTS.

    Raises:
        InputError: For numbers that are no range, and for another layout.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    layout: str = "NCHW"

    def __post_init__(self) -> None:
        for name, ends in (("low", self.low), ("high", self.high)):
            if not (isinstance(ends, tuple) and 1 <= len(ends) <= _MOST_CHANNELS and all(map(_is_finite, ends))):
                raise InputError(
                    f"the {name} ends of a range of values are {reprlib.repr(ends)}; expected one number for each of "
                    f"1 to {_MOST_CHANNELS} channels, none of them beyond float32"
                )
        if len(self.low) != len(self.high) or any(low > high for low, high in zip(self.low, self.high, strict=True)):
            raise InputError(
                f"a range of values goes from {reprlib.repr(self.low)} to {reprlib.repr(self.high)}; expected for each "
                "channel a lower end and a higher one"
            )
        if self.layout not in LAYOUTS or (self.layout == "NHW" and len(self.low) > 1):
            raise InputError(
                f"the layout of {len(self.low)} channels is {reprlib.repr(self.layout)}; expected one of "
                f"{', '.join(LAYOUTS)}, the last of one channel"
            )

    @classmethod
    def given(cls, ends: Sequence[float], channels: int, layout: str) -> "ValueRange":
        """The range that somebody gave.

        Args:
            ends: The low and the high end for all channels, or for each channel in turn.
            channels: How many channels the data has.
            layout: One of LAYOUTS.

        Raises:
            InputError: If these are no ranges, or those of another number of channels.
        """
        numbers = [float(end) if isinstance(end, np.floating | np.integer) else end for end in ends]
        if len(numbers) not in (2, 2 * channels) or not all(map(_is_finite, numbers)):
            raise InputError(
                f"value_range is {reprlib.repr(numbers)}, and the data has {channels} channels; expected a low and a "
                "high end for all channels, or for each channel in turn"
            )
        pairs = [(float(low), float(high)) for low, high in zip(numbers[::2], numbers[1::2], strict=True)]
        for low, high in pairs:
            if low > high:
                raise InputError(f"value_range has {low:g} to {high:g}; expected the low end first")
        pairs *= channels // len(pairs)
        return cls(tuple(low for low, _ in pairs), tuple(high for _, high in pairs), layout)

    @classmethod
    def from_dict(cls, entry: Any) -> "ValueRange":
        """The range that `to_dict` described. Raises InputError for anything else, whatever it is."""
        if not isinstance(entry, dict) or set(entry) != {"low", "high", "layout"}:
            raise InputError(f"value_range is {reprlib.repr(entry)}; expected an object of low, high and layout")
        ends = [entry[name] if isinstance(entry[name], list) else () for name in ("low", "high")]
        return cls(tuple(ends[0]), tuple(ends[1]), entry["layout"])

    def to_dict(self) -> dict[str, Any]:
        """The range in JSON's types."""
        return {"low": list(self.low), "high": list(self.high), "layout": self.layout}

    @property
    def ends(self) -> list[float]:
        """The low and the high end of each channel in turn, as `given` takes them."""
        return [end for pair in zip(self.low, self.high, strict=True) for end in pair]

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return len(self.low)

    def to_model(self, values: Tensor) -> Tensor:
        """Values in the data's units as a model takes them.

        Args:
            values: Floats [..., C, H, W].

        Returns:
            float32, of the same shape, in [-1, 1]. Values beyond the range are clipped to it. NaN stays NaN.
        """
        self._check(values.dtype.is_floating_point, values.dtype, values.shape)
        centre, divisor = (torch.from_numpy(part).to(values.device) for part in (self._scale[0], self._divisor))
        return _scaled(values, centre, divisor).float()

    def array_to_model(self, values: np.ndarray) -> np.ndarray:
        """`to_model` of an array, with the same bits."""
        self._check(values.dtype.kind == "f", values.dtype, values.shape)
        x: np.ndarray = _scaled(values, self._scale[0], self._divisor)
        return x.astype(np.float32)

    def to_values(self, x: Tensor) -> Tensor:
        """Samples of a model in the data's units.

        Args:
            x: Floats [..., C, H, W] in [-1, 1].

        Returns:
            float32, of the same shape.
        """
        self._check(x.dtype.is_floating_point, x.dtype, x.shape)
        centre, half = (torch.from_numpy(part).to(x.device) for part in self._scale)
        return (x.detach() * half + centre).float()

    def to_array(self, x: Tensor) -> np.ndarray:
        """Samples of a model in the data's units and layout: float32.

        Args:
            x: Floats [N, C, H, W] in [-1, 1].

        Raises:
            InputError: For NaN, and for another shape.
        """
        values = self.to_values(x)
        bad = values.isnan().flatten(1).any(1) if values.numel() else values.new_zeros(0)
        if bad.any():
            raise InputError(
                f"{int(bad.sum())} of {len(x)} samples have NaN, the first at position {int(bad.nonzero()[0])}: "
                "the model has diverged, or its dtype overflows; sample in float32 or from an earlier checkpoint"
            )
        array: np.ndarray = values.cpu().numpy()
        if self.layout == "NHW":
            return array[:, 0]
        return array if self.layout == "NCHW" else np.ascontiguousarray(array.transpose(0, 2, 3, 1))

    @cached_property
    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """What 0 stands for and how far 1 lies from it, float64 [C, 1, 1]."""
        low, high = (np.array(ends, np.float64)[:, None, None] for ends in (self.low, self.high))
        half = (high - low) / 2
        return low + half, half

    @cached_property
    def _divisor(self) -> np.ndarray:
        """How far 1 lies from 0, or infinity where it does not, so that a channel of one value is 0."""
        half = self._scale[1]
        return np.where(half > 0, half, np.inf)

    def _check(self, is_float: bool, dtype: object, shape: Sequence[int]) -> None:
        """Raises InputError unless values fit the range."""
        if len(shape) < 3 or shape[-3] != self.channels or not is_float:
            raise InputError(
                f"the values are {str(dtype).removeprefix('torch.')} {list(shape)}; expected floats "
                f"[..., {self.channels}, H, W], because the range is of {self.channels} channels"
            )

    def __str__(self) -> str:
        pairs = list(zip(self.low, self.high, strict=True))
        if len(set(pairs)) == 1:
            return f"{pairs[0][0]:.5g} to {pairs[0][1]:.5g}"
        more = f" and {len(pairs) - _NAMED} more channels" if len(pairs) > _NAMED else ""
        return ", ".join(f"{low:.5g} to {high:.5g}" for low, high in pairs[:_NAMED]) + more


def _scaled(values: Any, centre: Any, divisor: Any) -> Any:
    """Values in [-1, 1], of arrays or tensors alike; float64, because centre and divisor are.

    A pressure of 101,325 that varies by 1 would keep a hundredth of it in float32.
    """
    return ((values - centre) / divisor).clip(-1, 1)


def parse_range(text: str) -> list[float]:
    """The ends in a text such as "-4,4" (of all channels) or "-4,4,0,1" (of the first channel and the second).

    Raises:
        InputError: If they are no numbers. It names the option --value-range.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--value-range is {text!r:.200}; expected LOW,HIGH such as -4,4, or the two ends for each channel in "
            "turn, such as -4,4,0,1"
        ) from None


def _is_finite(number: object) -> bool:
    return type(number) in (int, float) and abs(number) <= _LARGEST  # type: ignore[arg-type]
