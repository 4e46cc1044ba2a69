"""What the networks of features have in common: batch norms folded into convolutions, convolutions that pad as
TensorFlow does, weights that must have certain names, and how a network becomes an Extractor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.errors import InputError, printable
from ddpm_fast.metrics.feature_set import Kind
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.features.resizing import check_images

Compute = Callable[[Tensor], tuple[Tensor, Tensor | None]]

NORM = ("weight", "bias", "running_mean", "running_var")  # what a batch norm consists of

# A CPU computes this many images at once: their activations stay in the cache. EfficientNet-lite0 at 96 pixels on one
# core: 212 images/s in parts of 8, 242 of 16, 141 of 32, 143 of 64.
_PART_CPU = 16
_PART = 256


def folded(conv: Tensor, norm: Mapping[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """A convolution and the batch norm behind it as one convolution.

    Args:
        conv: Its weight, [out, in, k, k]; it has no bias.
        norm: The batch norm's weight, bias, running_mean and running_var.
        eps: What the batch norm adds to the variance.

    Returns:
        Weight and bias, fp32: computed in float64 and rounded once.
    """
    weight, bias, mean, variance = (norm[name].double() for name in NORM)
    scale = weight / torch.sqrt(variance + eps)
    return (conv.double() * scale[:, None, None, None]).float(), (bias - mean * scale).float()


class Convolution(nn.Module):
    """A convolution with a bias and TensorFlow's padding: "SAME", where the end gets more if it is odd, or none.

    Weights are kept in the memory format channels_last.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1, groups: int = 1, same: bool = True):
        """Take the weight [out, in / groups, height, width] and the bias [out]; `same` says whether to pad."""
        super().__init__()
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias)
        self.stride, self.groups, self.same = stride, groups, same

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, H, W] to [n, out, ceil(H / stride), ceil(W / stride)], or to what is left without padding."""
        rows = columns = 0
        if self.same:
            rows, columns = (
                max((-(-n // self.stride) - 1) * self.stride + kernel - n, 0)
                for n, kernel in zip(x.shape[2:], self.weight.shape[2:], strict=True)
            )
            if rows % 2 or columns % 2:
                x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
                rows = columns = 0
        return F.conv2d(x, self.weight, self.bias, self.stride, (rows // 2, columns // 2), 1, self.groups)


def check_names(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise InputError unless a state dict has the tensors of a network, in their shapes, and no others.

    Args:
        path: Where it is from.
        state: The tensors. A batch norm's num_batches_tracked may be there or not.
        wanted: The shape of each.
        what: The file that is expected, in words.
    """
    given = {name for name in state if not name.endswith(".num_batches_tracked")}
    missing, more = sorted(wanted.keys() - given), sorted(given - wanted.keys())
    if missing or more:
        said = [f"lacks {_few(missing)}"] if missing else []
        said += [f"has {_few(more)} instead" if missing else f"has {_few(more)} besides"] if more else []
        raise InputError(f"{path} {' and '.join(said)}; expected {what} with names such as {_few(sorted(wanted))}")
    for name, shape in wanted.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise InputError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}; expected floats {list(shape)}, as {what} has"
            )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"{printable(name):.80}" for name in names[:3]) + more


@contextmanager
def in_full_precision(device: torch.device) -> Iterator[None]:
    """Inside, networks compute without gradients, and in fp32 whatever a caller has switched on.

    Convolutions in TF32, which is torch's default on a GPU, would change features by about 1e-3.
    """
    # Not cudnn.flags(), which fails where a caller has set the precision of convolutions alone. mkldnn is the CPU's.
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    settings: list[Any] = [cudnn.conv, cuda.matmul, mkldnn.conv, mkldnn.matmul]  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def extractor_of(kind: Kind, dimensions: int, device: torch.device, compute: Compute) -> Extractor:
    """An Extractor that checks images and computes them in parts, in fp32 whatever is around it.

    Args:
        kind: What its features are.
        dimensions: The length of a vector.
        device: Where it computes.
        compute: Takes uint8 images [n, 1 or 3, H, W] on the device, n > 0; gives features and logits or None.
    """
    most = _PART_CPU if device.type == "cpu" else _PART

    def in_parts(images: Tensor) -> tuple[Tensor, Tensor | None]:
        check_images(images)
        with in_full_precision(device):
            parts = [compute(part.to(device, non_blocking=True)) for part in images.split(most) if len(part)]
            if not parts:
                return torch.zeros(0, dimensions, device=device), None
            features = torch.cat([part[0] for part in parts])
            logits = [part[1] for part in parts if part[1] is not None]
            return features, torch.cat(logits) if logits else None

    return Extractor(kind=kind, dimensions=dimensions, device=device, compute=in_parts)
