"""What the ops and their backends ask of tensors: how they lie in memory, what to compute in, and whose noise it is.

Images are [N, C, ...]. Kernels take them dense, either contiguous or channels_last, without a copy.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey, normals

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_channels_last(x: Tensor) -> bool:
    """Whether x is channels_last and not contiguous as well (with one channel it can be both)."""
    if x.is_contiguous():
        return False
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def dense(x: Tensor) -> Tensor:
    """x itself if it is contiguous or channels_last, otherwise a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor with the shape and memory format that an op gives to what it computes from x."""
    in_place = x.is_contiguous() or is_channels_last(x)
    memory_format = torch.preserve_format if in_place else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype or x.dtype, memory_format=memory_format)


class VlbTerms(NamedTuple):
    """What vlb_terms gives: the variational bound's term at each sample's t, [N] each."""

    bits_per_dim: Tensor
    mse_x0: Tensor


class ReverseStep(NamedTuple):
    """What a sampler's step gives: the next state, and where asked for the predicted x0 and the network's copy."""

    x: Tensor
    x0: Tensor | None
    x_model: Tensor | None


class Draw(NamedTuple):
    """What draw_timesteps draws, and from what: ops.draw_timesteps says what each is. `cumulative` are the sums of the
    probabilities, float64 [T]; of 2^24 labels `dropped` become null_label."""

    key: NoiseKey
    num_timesteps: int
    parts: int
    probabilities: Tensor | None
    cumulative: Tensor | None
    network_timesteps: Tensor | None
    labels: Tensor | None
    dropped: int
    null_label: int


class Drawn(NamedTuple):
    """What draw_timesteps gives, [N] each: timesteps in 0..T-1 (int64), the weights of their losses (fp32), what the
    network calls the timesteps, and its labels (int64, or None if there are none)."""

    t: Tensor
    weights: Tensor
    network_t: Tensor
    labels: Tensor | None


class Norm(NamedTuple):
    """What a group norm is of: ops.add_group_norm says what each is, x being its image. scale, shift and added are
    [N, channels] or None."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    added: Tensor | None
    residual: Tensor | None
    joined: Tensor | None
    groups: int
    eps: float
    silu: bool


def channels_last(image: Tensor) -> Tensor:
    """The image [N, C, H, W] in that memory format, copied if it has another one."""
    return image.contiguous(memory_format=torch.channels_last)


def working_dtype(*images: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if any image is float64, else float32."""
    return torch.float64 if any(image.dtype == torch.float64 for image in images) else torch.float32


def coefficients(table: Tensor, *images: Tensor) -> Tensor:
    """The table as a kernel reads it: dense, in the dtype of the arithmetic on these images."""
    return table.to(working_dtype(*images)).contiguous()


def widen(image: Tensor, dtype: torch.dtype) -> Tensor:
    """The image in the dtype of the arithmetic: uint8 pixels 0..255 become -1..1, floats are cast."""
    return image.to(dtype) / 127.5 - 1.0 if image.dtype == torch.uint8 else image.to(dtype)


def per_sample(values: Tensor, image: Tensor) -> Tensor:
    """[N] shaped to multiply an image [N, C, ...]."""
    return values.view(-1, *[1] * (image.ndim - 1))


def per_channel(values: Tensor, image: Tensor) -> Tensor:
    """[N, C] shaped to multiply an image [N, C, ...]."""
    return values.view(*values.shape, *[1] * (image.ndim - 2))


def kept_scale(dropped: int) -> float:
    """What dropout multiplies by where `dropped` of 2^16 elements are dropped, so that the mean stays what it was."""
    return 2**16 / (2**16 - dropped) if dropped < 2**16 else 0.0


def row_of(table: Tensor, step: Tensor) -> Tensor:
    """table[step] for a scalar tensor, which as an index would be read back to the host first."""
    return table.index_select(0, step.view(1))[0]


def check_rows(op: str, name: str, table: Tensor, index: Tensor) -> None:
    """Raises InputError for an index outside the table, on the CPU only: on a GPU the check would have to wait for
    it."""
    if index.device.type != "cpu":
        return
    index, rows = index.view(-1), table.shape[0]
    if len(outside := ((index < 0) | (index >= rows)).nonzero()):
        i = int(outside[0])
        raise InputError(f"{op}: {name}[{i}] is {int(index[i])}, outside the table's range 0..{rows - 1}")


def draw(noise: Tensor | NoiseKey, image: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise of an image: given, or drawn in fp32 from its key."""
    if isinstance(noise, NoiseKey):
        return normals(noise, math.prod(image.shape[1:])).view(image.shape).to(dtype)
    return noise.to(dtype)


def unpack_noise(
    noise: Tensor | NoiseKey, op: str = "the op"
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]:
    """The five arguments by which the registered ops take noise: noise, seed, sample_id, step_id, stream.

    Raises InputError for noise that is neither a tensor nor a key.
    """
    if isinstance(noise, NoiseKey):
        return None, noise.seed, noise.sample_id, noise.step, noise.stream
    if not isinstance(noise, Tensor):
        raise InputError(f"{op}: noise is a {type(noise).__name__}; expected a tensor or a NoiseKey")
    return noise, None, None, None, 0


def pack_noise(
    noise: Tensor | None, seed: Tensor | None, sample_id: Tensor | None, step_id: Tensor | None, stream: int
) -> Tensor | NoiseKey:
    """What unpack_noise took apart."""
    if noise is not None:
        # A tensor that is ignored could still be on a device of its own, which torch would choose to run on.
        if seed is not None or sample_id is not None or step_id is not None:
            raise InputError("an op takes noise, or the seed, sample_id and step_id of a NoiseKey, and not both")
        return noise
    if seed is None or sample_id is None or step_id is None:
        raise InputError("an op needs noise: give a tensor, or the seed, sample_id and step_id of a NoiseKey")
    return NoiseKey(seed, sample_id, step_id, stream)


def dense_noise(noise: Tensor | NoiseKey) -> Tensor | NoiseKey:
    """The noise as kernels want it."""
    if not isinstance(noise, NoiseKey):
        return dense(noise)
    return noise if noise.sample_id.is_contiguous() else replace(noise, sample_id=noise.sample_id.contiguous())
