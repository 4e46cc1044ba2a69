"""The launches of a Triton op, caught instead of run, and compiled for a GPU that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
from support import sass
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ddpm_fast.ops.backends import triton as triton_backend

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    kernel: object
    args: tuple
    options: dict


class Recorder:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        assert all(size > 0 for size in grid)
        return lambda *args, **options: self.launches.append(Launch(self.kernel, args, options))


def launches_of(name: str, *arguments) -> list[Launch]:
    """The kernels that an op launches, and nothing runs."""
    launches: list[Launch] = []
    op = triton_backend.OPS[name]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in list(op.__globals__.items()):
            if key.endswith("_kernel"):
                patch.setitem(op.__globals__, key, Recorder(value, launches))
        op(*arguments)
    return launches


def assembled(launch: Launch, target: GPUTarget) -> object:
    """What Triton compiles of a launch, with the types, constants, alignment and number of warps that it has."""
    signature, constants, alignment = {}, {}, {}
    options = dict(launch.options)
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    values |= {name: options.pop(name) for name in launch.kernel.arg_names if name in options}
    for i, name in enumerate(launch.kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            alignment[(i,)] = [["tt.divisibility", 16]]  # as torch allocates on a GPU
        elif value is None or launch.kernel.params[i].is_constexpr:
            signature[name], constants[name] = "constexpr", value
        else:
            assert launch.kernel.params[i].do_not_specialize, f"{name} would compile the kernel anew for some values"
            signature[name] = "i32" if value < 2**31 else "i64"
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=alignment)
    return triton.compile(source, target=target, options=options)


def compiled(launch: Launch, capability: int, folder: Path) -> tuple[str, sass.Kernel]:
    """(PTX, machine code) as the launch would have it."""
    kernel = assembled(launch, GPUTarget("cuda", capability, 32))
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    (machine_code,) = sass.kernels(folder / "kernel.cubin")
    return kernel.asm["ptx"], machine_code
