"""`python -m ddpm_fast.info`: what was built, what is active, and why the rest is not; and what a model is.

python -m ddpm_fast.info              the package
python -m ddpm_fast.info MODEL        a model, and whether it computes what it did when it was converted
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from ddpm_fast import __version__, ops
from ddpm_fast.commands.common import SOURCES, App, FlagsOption, console, expand_home, plain_errors
from ddpm_fast.commands.outcome import note
from ddpm_fast.commands.precision import automatic_precision, fast_bf16
from ddpm_fast.data import BUILTIN
from ddpm_fast.files.checkpoint import available_models
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats import outputs
from ddpm_fast.formats.facts import facts
from ddpm_fast.formats.load import load_model
from ddpm_fast.ops.backends import cpu, cuda, extension, reference
from ddpm_fast.ops.dispatch import Status

app = App()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    """A line for each GPU: its name, and the precision in which `--precision auto` trains there; or one for none."""
    kind = "CUDA" if torch.version.hip is None else f"ROCm {torch.version.hip}"
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        return [f"{kind}: none ({'torch finds no GPU or driver' if built else 'this torch was built without it'})"]
    lines = []
    for index in range(torch.cuda.device_count()):
        trains_in = automatic_precision(torch.device("cuda", index))
        lines.append(f"{kind}: cuda:{index}, {torch.cuda.get_device_name(index)}; trains in {trains_in} by default")
    return lines


@app.command()
def main(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help=f"tell of a model: {SOURCES}", callback=expand_home)
    ] = None,
    flags: FlagsOption = None,
) -> None:
    """What was built, what is active, and why the rest is not. Or, of a MODEL, what it is, and whether it still
    computes what it did when it was converted."""
    with plain_errors(says_missing_kernels=False):
        if model is not None:
            _tell_of(load_model(model, flags=flags))
            return
        state = _state()
        note(**state)
        _tell(state)


def _state() -> dict[str, Any]:
    """What was built and what is active, as JSON's types."""
    return {
        "version": __version__,
        "folder": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "no_kernels": cpu.unavailable,
        "isa": None if cpu.unavailable else cpu.isa(),
        "isas": cpu.isas(),
        "has_threads": extension.has_threads,
        "gpus": _gpus(),
        "fast_bf16": fast_bf16(torch.device("cpu")),
        "backends": [
            {"name": status.name, "state": _state_of(status), "ops": list(status.ops)}
            for status in ops.backend_status()
        ],
        "active": {
            device: {op: ops.active_backend(op, device) for op in reference.OPS}
            for device in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
        },
        "models": available_models(),
        "data_sets": list(BUILTIN),
    }


def _state_of(status: Status) -> str:
    """Why a backend cannot be used, or what it is ready for."""
    kind = "cuda" if status.name == "cuda" or (torch.cuda.is_available() and status.name == "triton") else "cpu"
    ready = f"ready for {kind.upper()} tensors"
    if status.name == "cuda" and not status.unavailable:
        ready += f" (built for compute capabilities {cuda.capabilities()})"
    return status.unavailable or ops.cannot_run_on(status.name, torch.device(kind)) or ready


def _tell(state: dict[str, Any]) -> None:
    """Print what `_state` gives."""
    console.print(f"[bold]ddpm_fast {state['version']}[/] in {escape(state['folder'])}")
    console.print(
        f"Python {state['python']}, torch {state['torch']}, triton {state['triton']}, "
        f"{state['threads']} threads on {state['machine']}"
    )
    if state["no_kernels"]:
        console.print(f"[red]No C++ kernels[/]: {escape(state['no_kernels'])}")
    else:
        idle = [name for name in state["isas"] if name != state["isa"]]
        threads = "" if state["has_threads"] else " on one thread (built without OpenMP)"
        console.print(
            f"C++ extension: built; CPU kernels for {state['isa']} active{threads}"
            + (f" (also runnable: {', '.join(idle)}; DDPM_FAST_CPU_ISA chooses)" if idle else "")
        )
    for line in state["gpus"]:
        console.print(escape(line))
    console.print(f"bf16 on this CPU: {'fast' if state['fast_bf16'] else 'emulated, slower than fp32'}")
    console.print("Backends, fastest first:")
    for backend in state["backends"]:
        name, known = backend["name"], ", ".join(backend["ops"]) or "none"
        console.print(f"  {name}: {escape(backend['state'])} (ops: {known})")
    for device, active in state["active"].items():
        console.print(f"Active for {device} tensors: " + ", ".join(f"{op}: {name}" for op, name in active.items()))
    models, data_sets = ", ".join(state["models"]) or "none", ", ".join(state["data_sets"])
    console.print(f"Models: {models}. Data sets: {data_sets}.")


def _tell_of(loaded: LoadedModel) -> None:
    """Print what a model is, and check it if it has a check. Raises typer.Exit if it fails."""
    described = facts(loaded)
    for name, value in described.items():
        console.print(f"{name}: {escape(value)}")
    apart = outputs.check(loaded)
    note(model=described, difference=apart, allowed_difference=outputs.TOLERANCE)
    if apart is None:
        console.print("Check: none; `python -m ddpm_fast.convert` writes one into the file that it makes.")
        return
    holds = apart <= outputs.TOLERANCE
    console.print(
        f"Check: {'passed' if holds else '[bold red]failed[/]'}: the outputs for three made inputs are {apart:.1e} of "
        f"their root mean square from those of the conversion (at most {outputs.TOLERANCE:.0e} is rounding)."
    )
    if not holds:
        raise typer.Exit(1)
