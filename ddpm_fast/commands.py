"""What the commands share: where to compute, and how bad input is reported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import typer
from rich.console import Console
from rich.markup import escape

from .errors import InputError

console = Console(highlight=False)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Inside, an InputError ends the command with its message and status 2 instead of a traceback."""
    try:
        yield
    except InputError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used here ({first_line}); expected auto, cpu or cuda") from None
    return device


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: on a GPU, or on a CPU with bf16 instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    return "AVX512" in capability and bool(torch.cpu._is_avx512_bf16_supported())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 where that is faster, else fp32. Raises InputError for another name than auto, fp32, bf16."""
    choices = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if name == "auto":
        return torch.bfloat16 if fast_bf16(device) else torch.float32
    if name not in choices:
        raise InputError(f"precision {name!r} is unknown; expected auto, {', '.join(choices)}")
    return choices[name]
