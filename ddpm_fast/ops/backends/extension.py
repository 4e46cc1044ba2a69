"""The C++ extension, ddpm_fast._C, and how tensors reach it: as raw pointers with sizes, in tuples that are the structs
of csrc/ops.h, field by field. What arrives here has been checked by the public ops.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from ddpm_fast.noise import NoiseKey, Stream
from ddpm_fast.ops.tensors import Draw, Drawn, Norm, ReverseStep, VlbTerms, is_channels_last, kept_scale

PACKAGE = Path(__file__).resolve().parents[2]


def why_unavailable(error: ImportError, package: Path = PACKAGE) -> str:
    """Why the C++ kernels cannot be used, and what to do.

    Args:
        error: What importing them raised.
        package: The folder of this package.
    """
    if any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return f"the C++ kernels in {package} cannot be loaded ({error}): install the package again"
    installed = [Path(entry, "ddpm_fast") for entry in sys.path]
    built = [folder for folder in installed if any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)]
    if built:
        return (
            f"the C++ kernels are not in the source folder {package}, which hides the package that is installed in "
            f"{built[0]}: run from another folder, or install from this one with: pip install -e ."
        )
    if others := sorted(path.name for path in package.glob("_C.*")):
        return f"the C++ kernels in {package} are for another Python ({others[0]}): install the package with this one"
    is_source = (package.parent / "setup.py").exists()
    when = "nothing was installed from it, or" if is_source else "when it was installed"
    return (
        f"the C++ kernels are not in {'the source folder ' if is_source else ''}{package}: {when} there was no C++ "
        "compiler, or it failed. Install it (again) with one at hand, g++ or clang++: pip install -v "
        f"{'-e .' if is_source else 'shows what happens'}"
    )


try:
    import ddpm_fast._C as _C  # type: ignore[import-not-found]  # built from C++

    unavailable = ""
except ImportError as error:
    _C = None
    unavailable = why_unavailable(error)

# Whether a call of a kernel can use several threads. Without OpenMP, which Apple's compiler lacks, it cannot.
has_threads = getattr(_C, "threads", True)

DTYPES = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # DType of csrc/storage.h
_NO_IMAGE = (0, 1, False)
_NO_ROWS = (0, 1, 0, 0)


def image_of(image: Tensor | None) -> tuple[int, int, bool]:
    """struct Image"""
    return _NO_IMAGE if image is None else (image.data_ptr(), DTYPES[image.dtype], is_channels_last(image))


def shape_of(image: Tensor) -> tuple[int, int, int]:
    """struct Shape: samples, channels, and positions, the product of the trailing dimensions"""
    n, channels = (image.shape[0], 1) if image.ndim < 2 else image.shape[:2]
    positions = 1
    for size in image.shape[2:]:
        positions *= size
    return n, channels, positions


def table_of(table: Tensor) -> tuple[int, int]:
    """struct Table"""
    return table.data_ptr(), table.shape[0]


def address_of(values: Tensor | None) -> int:
    """A pointer to contiguous values, or nullptr."""
    return 0 if values is None else values.data_ptr()


def noise_of(noise: Tensor | NoiseKey) -> tuple[tuple[int, int, bool], int, int, int, int]:
    """struct Noise"""
    if isinstance(noise, NoiseKey):
        return _NO_IMAGE, noise.seed.data_ptr(), noise.sample_id.data_ptr(), noise.step.data_ptr(), noise.stream
    return image_of(noise), 0, 0, 0, 0


def rows_of(values: Tensor | None) -> tuple[int, int, int, int]:
    """struct Rows of [N, C], or of [C] for every sample"""
    if values is None:
        return _NO_ROWS
    strides = values.stride()
    return values.data_ptr(), DTYPES[values.dtype], strides[0] if len(strides) == 2 else 0, strides[-1]


def pointer_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _norm_of(norm: Norm, y: Tensor, statistics: Tensor) -> tuple[object, ...]:
    """struct GroupNorm; y or what is like it, with the channels of what is joined"""
    x = norm.x
    return (
        shape_of(y),
        x.shape[1],
        norm.groups,
        norm.silu,
        DTYPES[x.dtype],
        x.data_ptr(),
        pointer_of(norm.residual),
        pointer_of(norm.joined),
        rows_of(norm.weight),
        rows_of(norm.bias),
        rows_of(norm.scale),
        rows_of(norm.shift),
        rows_of(norm.added),
        statistics.data_ptr(),
    )


def group_norm_of(norm: Norm, y: Tensor, total: Tensor | None, statistics: Tensor) -> tuple[object, ...]:
    """struct GroupNormArgs"""
    return _norm_of(norm, y, statistics), norm.eps, y.data_ptr(), pointer_of(total)


def group_norm_backward_of(
    norm: Norm,
    grad: Tensor,
    grad_total: Tensor | None,
    statistics: Tensor,
    dx: Tensor,
    djoined: Tensor | None,
    sums: Tensor,
) -> tuple[object, ...]:
    """struct GroupNormBackwardArgs"""
    return (
        _norm_of(norm, grad, statistics),
        grad.data_ptr(),
        pointer_of(grad_total),
        dx.data_ptr(),
        pointer_of(djoined),
        sums.data_ptr(),
    )


class Kernels(ABC):
    """The ops on one of the extension's two sets of kernels, the CPU's or the GPU's.

    Every backend's functions have these signatures: the results come last, and are there to be written.
    """

    @abstractmethod
    def run(self, op: str, image: Tensor, *arguments: object) -> None:
        """Calls the exported function `op` with the fields of its struct: the image's shape, then the arguments."""

    def normal(self, key: NoiseKey, out: Tensor) -> None:
        self.run("normal", out, noise_of(key), image_of(out))

    def q_sample(self, x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey, out: Tensor) -> None:
        self.run("q_sample", x0, image_of(x0), t.data_ptr(), table_of(table), noise_of(noise), image_of(out))

    def diffusion_loss(
        self,
        output: Tensor,
        x0: Tensor,
        t: Tensor,
        table: Tensor,
        noise: Tensor | NoiseKey,
        residual: Tensor | None,
        loss: Tensor,
    ) -> None:
        self.run(
            "diffusion_loss",
            x0,
            image_of(output),
            image_of(x0),
            t.data_ptr(),
            table_of(table),
            noise_of(noise),
            image_of(residual),
            loss.data_ptr(),
        )

    def hybrid_loss(
        self,
        output: Tensor,
        x0: Tensor,
        t: Tensor,
        table: Tensor,
        noise: Tensor | NoiseKey,
        gradient: Tensor | None,
        loss: Tensor,
        factors: Tensor,
    ) -> None:
        self.run(
            "hybrid_loss",
            x0,
            factors.shape[1],
            image_of(output),
            image_of(x0),
            t.data_ptr(),
            table_of(table),
            noise_of(noise),
            image_of(gradient),
            loss.data_ptr(),
            0,  # no mse_x0
            factors.data_ptr(),
        )

    def vlb_terms(
        self,
        output: Tensor,
        x0: Tensor,
        t: Tensor,
        table: Tensor,
        noise: Tensor | NoiseKey,
        gradient: Tensor | None,
        terms: VlbTerms,
        factors: Tensor,
    ) -> None:
        self.run(
            "vlb_terms",
            x0,
            factors.shape[1],
            image_of(output),
            image_of(x0),
            t.data_ptr(),
            table_of(table),
            noise_of(noise),
            image_of(gradient),
            terms.bits_per_dim.data_ptr(),
            terms.mse_x0.data_ptr(),
            factors.data_ptr(),
        )

    def loss_backward(self, stored: Tensor, scale: Tensor, grad: Tensor) -> None:
        self.run("loss_backward", stored, image_of(stored), scale.shape[1], scale.data_ptr(), image_of(grad))

    def reverse_step(
        self,
        x_t: Tensor,
        output: Tensor,
        x0_previous: Tensor | None,
        table: Tensor,
        step: Tensor,
        noise: Tensor | NoiseKey,
        results: ReverseStep,
    ) -> None:
        self.run(
            "reverse_step",
            x_t,
            2 if output.shape[1] > x_t.shape[1] else 1,
            image_of(x_t),
            image_of(output),
            image_of(x0_previous),
            table_of(table),
            step.data_ptr(),
            noise_of(noise),
            image_of(results.x),
            image_of(results.x0),
            image_of(results.x_model),
        )

    def draw_timesteps(self, draw: Draw, drawn: Drawn) -> None:
        self.run(
            "draw_timesteps",
            drawn.t,
            noise_of(draw.key),
            draw.num_timesteps,
            draw.parts,
            address_of(draw.probabilities),
            address_of(draw.cumulative),
            address_of(draw.network_timesteps),
            address_of(draw.labels),
            Stream.LABEL,
            draw.dropped,
            draw.null_label,
            drawn.t.data_ptr(),
            drawn.weights.data_ptr(),
            drawn.network_t.data_ptr(),
            address_of(drawn.labels),
        )

    def record_losses(self, history: Tensor, counts: Tensor, t: Tensor, losses: Tensor) -> None:
        self.run(
            "record_losses",
            history,
            history.data_ptr(),
            counts.data_ptr(),
            t.shape[0],
            t.data_ptr(),
            losses.data_ptr(),
        )

    def dropout(self, x: Tensor, key: NoiseKey, layer: int, dropped: int, out: Tensor) -> None:
        self.run(
            "dropout",
            x,
            image_of(x),
            key.seed.data_ptr(),
            key.sample_id.data_ptr(),
            layer,
            Stream.DROPOUT,
            dropped,
            kept_scale(dropped),
            image_of(out),
        )

    def table(self) -> dict[str, Callable[..., None]]:
        """The ops by name."""
        return {
            "normal": self.normal,
            "q_sample": self.q_sample,
            "diffusion_loss": self.diffusion_loss,
            "hybrid_loss": self.hybrid_loss,
            "vlb_terms": self.vlb_terms,
            "loss_backward": self.loss_backward,
            "reverse_step": self.reverse_step,
            "draw_timesteps": self.draw_timesteps,
            "record_losses": self.record_losses,
            "dropout": self.dropout,
        }
