"""Reads checkpoints that torch.save wrote, without running what they hold.

Such a file holds a pickle, a program that builds objects, and may call whatever is named in it. torch.load with
weights_only=True calls little, but some of that allocates as much memory as a file of a few bytes asks for (bytearray,
_codecs.encode). So the pickle is scanned first, and it may name nothing but what tensors and dicts are built with.
"""

import pickletools
import re
import reprlib
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.types import Storage

from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.memory import is_out_of_memory, memory_for
from ddpm_fast.files.tensorfile import DamagedFile, check_is_file

_CHECKPOINT = "a checkpoint of PyTorch (.pt, .pth, .ckpt or .bin)"
_AGAIN = "fetch it again"

# What the pickle of a checkpoint of tensors names. A dtype and a storage of each kind come on top.
_NAMES = {
    "collections.OrderedDict",
    "collections.Counter",  # the milestones of a learning rate
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
}
_STORAGE = re.compile(r"torch\.(storage\.)?[A-Z][A-Za-z0-9]*Storage")

# A tensor takes about 35, so this is a checkpoint of 100,000 tensors. An object takes up to 216 bytes.
_MOST_OPCODES = 4_000_000
_PICKLES_BEFORE_STORAGES = 5  # of a file from before torch 1.6: magic number, protocol, system, content, keys
_MOST_SHARING = 8  # tensors may share storages, as a model and an average of it that is not yet one do


def read_pickle(path: Path) -> object:
    """What a file of torch.save holds, with its tensors on the CPU.

    A file that is a zip archive, as torch writes since 1.6, is mapped: a tensor's bytes are read when they are used.

    Args:
        path: The file.

    Returns:
        Tensors, numbers, texts, None, and lists, tuples and dicts of these. No tensor has more bytes than the file.

    Raises:
        InputError: For a missing, damaged or foreign file, one that holds code, one whose tensors are not in it, and if
            memory is short.
    """
    size = check_is_file(path, _CHECKPOINT)
    with memory_for(path, size):
        records = _check_pickles(path)
        storages = _Storages(path, size)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of protocols, which are none of the reader's business
                content = torch.load(path, map_location=storages, weights_only=True, mmap=records is not None)
        except Exception as error:  # a damaged file may raise anything
            if isinstance(error, InputError) or is_out_of_memory(error):
                raise
            raise _damaged(path, error) from error
    if records is not None and not storages.sizes <= records:
        raise DamagedFile(f"{path}: its tensors are not as long as the records that hold them: {_AGAIN}")
    _check_tensors(path, content, size)
    return content


def state_dict(content: object, *wrappers: str) -> dict[str, Tensor]:
    """The tensors of a network in what a checkpoint holds.

    Args:
        content: What read_pickle gives: a state dict, or a dict that has one under one of the wrappers.
        *wrappers: The keys to look under, the first one first, such as "ema_model", "state_dict".

    Returns:
        Its tensors by name, without the "module." of DataParallel. Empty if there is no state dict.
    """
    if not isinstance(content, dict):
        return {}
    found = next((content[key] for key in wrappers if isinstance(content.get(key), dict)), content)
    if not found or not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in found.items()):
        return {}
    prefix = "module." if all(name.startswith("module.") for name in found) else ""
    return {name.removeprefix(prefix): tensor.detach() for name, tensor in found.items()}


def _check_pickles(path: Path) -> Counter[int] | None:
    """Raise InputError if a pickle of a file names what tensors do not need.

    Returns:
        Of a zip archive the sizes of the records that tensors may be in; None of an older file.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _check_archive(path, file)
            file.seek(0)
            for _ in range(_PICKLES_BEFORE_STORAGES):
                _check_names(path, file)
            return None
    except (ValueError, OSError, EOFError, IndexError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise _damaged(path, error) from error


def _check_archive(path: Path, file: BinaryIO) -> Counter[int]:
    """Check the records of a zip archive, and the pickle among them. Returns the sizes of the others."""
    # Without a comment at the end, all readers of zip archives find the same list of records.
    file.seek(-22, 2)
    if file.read(4) != b"PK\x05\x06":
        raise DamagedFile(f"{path} ends before its list of records does, or goes on after it: {_AGAIN}")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = Counter(entry.filename.casefold() for entry in entries)
        pickles = [entry for entry in entries if re.fullmatch(r"[^/]+/data\.pkl", entry.filename)]
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise _holds_code(path, ["a TorchScript program"])
        if len(pickles) != 1 or max(names.values()) > 1:
            raise InputError(
                f"{path} is a zip archive with {len(pickles)} records data.pkl; expected {_CHECKPOINT}, which has one: "
                "give the file that torch.save wrote"
            )
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise DamagedFile(f"{path} is a compressed zip archive; torch.save writes none: unpack it, or {_AGAIN}")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise DamagedFile(f"{path}: its records have more bytes than the file: {_AGAIN}")
        if not any(entry.CRC for entry in entries):  # torch.serialization.set_crc32_options(False): none were computed
            for entry in entries:
                entry.CRC = None  # type: ignore[assignment]  # zipfile then compares none
        _check_names(path, BytesIO(archive.read(pickles[0])))
        broken = archive.testzip()
        if broken is not None:
            raise DamagedFile(f"{path}: the checksum of its record {printable(broken):.200} is wrong: {_AGAIN}")
        return Counter(entry.file_size for entry in entries)


def _check_names(path: Path, file: BinaryIO) -> None:
    """Read one pickle of a file to its end, running nothing. Raises InputError for what tensors do not need."""
    foreign: dict[str, None] = {}
    texts = ["", ""]  # the last two
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count > _MOST_OPCODES:
            raise InputError(
                f"{path} describes more than {_MOST_OPCODES:,} objects; expected a checkpoint of tensors: save the "
                "state_dict of the network alone"
            )
        if opcode.name in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".")
            if not _is_needed(name):
                foreign[name] = None
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):  # torch.save writes none of these
            foreign[".".join(texts)] = None
        elif isinstance(argument, str):
            texts = [texts[-1], argument]
    if foreign:
        raise _holds_code(path, list(foreign))


def _is_needed(name: str) -> bool:
    """Whether tensors, and lists and dicts of them, are built with the function or class of this name."""
    is_dtype = name.startswith("torch.") and isinstance(getattr(torch, name[6:], None), torch.dtype)
    return name in _NAMES or is_dtype or bool(_STORAGE.fullmatch(name))


def _holds_code(path: Path, names: list[str]) -> InputError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    shown = ", ".join(f"{printable(name):.100}" for name in names[:3])
    return InputError(
        f"{path} holds code beside weights, and none of it was run: it asks for {shown}{more}. Expected tensors, "
        "numbers and texts alone. Whoever wrote the file can save the weights alone: torch.save(model.state_dict(), "
        "'weights.pt')"
    )


class _Storages:
    """torch.load's map_location: leaves each storage on the CPU, and adds up their sizes.

    Attributes:
        sizes: How many storages there are of each size in bytes.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most = path, most
        self.sizes: Counter[int] = Counter()
        self.total = 0

    def __call__(self, storage: Storage, location: str) -> Storage:
        """Raises DamagedFile once the storages have more bytes than the file."""
        size = storage.nbytes()
        self.total += size
        if self.total > self.most:
            raise DamagedFile(
                f"{self.path}: its tensors take more than {self.total:,} bytes, and the file has {self.most:,}: "
                f"{_AGAIN}"
            )
        if size:
            self.sizes[size] += 1
        return storage


def _check_tensors(path: Path, content: object, size: int) -> None:
    """Raise InputError unless all tensors are plain ones, and none has more elements than the file has bytes for."""
    total = 0
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
            raise InputError(f"{path} has a tensor that is {kind}; expected plain tensors: save the weights as such")
        total += tensor.nbytes
        if tensor.nbytes > size or total > _MOST_SHARING * size:
            raise InputError(
                f"{path} has {size:,} bytes, but its tensors have more, as one of shape "
                f"{reprlib.repr(list(tensor.shape))} is expanded or shared: save them as tensors of their own (clone())"
            )


def _tensors(content: object) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts, each once. These may hold themselves."""
    seen, rest = set(), [content]
    while rest:
        each = rest.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, dict):
            rest += each.values()
        elif isinstance(each, (list, tuple)):
            rest += each


def _damaged(path: Path, error: Exception) -> DamagedFile:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DamagedFile(f"{path} cannot be read as {_CHECKPOINT} ({printable(reason):.200}): {_AGAIN}")
