"""How fast the library's convolutions are, by the shapes of CIFAR-10's network: `python -m benchmarks convolutions`.

They take most of the time of a network whose other operations are fused. Each shape is timed with and without a bias,
with and without cudnn.benchmark, and backward by gradient; and upsampling as nearest neighbours and a 3x3 convolution
beside one transposed convolution of the same result.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, timing
from benchmarks.rows import duration
from benchmarks.runs import Options, Run, say

ROUNDS, QUICK_ROUNDS = 5, 1
DTYPE = torch.bfloat16
FORWARD_BATCHES, BACKWARD_BATCHES = (256, 1), (128,)


class Shape(NamedTuple):
    """A convolution: channels in and out, the height of its image, its kernel and stride, and how often it is in the
    network of Ho et al."""

    channels: int
    out_channels: int
    height: int
    kernel: int = 3
    stride: int = 1
    count: int = 1

    def __str__(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel} {self.channels}->{self.out_channels} at {self.height}{stride}"

    @property
    def padding(self) -> int:
        return self.kernel // 2 if self.stride == 1 else 0  # that of stride 2 gets an image that is already padded

    def flops(self, batch: int) -> int:
        """Multiplications and additions of a pass."""
        pixels = (self.height // self.stride) ** 2
        return 2 * batch * pixels * self.channels * self.out_channels * self.kernel**2


# The most work first.
SHAPES = (
    Shape(128, 128, 32, 3, 1, 7),
    Shape(256, 256, 16, 3, 1, 7),
    Shape(512, 256, 16, 3, 1, 2),
    Shape(256, 256, 32, 3, 1, 1),
    Shape(256, 128, 32, 3, 1, 2),
    Shape(384, 128, 32, 3, 1, 1),
    Shape(256, 256, 8, 3, 1, 8),
    Shape(512, 256, 8, 3, 1, 3),
    Shape(384, 256, 16, 3, 1, 1),
    Shape(128, 128, 32, 3, 2, 1),
    Shape(256, 256, 16, 3, 2, 1),
    Shape(256, 256, 4, 3, 1, 11),
    Shape(128, 256, 16, 3, 1, 1),
    Shape(512, 256, 16, 1, 1, 2),
    Shape(256, 128, 32, 1, 1, 2),
    Shape(512, 256, 4, 3, 1, 3),
    Shape(384, 128, 32, 1, 1, 1),
    Shape(256, 256, 8, 3, 2, 1),
    Shape(512, 256, 8, 1, 1, 3),
    Shape(384, 256, 16, 1, 1, 1),
    Shape(128, 256, 16, 1, 1, 1),
    Shape(512, 256, 4, 1, 1, 3),
    Shape(3, 128, 32, 3, 1, 1),
    Shape(128, 3, 32, 3, 1, 1),
)
UPSAMPLED = tuple(Shape(256, 256, height) for height in (4, 8, 16))


class Case(NamedTuple):
    """What is timed of a shape. kind: of KINDS. benchmark: whether cudnn.benchmark chooses the kernel."""

    kind: str
    shape: Shape
    batch: int
    benchmark: bool

    def __str__(self) -> str:
        return f"{self.kind} {self.shape}, batch {self.batch}{', cudnn.benchmark' if self.benchmark else ''}"


class Timer(NamedTuple):
    """Times calls on a device: from a CUDA graph, on the CPU one by one."""

    device: torch.device
    rounds: int

    def seconds(self, call: Callable[[], object]) -> float:
        """The median."""
        make = timing.graph_batch if self.device.type == "cuda" else timing.batch
        return float(np.median(timing.interleaved([make([call], self.device)], self.rounds, self.device, warmup=1)))


def tensors(shape: Shape, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Image, weight and bias. channels_last, as the networks have them."""
    height = shape.height + (shape.stride > 1)
    sizes = (batch, shape.channels, height, height), (shape.out_channels, shape.channels, shape.kernel, shape.kernel)
    x, weight = (torch.randn(size, device=device, dtype=DTYPE) for size in sizes)
    bias = torch.randn(shape.out_channels, device=device, dtype=DTYPE)
    return *(v.contiguous(memory_format=torch.channels_last) for v in (x, weight)), bias


def forward(shape: Shape, batch: int, timer: Timer) -> Iterator[dict[str, Any]]:
    """Lines of the pass forward, with and without a bias."""
    x, weight, bias = tensors(shape, batch, timer.device)
    for name, added in (("forward", None), ("forward with bias", bias)):
        call = functools.partial(F.conv2d, x, weight, added, shape.stride, shape.padding)
        yield {"pass": name, "seconds": timer.seconds(call)}


def backward(shape: Shape, batch: int, timer: Timer) -> Iterator[dict[str, Any]]:
    """Lines of the three gradients."""
    x, weight, _ = tensors(shape, batch, timer.device)
    grad = torch.randn_like(F.conv2d(x, weight, None, shape.stride, shape.padding))
    for i, name in enumerate(("input", "weight", "bias")):
        mask = [i == number for number in range(3)]
        rest = [shape.out_channels], [shape.stride] * 2, [shape.padding] * 2, [1, 1], False, [0, 0], 1, mask
        call = functools.partial(torch.ops.aten.convolution_backward, grad, x, weight, *rest)
        yield {"pass": f"gradient of the {name}", "seconds": timer.seconds(call)}


def upsampling(shape: Shape, batch: int, timer: Timer) -> Iterator[dict[str, Any]]:
    """Lines of both ways to upsample an image to twice its height."""
    x, weight, _ = tensors(shape, batch, timer.device)
    _, folded, _ = tensors(shape._replace(kernel=4), batch, timer.device)
    ways: dict[str, Callable[[], Tensor]] = {
        "nearest, 3x3": lambda: F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1),
        "transposed 4x4": lambda: F.conv_transpose2d(x, folded, None, 2, 1),
    }
    for name, call in ways.items():
        yield {"pass": name, "seconds": timer.seconds(call)}


KINDS: dict[str, Callable[[Any, int, Timer], Iterator[dict[str, Any]]]] = {
    "forward": forward,
    "backward": backward,
    "upsampling": upsampling,
}


def measured(case: Case, run: Run) -> None:
    """Adds a case's lines to the file, and says them."""
    timer, convolves = Timer(run.device, run.options.rounds), case.kind != "upsampling"
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, case.benchmark
    try:
        with torch.inference_mode():
            for found in KINDS[case.kind](case.shape, case.batch, timer):
                line = {**case.shape._asdict(), "batch": case.batch, "cudnn_benchmark": case.benchmark, **found}
                rate = ""
                if convolves and "bias" not in found["pass"]:
                    line["flops_per_second"] = case.shape.flops(case.batch) / found["seconds"]
                    rate = f", {line['flops_per_second'] / 1e12:.0f} TFLOP/s"
                run.found["convolutions"].append(line)
                say(f"{case}: {found['pass']} {duration(found['seconds'])}{rate}")
    finally:
        torch.backends.cudnn.benchmark = before


def main(options: Options) -> None:
    """Times every shape, the batch that counts first, and writes the results to a file."""
    options = options.checked(ROUNDS, QUICK_ROUNDS)
    shapes, upsampled, forwards, backwards = SHAPES, UPSAMPLED, FORWARD_BATCHES, BACKWARD_BATCHES
    if options.quick:
        shapes, upsampled, forwards, backwards = (
            (Shape(8, 16, 8), Shape(8, 8, 8, stride=2)),
            (Shape(8, 8, 4),),
            (2,),
            (2,),
        )
    cases = []
    for benchmark in (False, True) if options.place.type == "cuda" else (False,):
        cases += [Case("forward", shape, n, benchmark) for n in forwards for shape in shapes]
        cases += [Case("backward", shape, n, benchmark) for n in backwards for shape in shapes]
        cases += [Case("upsampling", shape, n, benchmark) for n in forwards for shape in upsampled]
    run = Run(options, machine.ceilings(options.place, matrices=not options.quick), convolutions=[])
    run.each(options.matching(cases), lambda case: measured(case, run))
    run.finish()
