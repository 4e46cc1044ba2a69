"""What is done to good files: bits flipped, ends cut off, headers and configs edited, wrong sizes declared."""

from __future__ import annotations

import json
import random
import struct
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.files import tensorfile

NUMBERS = (0, -1, 1, 2, 3, 255, 2048, 10**5, 10**8, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**64, 10**30, -(2**63))
STRANGE: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    False,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "3",
    "\x1b[31mred",
    "a\nb",
    "\u202ex",
    "x" * 5000,
    [],
    [1],
    [1] * 300,
    [0.5],
    ["cat"],
    [None],
    [[1]],
    {},
    {"a": 1},
    [10**6] * 10,
    list(range(10**5)),
    "\ud800",
)


def bytes_of(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The file with some of its bytes changed."""
    kind = rng.randrange(8)
    size = len(data)
    made = bytearray(data)
    at = rng.randrange(max(1, size)) if rng.random() < 0.6 else rng.randrange(max(1, min(size, 64)))
    if kind <= 1 and size:
        for _ in range(rng.choice((1, 1, 2, 8))):
            made[at] ^= 1 << rng.randrange(8)
            at = rng.randrange(size)
        return bytes(made), "bits flipped"
    if kind == 2:
        return data[:at], f"cut off at {at} of {size}"
    if kind == 3:
        made[at : at + 8] = struct.pack("<Q", rng.choice([n for n in NUMBERS if 0 <= n < 2**64]))
        return bytes(made), f"a number at {at}"
    if kind == 4:
        made[at : at + rng.choice((1, 16, 512))] = b""
        return bytes(made), f"a gap at {at}"
    if kind == 5:
        made[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
        return bytes(made), f"more at {at}"
    if kind == 6:
        count = rng.choice((4, 64, 1000))
        made[at : at + count] = rng.choice((b"\0", b"\xff")) * len(made[at : at + count])
        return bytes(made), f"{count} bytes the same at {at}"
    return data + rng.randbytes(rng.choice((1, 100))), "more at the end"


def _depth(rng: random.Random) -> str:
    n = rng.choice((100, 10**4, 10**5))
    return rng.choice(("[" * n + "]" * n, '{"a":' * n + "1" + "}" * n, "[" * n))


def edited(value: Any, rng: random.Random, path: str = "") -> tuple[Any, str]:
    """A copy of a JSON value with one part changed, and what was done."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        name = rng.choice(sorted(value))
        made = dict(value)
        if rng.random() < 0.07:
            del made[name]
            return made, f"{path}/{name} is gone"
        if rng.random() < 0.04:
            made[f"{name}x"] = 1
            return made, f"{path}/{name}x is new"
        made[name], how = edited(value[name], rng, f"{path}/{name}")
        return made, how
    if isinstance(value, list) and value and rng.random() < 0.5:
        i = rng.randrange(len(value))
        made = list(value)
        made[i], how = edited(value[i], rng, f"{path}/{i}")
        return made, how
    new = rng.choice(STRANGE)
    return new, f"{path} is {new!r:.40}"


def safetensors(tensors: dict[str, Tensor], metadata: dict[str, str], rng: random.Random | None = None) -> bytes:
    """A file as the format wants it, or with an rng with something in its header changed."""
    codes = {
        torch.float32: "F32",
        torch.float64: "F64",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.uint8: "U8",
        torch.int8: "I8",
        torch.bool: "BOOL",
        torch.complex64: "C64",
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    body = b""
    for name, tensor in tensors.items():
        part = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(body), len(body) + len(part)]
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        body += part
    if rng is not None:
        _edit_header(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _edit_header(header: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    kind = rng.randrange(6)
    if kind == 0:
        entry["dtype"] = rng.choice(("F64", "U8", "BOOL", "I64", "F8_E4M3", "F4", "C64", "X", 3, None))
    elif kind == 1:
        entry["shape"] = rng.choice(
            ([], [2**40], [2**32, 2**32], [-1], [0], [1.5], None, [2**63], entry["shape"][::-1])
        )
    elif kind == 2:
        entry["data_offsets"] = rng.choice(([0, 2**60], [5, 3], [0, 0], [-1, 4], [0], None, [2**64, 2**64 + 4]))
    elif kind == 3:
        header[rng.choice(("", "\x1b[31m", "a" * 10000, "../x", name + "\0"))] = header.pop(name)
    elif kind == 4:
        header.pop(name)
    else:
        header["__metadata__"] = rng.choice(({}, None, {"format": "pt"}, {"format": 3}, [], {"a": {"b": "c"}}))


def signed(form: str, tensors: dict[str, Tensor], text: str, rng: random.Random, version: str = "1") -> bytes:
    """A file whose checksum is right, whatever it holds."""
    key = {tensorfile.MODEL: "config", tensorfile.TRAINING: "meta"}[form]
    crc = zlib.crc32(text.encode(errors="surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensorfile.kind(tensor)}".encode(errors="surrogatepass"), crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    metadata = {"format": form, "version": version, key: text, "crc32": f"{crc:08x}"}
    return safetensors(tensors, metadata)


def weights(tensors: dict[str, Tensor], rng: random.Random) -> tuple[dict[str, Tensor], str]:
    """The tensors with one of them changed."""
    made = dict(tensors)
    name = rng.choice(sorted(made))
    kind = rng.randrange(5)
    if kind == 0:
        dtype = rng.choice((torch.bool, torch.int64, torch.complex64, torch.float64, torch.uint8, torch.float16))
        made[name] = made[name].to(dtype)
        return made, f"{name} is {dtype}"
    if kind == 1:
        flat = made[name].float().flatten().clone()
        if len(flat):
            flat[rng.randrange(len(flat))] = rng.choice((float("nan"), float("inf"), 1e38))
        made[name] = flat.reshape(made[name].shape).to(made[name].dtype)
        return made, f"{name} is not finite"
    if kind == 2:
        made[name] = made[name].flatten()[:-1] if made[name].numel() else torch.ones(3)
        return made, f"{name} has another shape"
    if kind == 3:
        del made[name]
        return made, f"{name} is gone"
    made[name + "2"] = torch.ones(2)
    return made, f"{name}2 is new"


def config_text(payload: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """The JSON of a config or meta that was edited."""
    if rng.random() < 0.08:
        text = rng.choice(("", "[]", "3", "null", "{", '"a"', '{"unet": NaN}', _depth(rng), "\ud83d"))
        return text, f"JSON {text[:30]!r}"
    made, how = payload, ""
    for _ in range(rng.choice((1, 1, 2))):
        made, what = edited(made, rng)
        how += f" {what};"
    return json.dumps(made), how


def npy_header(array: np.ndarray, rng: random.Random) -> tuple[bytes, str]:
    """An .npy file whose header says something else than its data."""
    shape = rng.choice(
        ((10**9, 100, 100), (2**40,), (2**62, 4), (-1, 5, 5), (2**31, 2**31), (6, 50000, 50000, 3), (0,))
    )
    dtype = rng.choice(("|u1", "<i8", "|O", "<f8", "|V1000000000", "|S2000000000", "<U500000000"))
    text = f"{{'descr': {dtype!r}, 'fortran_order': {rng.random() < 0.5}, 'shape': {shape}, }}"
    if rng.random() < 0.2:
        text = rng.choice(("{'descr': __import__('os').system('true')}", "{" * 200, "[" * 5000, "1" * 9000, ""))
    head = text.encode().ljust(118) + b"\n"
    size = len(head) if rng.random() < 0.9 else rng.choice((0, 65535, 10))
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", min(size, 65535)) + head + array.tobytes(), f"header {text[:80]}"
