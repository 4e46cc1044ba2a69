"""How many launches torch's multi-tensor kernels and our own ops take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# ATen/native/cuda/MultiTensorApply.cuh: tensors a launch by the number of lists, blocks a launch, elements a block.
_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_BLOCKS = 320
_CHUNK = 65536


def multi_tensor_launches(elements: Sequence[int], lists: int) -> int:
    """The launches for tensors of so many elements, where each kernel takes `lists` lists of them."""
    launches = tensors = blocks = 0
    for number, count in enumerate(elements):
        tensors += 1
        chunks = -(-count // _CHUNK)
        for chunk in range(chunks):
            blocks += 1
            is_last = chunk == chunks - 1
            if (
                (tensors == _TENSORS[lists] and is_last)
                or blocks == _BLOCKS
                or (is_last and number == len(elements) - 1)
            ):
                launches, blocks = launches + 1, 0
                tensors = 0 if is_last else 1
    return launches


# A launch each, unless said otherwise.
_OURS = {"channel_sums": 2}
# csrc/cuda/group_norm.cuh: pixels that a thread keeps in registers, and threads of a block, a pixel's and a group's.
_ROWS, _ROWS_OF_FP32 = 16, 8
_LANES, _COLUMNS, _THREADS = 128, 64, 512
# Of a norm that is not in registers: sums and result; sums, their total, and the gradient.
_STREAMED = {"group_norm": 2, "group_norm_backward": 3}


def is_streamed(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a norm of ours does not fit into the registers of a block, and reads its images twice."""
    if name not in _STREAMED:
        return False
    x, joined = arguments["x"], arguments["joined"]
    groups = arguments["groups"] if name == "group_norm" else arguments["statistics"].shape[1]
    channels = x.shape[1] + (0 if joined is None else joined.shape[1])
    rows = _ROWS_OF_FP32 if x.dtype == torch.float32 else _ROWS
    lanes, columns = -(-x.shape[2] * x.shape[3] // rows), channels // groups // 4
    unkept = name == "group_norm" and arguments["residual"] is not None and not arguments["keep"]
    odd = channels // groups % 4 or x.shape[1] % 4
    return bool(unkept or odd or lanes > _LANES or columns > _COLUMNS or lanes * columns > _THREADS)


def launches_of_ours(name: str, arguments: Mapping[str, Any]) -> int:
    """The launches of an op of ddpm_fast: docs/kernels.md."""
    return _STREAMED[name] if is_streamed(name, arguments) else _OURS.get(name, 1)
