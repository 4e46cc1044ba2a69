"""The ops on the C++ kernels of csrc/: tensors in, raw pointers out. Arguments were checked in ops/__init__.py."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..errors import InputError
from ..noise import NoiseKey
from .registry import is_channels_last

try:
    from .. import _C

    unavailable = ""
except ImportError as error:
    _C = None
    unavailable = (
        f"the C++ extension cannot be imported ({error}). Install the package with a C++ compiler at hand, from its "
        "source folder: pip install -e ."
    )

DTYPES = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_NO_IMAGE = (0, 1, False)

if _C and (_isa := os.environ.get("DDPM_FAST_CPU_ISA")) and not _C.use_isa(_isa):
    raise InputError(f"DDPM_FAST_CPU_ISA={_isa}: this machine runs {', '.join(_C.isas())}")


def isas() -> list[str]:
    """The instruction sets that the kernels were built for and this machine runs, slowest first."""
    return _C.isas() if _C else []


def isa() -> str:
    """The one in use."""
    return _C.isa()


def use_isa(name: str) -> None:
    """Chooses another one. The results are the same bits; only the speed differs."""
    if not _C.use_isa(name):
        raise InputError(f"instruction set {name!r}: this machine runs {', '.join(_C.isas())}")


def _image(image: Tensor | None) -> tuple[int, int, bool]:
    return _NO_IMAGE if image is None else (image.data_ptr(), DTYPES[image.dtype], is_channels_last(image))


def _shape(image: Tensor) -> tuple[int, int, int]:
    n, channels = image.shape[:2]
    positions = 1
    for size in image.shape[2:]:
        positions *= size
    return n, channels, positions


def _noise(noise: Tensor | NoiseKey) -> tuple:
    if isinstance(noise, NoiseKey):
        return _NO_IMAGE, noise.seed.data_ptr(), noise.sample_id.data_ptr(), noise.step.data_ptr(), noise.stream
    return _image(noise), 0, 0, 0, 0


def normal(key: NoiseKey, out: Tensor) -> None:
    shape = (out.shape[0], 1, out[:1].numel()) if out.ndim < 2 else _shape(out)
    _C.normal(shape, _noise(key), _image(out), torch.get_num_threads())


def q_sample(x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey, out: Tensor) -> None:
    try:
        _C.q_sample(
            *(_shape(x0), _image(x0), t.data_ptr(), table.data_ptr(), table.shape[0], _noise(noise), _image(out)),
            torch.get_num_threads(),
        )
    except IndexError as error:
        raise InputError(f"q_sample: {error}") from None


def diffusion_loss(
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | NoiseKey,
    residual: Tensor | None,
    loss: Tensor,
) -> None:
    try:
        _C.diffusion_loss(
            *(_shape(output), _image(output), _image(x0), t.data_ptr(), table.data_ptr(), table.shape[0]),
            *(_noise(noise), _image(residual), loss.data_ptr(), torch.get_num_threads()),
        )
    except IndexError as error:
        raise InputError(f"diffusion_loss: {error}") from None


def hybrid_loss(
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | NoiseKey,
    gradient: Tensor | None,
    loss: Tensor,
    factors: Tensor,
) -> None:
    _bound("hybrid_loss", output, x0, t, table, noise, gradient, loss, None, factors)


def vlb_terms(
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | NoiseKey,
    gradient: Tensor | None,
    bits: Tensor,
    mse_x0: Tensor,
    factors: Tensor,
) -> None:
    _bound("vlb_terms", output, x0, t, table, noise, gradient, bits, mse_x0, factors)


def _bound(op, output, x0, t, table, noise, gradient, loss, mse_x0, factors) -> None:
    try:
        _C.bound(
            *(op == "hybrid_loss", _shape(x0), factors.shape[1], _image(output), _image(x0)),
            *(t.data_ptr(), table.data_ptr(), table.shape[0], _noise(noise), _image(gradient), loss.data_ptr()),
            *(0 if mse_x0 is None else mse_x0.data_ptr(), factors.data_ptr(), torch.get_num_threads()),
        )
    except IndexError as error:
        raise InputError(f"{op}: {error}") from None


def loss_backward(stored: Tensor, scale: Tensor, grad: Tensor) -> None:
    _C.loss_backward(
        *(_shape(stored), _image(stored), scale.shape[1], scale.data_ptr(), _image(grad)), torch.get_num_threads()
    )


def reverse_step(
    x_t: Tensor,
    output: Tensor,
    x0_previous: Tensor | None,
    table: Tensor,
    step: Tensor,
    noise: Tensor | NoiseKey,
    x_out: Tensor,
    x0_out: Tensor | None,
    model_out: Tensor | None,
) -> None:
    try:
        _C.reverse_step(
            *(_shape(x_t), 2 if output.shape[1] > x_t.shape[1] else 1, _image(x_t), _image(output)),
            *(_image(x0_previous), table.data_ptr(), table.shape[0], step.data_ptr(), _noise(noise)),
            *(_image(x_out), _image(x0_out), _image(model_out)),
            torch.get_num_threads(),
        )
    except IndexError as error:
        raise InputError(f"reverse_step: {error}") from None


OPS = {
    "normal": normal,
    "q_sample": q_sample,
    "diffusion_loss": diffusion_loss,
    "hybrid_loss": hybrid_loss,
    "vlb_terms": vlb_terms,
    "loss_backward": loss_backward,
    "reverse_step": reverse_step,
}
