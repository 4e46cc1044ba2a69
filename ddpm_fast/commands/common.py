"""What the commands share: where to compute, and how bad input is reported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import typer
from rich.console import Console
from rich.markup import escape

from ddpm_fast.errors import InputError
from ddpm_fast.files.checkpoint import LoadedModel

console = Console(highlight=False)
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


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
    choices = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    if name == "auto":
        return torch.bfloat16 if fast_bf16(device) else torch.float32
    if name not in choices:
        raise InputError(f"precision {name!r} is unknown; expected auto, {', '.join(choices)}")
    return choices[name]


def parse_labels(text: str | None, n: int, classes: int, names: list[str] | None) -> list[int] | None:
    """The classes of n samples. None: every class in turn. "none": unconditional. Otherwise classes by number or name,
    separated by commas, in turn. Raises InputError for one that the model does not have."""
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
    """Raises InputError if the model's training never dropped a label, so that its null class, which is wanted for what
    `why` says, is that of a new network."""
    label_drop = (loaded.config.get("training") or {}).get("label_drop")
    if loaded.model.config.num_classes and label_drop == 0:
        raise InputError(
            f"{why}, but {loaded.path} was trained with --label-drop 0, so that its null class was never trained: give "
            "labels and leave guidance out, or train with --label-drop 0.1"
        )
