"""The file format of models and training states: tensors and a JSON object in one safetensors file.

Nothing is pickled, so reading a stranger's file does not run any of its code. A file is complete or absent (see
atomic.py). It carries a CRC-32 of its contents, so that a damaged file is refused and not sampled from.
"""

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path

VERSION = 1
MODEL, TRAINING = "ddpm_fast model", "ddpm_fast training"
_JSON_KEY = {MODEL: "config", TRAINING: "meta"}  # the metadata entry that holds each format's JSON


def write(path: str | os.PathLike, form: str, tensors: Mapping[str, Tensor], payload: Mapping[str, Any]) -> None:
    """Write tensors and a JSON object as a file of the format `form`.

    Args:
        path: The file to write.
        form: MODEL or TRAINING.
        tensors: Of any dtype, on any device; they are kept bit for bit.
        payload: What json.dumps accepts.

    Raises:
        InputError: If the payload cannot be written as JSON or the path cannot be written; an older file stays
            untouched.
    """
    try:
        text = json.dumps(payload)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: the {_JSON_KEY[form]} cannot be written as JSON: {error}") from error
    # Each is copied, because safetensors refuses tensors that share memory (tied weights, slices of a buffer).
    plain = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    metadata = {"format": form, "version": str(VERSION), _JSON_KEY[form]: text, "crc32": _crc(plain, text)}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata)


def read(path: Path, form: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the JSON object of a file of the format `form`.

    Raises:
        InputError: For a missing or damaged file and for one of another format or a newer version.
    """
    if os.path.isdir(path):
        inside = ", ".join(sorted(p.name for p in path.glob("*.safetensors"))[:3])
        holds = f"it holds {inside}: give one of these" if inside else "there is no .safetensors file in it"
        raise InputError(f"{path} is a folder; expected a .safetensors file, and {holds}")
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; expected a .safetensors file: check the path")
    again = "fetch or write it again"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, form, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}): {again}") from error
    key = _JSON_KEY[form]
    text = metadata.get(key, "")
    try:
        payload = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: its {key} is not JSON ({error}): {again}") from error
    if not isinstance(payload, dict):
        raise InputError(f"{path}: its {key} is JSON but not an object: {again}")
    if metadata.get("crc32") != _crc(tensors, text):
        raise InputError(f"{path} is damaged: its contents do not match its checksum: {again}")
    return tensors, payload


def kind(tensor: Tensor) -> str:
    """Dtype and shape, for messages: `float32 [3, 4]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_format(path: Path, form: str, metadata: Mapping[str, str]) -> None:
    """Raise InputError unless the metadata says that this is a file of the format `form`."""
    found, version = metadata.get("format"), metadata.get("version", "")
    if found != form:
        what = f"a {found} file" if found in _JSON_KEY else "a safetensors file that ddpm_fast did not write"
        raise InputError(f"{path} is {what}; expected a {form} file")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise InputError(f"{path}: its format version is {version!r}; expected a number: write it again")
    if int(version) > VERSION:
        raise InputError(
            f"{path} has format version {version}, but this ddpm_fast reads versions up to {VERSION}: update ddpm_fast"
        )


def _crc(tensors: Mapping[str, Tensor], text: str) -> str:
    """CRC-32 of the JSON text and of every tensor's name, dtype, shape and bytes, in the order of the names."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {kind(tensor)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
