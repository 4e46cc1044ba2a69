"""`python -m ddpm_fast.convert`: keep another library's model as a file of ours, with a check of its outputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from ddpm_fast.commands.common import App, FlagsOption, ModelArgument, console, path_option, plain_errors, say_written
from ddpm_fast.commands.outcome import note
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import check_writable
from ddpm_fast.files.checkpoint import save_model
from ddpm_fast.files.classifier import save_classifier
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats import outputs
from ddpm_fast.formats.facts import facts
from ddpm_fast.formats.load import load_model
from ddpm_fast.formats.load_classifier import is_other_classifier, load_classifier
from ddpm_fast.nn.classifier import Classifier
from ddpm_fast.nn.work import parameters

app = App()

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@app.command()
def main(
    source: ModelArgument,
    out: Annotated[Path, path_option("where the model goes: a .safetensors file")] = Path("model.safetensors"),
    flags: FlagsOption = None,
    dtype: Annotated[
        str, typer.Option(help="of the weights: fp32, as they are, or bf16, half the size, which rounds them")
    ] = "fp32",
) -> None:
    """Convert a model to a file of ours: its network, schedule, prediction and variance, and where it is from.

    The file also keeps what the network answers to three made inputs, and is compared with that here and by
    `python -m ddpm_fast.info MODEL`. A classifier of noised images becomes a file that guides a sampler.
    """
    with plain_errors():
        if dtype not in _DTYPES:
            raise InputError(f"--dtype is {dtype!r:.200}; expected {' or '.join(_DTYPES)}")
        if out.suffix != ".safetensors":
            raise InputError(f"--out is {out}; expected a name ending in .safetensors")
        check_writable(out)
        if is_other_classifier(source):
            _convert_classifier(load_classifier(source, flags=flags), out, _DTYPES[dtype])
            say_written(out)
            return
        loaded = load_model(source, flags=flags)
        for name, value in facts(loaded).items():
            console.print(escape(f"{name}: {value}"))
        apart = convert(loaded, out, _DTYPES[dtype])
        note(model=facts(loaded), difference=apart)
        console.print(
            f"Check: the outputs of the file for three made inputs are {apart:.1e} of their root mean square from the "
            f"source's ({dtype} weights)."
        )
        say_written(out)


def _convert_classifier(classifier: Classifier, out: Path, dtype: torch.dtype) -> None:
    """Write a classifier as a file of ours, and say what it is."""
    config = classifier.config
    console.print(
        f"a classifier of noised images of {'x'.join(map(str, config.unet.shape))}, {config.num_classes} classes, pool "
        f"{config.pool}, {parameters(classifier) / 1e6:.1f} million parameters"
    )
    save_classifier(out, classifier, dtype)
    load_classifier(out)


def convert(loaded: LoadedModel, out: Path, dtype: torch.dtype = torch.float32) -> float:
    """Write a model as a file of ours, with a check.

    Args:
        loaded: The model, in fp32 on the CPU.
        out: The file to write.
        dtype: Of the weights in it.

    Returns:
        The largest difference of the file's outputs from the model's, relative to their root mean square.

    Raises:
        InputError: If the network is none of ours, or the file cannot be written.
    """
    model, steps = loaded.unet, loaded.diffusion.num_timesteps
    origin = {"file": loaded.name, "sha256": loaded.digest} | loaded.origin
    stored = copy.deepcopy(model).to(dtype).float()
    config = loaded.config | {"origin": origin, "check": outputs.recorded(outputs.answer(stored, steps))}
    save_model(out, model.state_dict(), config, dtype)
    again = load_model(out)
    changed = outputs.check(again)
    if changed is None or changed > outputs.TOLERANCE:
        raise RuntimeError(f"{out} answers otherwise than what was written: {changed}")
    return outputs.difference(outputs.recorded(outputs.answer(model, steps)), outputs.answer(again.unet, steps))
