"""`python -m ddpm_fast.export`: a model for other libraries and programs, and on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ddpm_fast.commands.common import (
    App,
    FlagsOption,
    ModelArgument,
    choose_device,
    console,
    path_option,
    plain_errors,
    say_written,
)
from ddpm_fast.commands.convert import convert
from ddpm_fast.commands.outcome import note
from ddpm_fast.commands.publishing import Publication
from ddpm_fast.errors import InputError
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats import hub
from ddpm_fast.formats.card import check_license
from ddpm_fast.formats.diffusers.export import chain_difference, export_diffusers
from ddpm_fast.formats.load import load_model
from ddpm_fast.formats.onnx import export_onnx
from ddpm_fast.formats.openai.export import export_openai
from ddpm_fast.formats.repository import target

_CHAIN_STEPS = 20  # of the chain that is compared: each asks two networks for an image

app = App()


def _to_diffusers(loaded: LoadedModel, out: Path) -> None:
    folder = export_diffusers(loaded.unet, loaded.diffusion, out, label_names=loaded.label_names)
    apart = chain_difference(loaded.unet, loaded.diffusion, folder, min(_CHAIN_STEPS, loaded.diffusion.num_timesteps))
    if apart is None:
        console.print("The folder was not compared: install diffusers (pip install diffusers) for that.")
    else:
        console.print(
            f"A chain of {apart.steps} steps that diffusers draws from it ends at most {apart.largest:.1e} from ours "
            f"of the same noise ({apart.mean:.1e} on average), of images in [-1, 1]."
        )


def _to_openai(loaded: LoadedModel, out: Path) -> None:
    flags = export_openai(loaded.unet, loaded.diffusion, out)
    console.print(f"Flags for their scripts: {escape(flags)}")


def _to_onnx(loaded: LoadedModel, out: Path) -> None:
    apart = export_onnx(loaded, out)
    if apart is None:
        console.print("The file was not compared: install onnxruntime (pip install 'ddpm-fast[onnx]') for that.")
    else:
        console.print(f"Check: onnxruntime's outputs are {apart:.1e} of their root mean square from ours.")


def _to_ours(loaded: LoadedModel, out: Path) -> None:
    convert(loaded, out)


# Each format: what writes it, and the name of the file in a repository; a folder has none.
_FORMATS: dict[str, tuple[Callable[[LoadedModel, Path], None], str]] = {
    "diffusers": (_to_diffusers, ""),
    "openai": (_to_openai, "model.pt"),
    "onnx": (_to_onnx, "model.onnx"),
    "ddpm_fast": (_to_ours, "model.safetensors"),
}


@app.command()
def main(
    model: ModelArgument,
    to: Annotated[
        str,
        typer.Option(help="diffusers (a pipeline's folder), openai (a .pt), onnx (the network alone), ddpm_fast"),
    ],
    out: Annotated[Path | None, path_option("the folder or file to write; may be left out with --push")] = None,
    flags: FlagsOption = None,
    push: Annotated[
        str | None,
        typer.Option(help="send it to hf:OWNER/NAME, with a page that describes it; otherwise nothing is sent"),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="with --push: under which licence others may use it, such as mit or cc-by-4.0")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="with --push: a new repository can be seen by all; otherwise by you alone")
    ] = False,
    samples: Annotated[int, typer.Option(help="with --push: how many images to draw for the page; 0 for none")] = 16,
    device: Annotated[str, typer.Option(help="where to draw them: auto, cpu, cuda, cuda:1, mps, xpu, ...")] = "auto",
) -> None:
    """Write a model in another library's format, and with --push send it to the Hugging Face Hub."""
    with plain_errors():
        if to not in _FORMATS:
            raise InputError(f"--to is {to!r:.200}; expected one of {', '.join(_FORMATS)}")
        if push is None:
            if out is None:
                raise InputError("--out is missing: give the folder or file to write, or --push hf:OWNER/NAME")
            if license is not None or public:
                raise InputError("--license and --public are for --push: give --push hf:OWNER/NAME, or leave them out")
        publication = None
        if push is not None:
            publication = Publication(target(push), to, check_license(license), not public, samples)
            hub.library(push)
        loaded = load_model(model, flags=flags)
        write, name = _FORMATS[to]
        if out is not None:
            write(loaded, out)
            say_written(out)
        if publication is not None:
            with tempfile.TemporaryDirectory(prefix="ddpm_fast-") as folder:
                write(loaded, Path(folder) / name)
                publication.send(loaded, Path(folder), choose_device(device))
        note(form=to, pushed=push)
