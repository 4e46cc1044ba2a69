"""How many launches torch's multi-tensor kernels and our own ops take."""

from __future__ import annotations

from collections.abc import Sequence

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


def launches_of_ours(name: str) -> int:
    """The launches of an op of ddpm_fast at the sizes of the networks that are counted: docs/kernels.md."""
    return _OURS.get(name, 1)
