"""Whether the contents of a model file fit together: its config, the network that this describes, and the weights.

A file may come from anywhere, so nothing is believed: what its config asks for is bounded by what the file holds before
anything of that size is made.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files import tensorfile
from ddpm_fast.files.memory import memory_for
from ddpm_fast.nn.classifier import Classifier, ClassifierConfig
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.unet_config import UNetConfig
from ddpm_fast.values import ValueRange

# The types that weights are stored in. torch would load integers and complex numbers too, and round them in silence.
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def build(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[UNet, GaussianDiffusion]:
    """The network of a model file, with its weights, and the diffusion.

    Args:
        path: The file, for messages.
        state: Its tensors.
        config: What save_model was given.

    Raises:
        InputError: If the config does not build a model, the weights do not fit it, or weights are not finite.
    """
    if "classifier" in config:
        raise InputError(
            f"{path} is a classifier of noised images, which draws nothing itself: give it beside a model, as "
            "--classifier (in Python: load_classifier, and sample's classifier=)"
        )
    missing = [key for key in ("unet", "diffusion") if key not in config]
    if missing:
        raise InputError(f"{path}: its config lacks {' and '.join(missing)}: write it again with save_model")
    try:
        unet = UNetConfig.from_dict(config["unet"])
        diffusion = GaussianDiffusion.from_dict(config["diffusion"])
        _check_size(state, unet)
        _check_rest(config, unet)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: its config is nested too deep: write it again with save_model") from error
    with memory_for(path, 4 * sum(tensor.numel() for tensor in state.values())):
        model = UNet(unet)
        _check_fits(path, state, model.state_dict())
        check_finite(path, state)
        model.load_state_dict(state)
    return model, diffusion


def build_classifier(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Classifier:
    """The classifier of a file, with its weights.

    Args:
        path: The file, for messages.
        state: Its tensors.
        config: What it was written with: {"classifier": {...}}.

    Raises:
        InputError: If it is no classifier's file, the config does not build one, the weights do not fit it, or weights
            are not finite.
    """
    if "classifier" not in config:
        raise InputError(f"{path} is a model that draws; expected a classifier of noised images")
    try:
        fields = ClassifierConfig.from_dict(config["classifier"])
        _check_size(state, fields.unet, is_half=True)
        if fields.num_classes > sum(tensor.numel() for tensor in state.values()):
            raise InputError(f"num_classes is {fields.num_classes}, more than the file has weights")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: its config is nested too deep: write it again with save_classifier") from error
    with torch.device("meta"):
        wanted = Classifier(fields).state_dict()
    _check_fits(path, state, wanted)
    check_finite(path, state)
    with memory_for(path, 4 * sum(tensor.numel() for tensor in state.values())):
        classifier = Classifier(fields)
        classifier.load_state_dict(state)
    return classifier


def _check_rest(config: Mapping[str, Any], unet: UNetConfig) -> None:
    """The entries of a config that build nothing. Raises InputError if they are not what others rely on."""
    names, training = config.get("label_names"), config.get("training")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"label_names is {reprlib.repr(names)}; expected a list of one name for each class, or null")
    if names is not None and unet.num_classes and len(names) != unet.num_classes:
        raise InputError(f"label_names has {len(names)} names for num_classes = {unet.num_classes}; expected as many")
    if training is not None and not isinstance(training, dict):
        raise InputError(f"training is {reprlib.repr(training)}; expected an object, or null")
    if config.get("value_range") is not None:
        channels = ValueRange.from_dict(config["value_range"]).channels
        if channels != unet.in_channels:
            raise InputError(f"value_range has {channels} channels, the network {unet.in_channels}; expected as many")


def _check_size(state: Mapping[str, Tensor], unet: UNetConfig, is_half: bool = False) -> None:
    """Raise InputError if the network has more layers or parameters than the file, as far as is quickly counted.
    is_half: Whether it has the way down alone."""
    elements = sum(tensor.numel() for tensor in state.values())
    first, blocks = unet.model_channels, unet.num_res_blocks if is_half else 2 * unet.num_res_blocks + 1
    # Of a residual block: ten tensors or more; a 3x3 convolution of its channels, and the layer of the embedding.
    layers = 10 * blocks * len(unet.channel_mult)
    parameters = blocks * sum(9 * channels**2 + 4 * first * channels for channels in unet.level_channels)
    parameters += 9 * unet.in_channels * unet.first_channels + 16 * first**2 + 4 * first * unet.num_classes
    if layers > len(state) or parameters > elements:
        raise InputError(
            f"its config describes a larger network than the file holds, which has {len(state)} tensors of "
            f"{elements:,} values in all (model_channels {unet.model_channels}, num_res_blocks {unet.num_res_blocks}, "
            f"num_classes {unet.num_classes}). Save the state_dict of the network that this config builds"
        )


def _check_fits(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise InputError unless the tensors have the names and shapes of the network's, and are floating weights."""
    shapes = {name: list(tensor.shape) for name, tensor in wanted.items()}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    problems = offenders("missing", [f"{n} {shapes[n]}" for n in shapes if n not in found])
    problems += offenders("unexpected", [f"{n} {found[n]}" for n in found if n not in shapes])
    differ = [n for n in shapes if found.get(n, shapes[n]) != shapes[n]]
    problems += offenders("of another shape", [f"{n} {found[n]} instead of {shapes[n]}" for n in differ])
    other = [n for n, t in wanted.items() if n in state and t.is_floating_point() and state[n].dtype not in _WEIGHTS]
    kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _WEIGHTS)
    problems += offenders(f"of another type than {kinds}:", [f"{n} {tensorfile.kind(state[n])}" for n in other])
    if problems:
        raise InputError(
            f"{path}: its weights do not fit the network of its config: {'; '.join(problems)}. "
            "Save the state_dict of the network that this config builds"
        )


def check_finite(what: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError if a floating tensor holds a value that is not finite. what: Whose tensors they are."""
    # A finite sum proves that all terms are finite. For bfloat16 on a CPU it is 50 times faster than isfinite.
    floats = [name for name, t in tensors.items() if t.is_floating_point()]
    suspects = [name for name in floats if not tensors[name].sum(dtype=torch.float32).isfinite()]
    bad = [name for name in suspects if not tensors[name].isfinite().all()]
    if bad:
        counts = [f"{n} ({int((~tensors[n].isfinite()).sum())} of {tensors[n].numel()} values)" for n in bad]
        raise InputError(
            f"{what} has {offenders('weights that are not finite:', counts)[0]}. "
            f"The training diverged, or the weights overflow {tensors[bad[0]].dtype}: use an earlier checkpoint"
        )


def offenders(what: str, names: list[str]) -> list[str]:
    """A list of one phrase that names the first three, or an empty list for no names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what} {', '.join(names[:3])}{more}"] if names else []
