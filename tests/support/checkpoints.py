"""Files of torch.save that are not what they should be: broken ones, and ones that hold code."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch


class Calls:
    """When it is unpickled, calls a function."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple[object, ...]]:
        return self.function, self.arguments


def write_pickled_code(path: Path, proof: Path, zipped: bool = True) -> None:
    """A checkpoint that makes the folder `proof` when it is unpickled."""
    torch.save({"step": 3, "model": Calls(os.mkdir, str(proof))}, path, _use_new_zipfile_serialization=zipped)


def write_archive(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> None:
    """A zip archive as torch.save lays it out.

    Args:
        path: The file to write.
        content: The pickle.
        compression: Of all records.
        records: The bytes of the storages, as data_0=..., data_1=...
    """
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", b"3\n")
        for name, data in records.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", data)


def pickled_tensor(
    elements: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, kind: str = "torch FloatStorage"
) -> bytes:
    """The pickle of {"w": tensor}, the tensor in storage 0, of which the pickle says how long it is."""
    named = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = b"(" + _text("storage") + b"c" + kind.replace(" ", "\n").encode() + b"\n" + _text("0") + _text("cpu")
    storage += _number(elements) + b"tQ"
    arguments = b"(" + storage + _number(offset) + _numbers(size) + _numbers(stride) + b"\x89}t"
    return b"\x80\x02}" + _text("w") + named + arguments + b"Rs."


def _text(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _number(number: int) -> bytes:
    return pickle.dumps(number, 2)[2:-1]


def _numbers(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"
