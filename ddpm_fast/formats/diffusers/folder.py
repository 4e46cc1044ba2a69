"""A folder of diffusers' as it is saved and published: a UNet2DModel's own, or a whole pipeline's.

    model_index.json                                        which parts the pipeline has
    unet/config.json                                        the network's options
    unet/diffusion_pytorch_model.safetensors                its weights; also .bin, in shards, or as .fp16.safetensors
    scheduler/scheduler_config.json                         the diffusion

Pipelines of 2022 have all of it in one folder, and older names for the attention's weights. diffusers itself is not
needed.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.memory import is_out_of_memory, memory_for
from ddpm_fast.files.pickles import read_pickle
from ddpm_fast.formats.diffusers.config import unet_config
from ddpm_fast.formats.diffusers.diffusion import is_learned, read_diffusion
from ddpm_fast.formats.diffusers.network import from_diffusers
from ddpm_fast.formats.flags import parse_flags
from ddpm_fast.formats.folder import file_in, read_json
from ddpm_fast.formats.imported import Imported

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"
# The files that may hold the weights, in the order in which they are looked for; an index lists shards.
WEIGHT_FILES = tuple(
    f"{WEIGHTS}{variant}"
    for variant in (".safetensors", ".safetensors.index.json", ".bin", ".fp16.safetensors", ".fp16.bin")
)
_MOST_SHARDS = 1000
# The attention's layers had other names once.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(rf"(.*\.attentions\.\d+)\.({'|'.join(_OLD_NAMES)})\.(weight|bias)")
# What a folder may leave out, and flags may say: each with a value of its type.
_FLAGS = {
    "sample_size": "",
    "null_class": False,
    "num_train_timesteps": 0,
    "beta_start": 0.0,
    "beta_end": 0.0,
    "beta_schedule": "",
    "prediction_type": "",
    "variance_type": "",
}


def is_folder(path: Path) -> bool:
    """Whether a path is a folder of a UNet2DModel or of a pipeline. It never raises."""
    try:
        return path.is_dir() and any((path / name).is_file() for name in (INDEX, CONFIG, f"unet/{CONFIG}"))
    except (OSError, ValueError):
        return False


def read_folder(path: Path, flags: str | None = None) -> Imported:
    """The network and the diffusion of a folder.

    Args:
        path: The folder: of a pipeline, or of a network, which says nothing about its diffusion.
        flags: What the folder leaves out, as in "--beta_schedule linear --num_train_timesteps 1000": fields of
            diffusers' schedulers, sample_size, and null_class, whether the last class stands for "no class".

    Raises:
        InputError: If a file is missing, damaged or leads out of the folder; for another network than UNet2DModel; for
            fields that have no counterpart here, each by its name; and if the diffusion is not known.
    """
    given = parse_flags(flags, _FLAGS, "diffusers' folders")
    index = _completed(path / INDEX, _read(path, INDEX) or {}, given, ("null_class",))
    unet, fields = _part(path, "unet", CONFIG)
    if fields is None:
        raise InputError(f"{path} has no {CONFIG} and no unet/{CONFIG}; expected the folder of a UNet2DModel: give one")
    _, scheduler = _part(path, "scheduler", SCHEDULER)
    fields = _completed(unet / CONFIG, fields, given, ("sample_size",))
    names = tuple(name for name in _FLAGS if name not in ("sample_size", "null_class"))
    if scheduler is None and not any(name in given for name in names):
        raise InputError(
            f"{path} has no {SCHEDULER}, so its diffusion is not known: give the pipeline's folder, or what it was "
            'trained with as flags, such as "--beta_schedule linear --num_train_timesteps 1000" (of '
            f"{', '.join('--' + name for name in names)}; what is left out is as in DDPMScheduler)"
        )
    scheduler = _completed(path / SCHEDULER, scheduler or {}, given, names)
    state = _weights(unet)
    null_class = index.get("null_class") is True
    try:
        config = unet_config(fields, learned=is_learned(scheduler), null_class=null_class, names=state)
        state = from_diffusers(state, config)
    except InputError as error:
        raise InputError(f"{unet}: {error}") from error
    try:
        diffusion = read_diffusion(scheduler)
    except InputError as error:
        raise InputError(f"{path}: its scheduler's {error}") from error
    _warn_of_parts(path, index)
    labels = _label_names(index.get("id2label"), config.num_classes)
    return Imported(state, config, diffusion, labels, _origin(index, fields, scheduler, flags))


def _part(path: Path, name: str, file: str) -> tuple[Path, dict[str, Any] | None]:
    """The folder of a pipeline's part and its JSON: below the pipeline's, or, as in 2022, the pipeline's own."""
    for folder in (path / name, path):
        content = _read(path, str((folder / file).relative_to(path)))
        if content is not None:
            return folder, content
    return path, None


def _warn_of_parts(path: Path, index: Mapping[str, Any]) -> None:
    """Say which parts of a pipeline are not read: of latent diffusion, the one that makes pictures of samples."""
    parts = [name for name, value in index.items() if isinstance(value, list) and value[1:] and None not in value]
    others = sorted(set(parts) - {"unet", "scheduler", "_class_name"})
    if others:
        warnings.warn(
            f"{path}: of this pipeline the unet and the scheduler alone are read, not its "
            f"{printable(', '.join(others))[:200]}: samples are what the unet makes, such as latents",
            stacklevel=3,
        )


def _read(path: Path, name: str) -> dict[str, Any] | None:
    file = file_in(path, name)
    return None if file is None else read_json(file)


def _completed(
    where: Path, fields: Mapping[str, Any], given: Mapping[str, Any], names: tuple[str, ...]
) -> dict[str, Any]:
    """The fields with those flags that are among the names.

    Raises:
        InputError: If a flag says otherwise than the file, or has no value.
    """
    made = dict(fields)
    for name in names:
        if name not in given:
            continue
        value = _sides(given[name]) if name == "sample_size" else given[name]
        said = made.get(name)
        if said is not None and said != value:
            raise InputError(f"--{name} is {given[name]}, but {where} says {said!r:.200}: leave the flag out")
        made[name] = value
    return made


def _sides(text: str) -> int | list[int]:
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if match is None:
        raise InputError(f"--sample_size is {text!r:.200}; expected a side, such as 64, or height x width, as in 64x32")
    return int(match[1]) if match[2] is None else [int(match[1]), int(match[2])]


def _weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a network's folder by their present names, on the CPU, in the dtypes of the file."""
    for name in WEIGHT_FILES:
        path = file_in(folder, name)
        if path is None:
            continue
        if name.endswith(".bin"):
            state = _tensors(path, read_pickle(path))
        elif name.endswith(".json"):
            state = _sharded(folder, read_json(path))
        else:
            state = _safetensors(path)
        return {_present(name): tensor for name, tensor in state.items()}
    raise InputError(
        f"{folder} has no {WEIGHT_FILES[0]}, nor any of {', '.join(WEIGHT_FILES[1:])}: fetch the whole folder"
    )


def _present(name: str) -> str:
    """The present name of a weight."""
    match = _OLD.fullmatch(name)
    return name if match is None else f"{match[1]}.{_OLD_NAMES[match[2]]}.{match[3]}"


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with memory_for(path, path.stat().st_size), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path} cannot be read as safetensors ({error}): fetch it again") from error


def _sharded(folder: Path, index: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of several files, which the index names."""
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{folder}: the index of its weights has no weight_map of file names: fetch it again")
    files = sorted(set(names.values()))
    if len(files) > _MOST_SHARDS:
        raise InputError(f"{folder}: its weights are in {len(files)} files; expected at most {_MOST_SHARDS}")
    state: dict[str, Tensor] = {}
    for name in files:
        path = file_in(folder, name) if re.fullmatch(r"[\w.-]+\.safetensors", name) else None
        if path is None:
            raise InputError(f"{folder} has no {name!r:.200}, which the index of its weights names: fetch it again")
        state |= _safetensors(path)
    return state


def _tensors(path: Path, content: object) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(f"{path} holds a {type(content).__name__}; expected the tensors of a network by their names")
    other = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise InputError(f"{path}: {other[0]!r:.200} is no tensor; expected the tensors of a network by their names")
    return content


def _label_names(names: Any, classes: int) -> list[str] | None:
    """One name for each class, from {"0": "cat", ...}; None where the index does not name them all."""
    if not isinstance(names, dict) or len(names) != classes:
        return None
    found = [names.get(str(number)) for number in range(classes)]
    return [name for name in found if isinstance(name, str)] if all(isinstance(name, str) for name in found) else None


def _origin(
    index: Mapping[str, Any], fields: Mapping[str, Any], scheduler: Mapping[str, Any], flags: str | None
) -> dict[str, Any]:
    """Where the model is from. Of the JSON, which is somebody else's, short texts alone are kept."""
    said = {
        "pipeline": index.get("_class_name"),
        "scheduler": scheduler.get("_class_name"),
        "diffusers_version": fields.get("_diffusers_version"),
        "flags": flags,
    }
    kept = {name: text for name, text in said.items() if isinstance(text, str) and len(text) <= 200}
    return {"format": "diffusers", **kept}
