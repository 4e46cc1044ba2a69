"""A model of ours as a folder that diffusers' DDPMPipeline loads.

It is written without diffusers, as the JSON and safetensors that its save_pretrained writes; tried with VERSION. A
network of classes gets a pipeline of its own beside it (pipeline.py), because DDPMPipeline gives no labels.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import writing
from ddpm_fast.files.fit import check_finite
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.diffusers.config import unet_fields
from ddpm_fast.formats.diffusers.diffusion import scheduler_fields
from ddpm_fast.formats.diffusers.folder import CONFIG, INDEX, SCHEDULER, WEIGHTS
from ddpm_fast.formats.diffusers.network import their_names, to_diffusers
from ddpm_fast.nn.unet import UNet
from ddpm_fast.respacing import TimestepSpec

VERSION = "0.42.1"
PIPELINE = "pipeline.py"


class ChainDifference(NamedTuple):
    """How far two chains of the same noise are apart at their end, where images lie in [-1, 1].

    Attributes:
        steps: The number of sampling steps.
        largest: The largest absolute difference of a pixel.
        mean: The mean absolute difference.
    """

    steps: int
    largest: float
    mean: float


def export_diffusers(
    model: UNet | LoadedModel,
    diffusion: GaussianDiffusion | None,
    folder: str | os.PathLike,
    *,
    clip: bool = True,
    label_names: list[str] | None = None,
) -> Path:
    """Write a model as a folder for diffusers: DDPMPipeline.from_pretrained(folder).

    Args:
        model: The network, or what load_model gave.
        diffusion: What it was trained with; None means that of the loaded model.
        folder: The folder to make. Nothing may be there, or an empty folder.
        clip: Whether the pipeline limits the predicted x_0 to [-1, 1], as `sample` does by default.
        label_names: One name for each class; the default are those of the loaded model.

    Returns:
        The folder.

    Raises:
        InputError: If diffusers cannot have this network or diffusion, naming the field; if weights are not finite; if
            something is at the folder's place, or it cannot be written. Then nothing is left behind.
    """
    if isinstance(model, LoadedModel):
        label_names = label_names or model.label_names
    network, diffusion = _checked(model, diffusion)
    config, state = network.config, network.sampling_state()
    fields, scheduler = unet_fields(config), scheduler_fields(diffusion, clip)
    weights = to_diffusers(state, their_names(state, config), config)
    check_finite("the model", weights)
    parts = {
        INDEX: _index(config.num_classes, config.null_class, label_names),
        f"unet/{CONFIG}": {"_class_name": "UNet2DModel", "_diffusers_version": VERSION, **fields},
        f"scheduler/{SCHEDULER}": {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION, **scheduler},
    }
    return _write(Path(os.path.realpath(folder)), parts, weights, with_pipeline=config.num_classes > 0)


def _checked(model: object, diffusion: object) -> tuple[UNet, GaussianDiffusion]:
    """The network and the diffusion, if DDPMPipeline can run them. Raises InputError otherwise."""
    if isinstance(model, LoadedModel):
        model, diffusion = model.model, diffusion or model.diffusion
    if not isinstance(model, UNet):
        raise InputError(f"the model is a {type(model).__name__}; expected a UNet, or what load_model gave")
    if not isinstance(diffusion, GaussianDiffusion):
        raise InputError(f"the diffusion is a {type(diffusion).__name__}; expected a GaussianDiffusion")
    config = model.config
    if config.condition_channels:
        raise InputError(
            f"DDPMPipeline has no image to give beside the sample; this network's condition_channels is "
            f"{config.condition_channels}"
        )
    if diffusion.objective.learned != config.learned_variance:
        raise InputError(
            f"the diffusion's variance is {diffusion.objective.variance!r}, and the network's learned_variance is "
            f"{config.learned_variance}: give the diffusion that it was trained with"
        )
    return model, diffusion


def _index(classes: int, null_class: bool, label_names: list[str] | None) -> dict[str, Any]:
    """The model_index.json: which classes load the parts, and what else the pipeline is given."""
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    if not classes:
        return {"_class_name": "DDPMPipeline", "_diffusers_version": VERSION, **parts}
    if label_names is not None and len(label_names) != classes:
        raise InputError(f"label_names has {len(label_names)} names for {classes} classes; expected one for each")
    return {
        "_class_name": [PIPELINE.removesuffix(".py"), "ClassConditionalPipeline"],
        "_diffusers_version": VERSION,
        **parts,
        "null_class": null_class,
        "id2label": None if label_names is None else {str(i): name for i, name in enumerate(label_names)},
    }


def _write(
    folder: Path, parts: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Tensor], with_pipeline: bool
) -> Path:
    """Write everything under a temporary name beside the folder, then rename it."""
    with writing(folder):
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} is there already; expected a new or empty folder: choose another name")
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = folder.parent / f".ddpm_fast-{secrets.token_hex(8)}"
        try:
            for name, content in parts.items():
                path = made / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
            save_file(plain, made / "unet" / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
            if with_pipeline:
                shutil.copyfile(Path(__file__).with_name("pipeline.py"), made / PIPELINE)
            if folder.is_dir():
                folder.rmdir()
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


@torch.no_grad()
def chain_difference(
    model: UNet, diffusion: GaussianDiffusion, folder: str | os.PathLike, steps: TimestepSpec | None = None, n: int = 1
) -> ChainDifference | None:
    """Compare the samples of an exported folder, drawn by diffusers, with those of the model that was exported.

    Both chains start from the same noise and add the same noise at each step, and each goes its own way; the labels of
    a network of classes are 0.

    Args:
        model: The network that was exported, on the CPU.
        diffusion: The diffusion that was exported.
        folder: What export_diffusers has made.
        steps: The timesteps, as Schedule.respace takes them; None means all.
        n: How many samples are drawn.

    Returns:
        How far they are apart; None if diffusers is not installed.
    """
    try:
        from diffusers import DDPMScheduler, UNet2DModel  # an optional dependency
    except ImportError:
        return None

    # With low_cpu_mem_usage, its default, it prints advice where the package accelerate is missing.
    peer = UNet2DModel.from_pretrained(Path(folder) / "unet", low_cpu_mem_usage=False).eval()
    chain = DDPMScheduler.from_pretrained(Path(folder) / "scheduler")
    kept = diffusion if steps is None else diffusion.respace(steps)
    chain.set_timesteps(timesteps=kept.schedule.timesteps.flip(0).tolist())
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn((n, *model.config.shape), generator=generator)
    labels = torch.zeros(n, dtype=torch.int64) if model.config.num_classes else None
    for index in reversed(range(len(kept.schedule))):
        t, before = kept.schedule.timesteps[index], generator.get_state()
        output = peer(theirs, t, class_labels=labels).sample
        theirs = chain.step(output, int(t), theirs, generator=generator).prev_sample
        generator.set_state(before)
        output = model(ours, t.expand(n), labels)
        p = kept.p_mean_variance(output, ours, index, clip=chain.config.clip_sample)
        ours = p.mean
        if index:
            ours = ours + (0.5 * p.log_variance).exp() * torch.randn(ours.shape, generator=generator)
    apart = (ours - theirs).abs()
    return ChainDifference(len(kept.schedule), apart.max().item(), apart.mean().item())
