"""The file format of models and training states: tensors and a JSON object in one safetensors file.

Nothing is pickled, so reading a stranger's file does not run any of its code. A file is complete or absent (see
atomic.py). It carries a CRC-32 of its contents, so that a damaged file is refused and not sampled from. The same
contents give the same bytes.
"""

import json
import os
import re
import stat
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path
from ddpm_fast.files.memory import is_out_of_memory, memory_for

VERSION = 1
MODEL, TRAINING = "ddpm_fast model", "ddpm_fast training"
_JSON_KEY = {MODEL: "config", TRAINING: "meta"}  # the metadata entry that holds each format's JSON

# What the header calls them. These are the types of weights, of an optimizer's state and of counters.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_AGAIN = "fetch or write it again"


class DamagedFile(InputError):
    """A file that is not what was written: cut short, changed, or never a file of this format."""


def write(path: str | os.PathLike, form: str, tensors: Mapping[str, Tensor], payload: Mapping[str, Any]) -> None:
    """Write tensors and a JSON object as a file of the format `form`.

    Args:
        path: The file to write.
        form: MODEL or TRAINING.
        tensors: On any device; they are kept bit for bit.
        payload: What json.dumps accepts.

    Raises:
        InputError: If the payload cannot be written as JSON, a tensor is of a type that the format lacks, or the path
            cannot be written; an older file stays untouched.
    """
    try:
        text = json.dumps(payload)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: the {_JSON_KEY[form]} cannot be written as JSON: {error}") from error
    other = sorted(f"{name} ({kind(t)})" for name, t in tensors.items() if t.dtype not in _DTYPES)
    if other:
        raise InputError(
            f"{path}: {other[0]} cannot be stored; expected one of "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}: convert it first"
        )
    with memory_for(path, sum(t.nbytes for t in tensors.values())):
        plain = {n: t.detach().to("cpu").contiguous() for n, t in tensors.items()}
    metadata = {"format": form, "version": str(VERSION), _JSON_KEY[form]: text, "crc32": _crc(plain, text)}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        _write_safetensors(file, plain, metadata)


def _write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write what safetensors' own save_file writes, except that the entries of the metadata are in a fixed order.

    save_file takes them from a hash map, so its files differ from one process to the next.

    Args:
        file: Open for writing.
        tensors: Contiguous, on the CPU. They may share memory.
        metadata: The header's texts.
    """
    # The widest elements come first, so that each tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        dtype, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        file.write(_bytes(tensors[name]))


def read(path: Path, *forms: str) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """The format of a file, its tensors (on the CPU) and its JSON object.

    Args:
        path: The file.
        *forms: The formats that it may have, MODEL or TRAINING.

    Raises:
        DamagedFile: For a damaged file and one of another format.
        InputError: For a missing file, one that cannot be opened, one of a newer version, and if memory is short.
    """
    size = check_is_file(path)
    with memory_for(path, size):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                form = _check_format(path, forms, metadata)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            if is_out_of_memory(error):
                raise
            raise DamagedFile(f"{path} cannot be read as safetensors ({error}): {_AGAIN}") from error
        text = metadata.get(_JSON_KEY[form], "")
        payload = _parsed(path, _JSON_KEY[form], text)
        if metadata.get("crc32") != _crc(tensors, text):
            raise DamagedFile(f"{path} is damaged: its contents do not match its checksum: {_AGAIN}")
    return form, tensors, payload


def kind(tensor: Tensor) -> str:
    """Dtype and shape, for messages: `float32 [3, 4]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def inside(folder: Path) -> str:
    """What a message says of a folder where a file was expected: which files it holds."""
    names = [path.name for path in sorted(folder.glob("*.safetensors"))[:3]]
    return f"it holds {', '.join(names)}: give one of these" if names else "there is no .safetensors file in it"


def check_is_file(path: Path, expected: str = "a .safetensors file") -> int:
    """The size of a file in bytes.

    Args:
        path: The file.
        expected: What it is to be, for messages.

    Raises:
        InputError: If it is missing, no regular file, or may not be read.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path} is a folder; expected {expected}, and {inside(path)}")
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, and a device may never end
            raise InputError(f"{path} is a device, pipe or socket; expected {expected}: give one")
        with open(path, "rb"):
            return status.st_size
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; expected {expected}: check the path") from error
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be opened ({reason}); expected {expected}: check the path") from error


def _check_format(path: Path, forms: tuple[str, ...], metadata: Mapping[str, str]) -> str:
    """Which of the formats `forms` the metadata is of. Raises InputError for none, and for a newer version."""
    found, version = metadata.get("format"), metadata.get("version", "")
    if found not in forms:
        what = f"a {found} file" if found in _JSON_KEY else "a safetensors file that ddpm_fast did not write"
        raise DamagedFile(f"{path} is {what}; expected a {' or '.join(forms)} file")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise DamagedFile(f"{path}: its format version is {version!r:.50}; expected a number: write it again")
    if int(version) > VERSION:
        raise InputError(
            f"{path} has format version {version}, but this ddpm_fast reads versions up to {VERSION}: update ddpm_fast"
        )
    return found


def _parsed(path: Path, key: str, text: str) -> dict[str, Any]:
    """The JSON object of a text. Raises DamagedFile if there is none."""
    try:
        payload = json.loads(text, object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: its {key} is not JSON ({error}): {_AGAIN}") from error
    if not isinstance(payload, dict):
        raise DamagedFile(f"{path}: its {key} is JSON but not an object: {_AGAIN}")
    return payload


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of the pairs. Raises ValueError if a key is repeated, because it is unclear which value is meant."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"the key {name!r:.50} is repeated")
        made[name] = value
    return made


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _crc(tensors: Mapping[str, Tensor], text: str) -> str:
    """CRC-32 of the JSON text and of every tensor's name, dtype, shape and bytes, in the order of the names."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(f"{name} {kind(tensors[name])}".encode(), crc)
        crc = zlib.crc32(_bytes(tensors[name]), crc)
    return f"{crc:08x}"
