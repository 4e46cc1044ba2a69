"""Sampling: the one loop that every sampler runs through, row by row of its table.

Noise comes from each sample's own counter, so a sample is the same image whatever the batch it is drawn in; what
remains is the network's own dependence on the batch size, which is rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import ops
from .diffusion import GaussianDiffusion
from .errors import InputError
from .nn import UNet
from .noise import NoiseKey, Stream
from .samplers import SamplerTable, make_table


def reverse_chain(
    model: nn.Module, table: SamplerTable, x: Tensor, key: NoiseKey, labels: Tensor | None
) -> Iterator[Tensor]:
    """The states x of a sampler from x_T on, one after each row of the table: the loop of every sampler.

    model(x, t) or, with labels, model(x, t, labels); it reads x in the dtype of its parameters while the state stays in
    x's. key.step must be 0 and is advanced in place: that one tensor chooses the row, the timestep and the noise, so
    that no step waits for the device.
    """
    coefficients, timesteps = table.coefficients.to(x.device, torch.float32), table.timesteps.to(x.device)
    dtype = next((parameter.dtype for parameter in model.parameters()), x.dtype)
    x_model = x.to(dtype)
    for _ in range(len(timesteps)):
        # timesteps[step] would read the step back to the host.
        t = timesteps.index_select(0, key.step.view(1)).expand(x.shape[0])
        output = model(x_model, t) if labels is None else model(x_model, t, labels)
        model_dtype = None if dtype == x.dtype else dtype
        x, _, copy = ops.reverse_step(x, output, coefficients, key.step, key, model_dtype=model_dtype)
        x_model = x if copy is None else copy
        key.step.add_(1)
        yield x


@torch.inference_mode()
def sample(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    n: int,
    *,
    sampler: str = "ddpm",
    steps: int | None = None,
    seed: int = 0,
    first_sample_id: int = 0,
    labels: int | Sequence[int] | Tensor | None = None,
    batch_size: int | None = None,
    shape: tuple[int, ...] | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Draw n images: fp32 [n, C, H, W], about in [-1, 1], on the model's device.

    model: a UNet, or any network called as model(x, t) or model(x, t, labels) with x [N, C, ...], t int64 [N]; then
    `shape` says what one sample is, (C, ...). sampler, steps: see make_table; fewer steps are faster and coarser.
    Sample i depends on (seed, first_sample_id + i, label, sampler, steps) and on nothing else but the network's
    rounding. labels: a class for all, or one each; None draws unconditionally. batch_size: how many at a time (None:
    all). on_step(first, i, x) is called after step i of the batch whose first sample is number `first`, with its x.
    Raises InputError for n < 0, batch_size < 1, labels or a shape that do not fit the model, and where make_table does.
    """
    table = make_table(diffusion, sampler, steps)
    if n < 0 or (batch_size is not None and batch_size < 1):
        raise InputError(f"n is {n} and batch_size {batch_size}; expected n >= 0 and batch_size >= 1 or None")
    classes = check_labels(model, labels, n)
    shape = _sample_shape(model, shape)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    memory_format = torch.channels_last if len(shape) == 3 else torch.contiguous_format
    batches = [torch.empty((0, *shape), device=device)]
    training = model.training
    model.eval()
    try:
        for first in range(0, n, batch_size or max(n, 1)):
            size = min(batch_size or n, n - first)
            key = NoiseKey.of(seed, size, first_sample_id=first_sample_id + first, device=device)
            x = ops.normal(replace(key, stream=Stream.INITIAL), shape, memory_format=memory_format)
            batch_labels = None if classes is None else classes[first : first + size].to(device)
            chain = reverse_chain(model, table, x, replace(key, stream=Stream.REVERSE), batch_labels)
            for i, x in enumerate(chain):
                if on_step is not None:
                    on_step(first, i, x)
            batches.append(x)
    finally:
        model.train(training)
    return torch.cat(batches)


def _sample_shape(model: nn.Module, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of one sample: the U-Net's own, or the given one. Raises InputError for none, or two that differ."""
    own = None
    if isinstance(model, UNet):
        own = (model.config.in_channels, model.config.image_size, model.config.image_size)
    if own is None and shape is None:
        raise InputError(f"the shape of a {type(model).__name__}'s samples is not known: give shape=(C, H, W)")
    if own is not None and shape is not None and tuple(shape) != own:
        raise InputError(f"shape is {tuple(shape)}, but this U-Net draws {own}: leave shape out")
    return own or tuple(shape)


def check_labels(model: nn.Module, labels: int | Sequence[int] | Tensor | None, n: int) -> Tensor | None:
    """The labels as int64 [n] on the CPU, or None. Raises InputError if they do not fit n, or a U-Net's classes."""
    if labels is None:
        return None
    tensor = torch.as_tensor(labels, dtype=torch.int64, device="cpu")
    if tensor.ndim == 0:
        tensor = tensor.expand(n)
    if tensor.shape != (n,):
        raise InputError(f"labels have shape {tuple(tensor.shape)}; expected one class, or {n}, one a sample")
    if not isinstance(model, UNet):
        return tensor
    classes = model.config.num_classes
    if classes == 0:
        raise InputError("this model is unconditional (it was trained without classes): leave the labels out")
    if n and not 0 <= int(tensor.min()) <= int(tensor.max()) <= classes:
        raise InputError(
            f"labels run from {int(tensor.min())} to {int(tensor.max())}; this model has the classes 0..{classes - 1} "
            f"(and {classes} for none)"
        )
    return tensor
