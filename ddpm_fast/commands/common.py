"""What the commands share: where to compute, and how bad input is reported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import typer
from rich.console import Console
from rich.markup import escape

from ddpm_fast import compat
from ddpm_fast.errors import InputError
from ddpm_fast.files.checkpoint import LoadedModel

# Lines are not broken where a terminal ends: a path or a number that is split cannot be copied.
console = Console(highlight=False, soft_wrap=True)
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Inside, an InputError ends the command with its message and status 2 instead of a traceback."""
    try:
        yield
    except InputError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. Raises InputError for a device that is not there."""
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
    """Whether bf16 is faster than fp32 on this device: on a GPU, or on a CPU with bf16 instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and compat.cpu_has_bf16()


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bf16 where that is faster, else fp32. Raises InputError for an unknown name."""
    choices = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    if name == "auto":
        return torch.bfloat16 if fast_bf16(device) else torch.float32
    if name not in choices:
        raise InputError(f"precision {name!r} is unknown; expected auto, {', '.join(choices)}")
    return choices[name]


def parse_labels(text: str | None, n: int, classes: int, names: list[str] | None) -> list[int] | None:
    """The classes of n samples, or None for unconditional ones.

    Args:
        text: None for every class in turn, "none" for unconditional samples, or classes by number or name, separated by
            commas, which are taken in turn.
        n: How many samples there are.
        classes: The number of the model's classes; 0 for an unconditional model.
        names: The names of the classes, if they have any.

    Raises:
        InputError: For a class that the model does not have.
    """
    if text == "none" or (text is None and classes == 0):
        return None
    if classes == 0:
        raise InputError("--labels: this model is unconditional (it was trained without classes); leave it out")
    if text is None:
        return [i % classes for i in range(n)]
    by_name = {name: i for i, name in enumerate(names or [])} | {str(i): i for i in range(classes)}
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in chosen if part not in by_name]
    if unknown or not chosen:
        known = f"0..{classes - 1}" + (f" or {', '.join(names)}" if names else "")
        raise InputError(f"--labels: {', '.join(unknown) or 'nothing'} is no class of this model; it has {known}")
    return [by_name[chosen[i % len(chosen)]] for i in range(n)]


def check_null_class(loaded: LoadedModel, why: str) -> None:
    """Raises InputError if the model's null class was never trained, because its training dropped no labels. why: what
    the null class is needed for."""
    label_drop = (loaded.config.get("training") or {}).get("label_drop")
    if loaded.model.config.num_classes and label_drop == 0:
        raise InputError(
            f"{why}, but {loaded.path} was trained with --label-drop 0, so its null class was never trained: give "
            "labels and leave guidance out, or train with --label-drop 0.1"
        )
