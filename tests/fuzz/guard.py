"""Tensors between red zones, which tell of what is read or written out of bounds.

A guarded tensor lies inside a larger buffer that is filled with ones. As a float they are NaN and as an index -1: what
is read from them shows in the result. What is written to them, or to a tensor that is only to be read, shows when the
buffer is compared with what it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

RED = 64  # bytes before and after
_FILL = 0xFF


def _lies_in(x: Tensor, storage: int) -> bool:
    is_memory = x.layout == torch.strided and x.device.type == "cpu" and x.numel() > 0
    return is_memory and x.untyped_storage().data_ptr() == storage


class Guarded:
    """The guarded tensors of a case: its inputs, and what is made while `outputs` is active."""

    def __init__(self) -> None:
        self._inputs: list[tuple[Tensor, Tensor, Tensor]] = []  # the buffer, what it was, the tensor
        self._outputs: list[tuple[Tensor, Tensor]] = []

    def tensor(self, values: Tensor, strides: Sequence[int], offset: int = 0) -> Tensor:
        """A tensor of the values with these strides, `offset` elements behind the red zone."""
        size = values.element_size()
        extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) if values.numel() else 0
        buffer = torch.full(
            (2 * RED + (extent + offset) * size + -(extent + offset) * size % 8,), _FILL, dtype=torch.uint8
        )
        made = buffer.view(values.dtype).as_strided(values.shape, strides, RED // size + offset)
        made.copy_(values)
        made = torch.empty(0, dtype=values.dtype).set_(
            buffer.untyped_storage(), RED // size + offset, values.shape, tuple(strides)
        )
        self._inputs.append((buffer, buffer.clone(), made))
        return made

    def damage(self, writable: Sequence[Tensor] = ()) -> str:
        """What was written that should not have been, or the empty string. writable: what may be written to."""
        for buffer, before, tensor in self._inputs:
            storage = buffer.untyped_storage().data_ptr()
            written = [w for w in writable if _lies_in(w, storage)]
            expected = before.clone() if written else before
            for part in written:
                inside = torch.empty(0, dtype=part.dtype).set_(
                    expected.untyped_storage(), part.storage_offset(), part.shape, part.stride()
                )
                if part.is_contiguous() or 0 not in part.stride():
                    inside.copy_(part.detach())
            if not torch.equal(buffer, expected):
                at = int((buffer != expected).nonzero()[0])
                place = "an input" if RED <= at < len(buffer) - RED else "the red zone of an input"
                return f"{place} of {tensor.dtype} {tuple(tensor.shape)} was written to, at byte {at - RED}"
        for buffer, tensor in self._outputs:
            zones = torch.cat([buffer[:RED], buffer[-RED:]])
            if not bool((zones == _FILL).all()):
                return f"the red zone of a result of {tensor.dtype} {tuple(tensor.shape)} was written to"
        return ""

    def restore(self) -> None:
        """The inputs as they were, and no outputs."""
        for buffer, before, _ in self._inputs:
            buffer.copy_(before)
        self._outputs.clear()

    @contextlib.contextmanager
    def outputs(self) -> Iterator[None]:
        """Inside, what torch.empty, empty_like and new_empty make lies between red zones."""
        owners = (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")
        plain = [getattr(owner, name) for owner, name in owners]
        for (owner, name), original in zip(owners, plain, strict=True):
            setattr(owner, name, self._guarding(original, plain[0]))
        try:
            yield
        finally:
            for (owner, name), original in zip(owners, plain, strict=True):
                setattr(owner, name, original)

    def _guarding(self, original, empty):
        def make(*arguments, **keywords):
            made = original(*arguments, **keywords)
            if (
                type(made) is not Tensor
                or made.device.type != "cpu"
                or made.layout != torch.strided
                or not made.numel()
            ):
                return made
            if made.numel() > 1 << 20:
                return made
            content = made.untyped_storage().nbytes()
            buffer = torch.full((2 * RED + content + -content % 8,), _FILL, dtype=torch.uint8)
            # The content's end is where the zone begins, to the byte; only the size of the buffer is rounded up.
            guarded = empty(0, dtype=made.dtype).set_(
                buffer.untyped_storage(), RED // made.element_size(), made.size(), made.stride()
            )
            self._outputs.append((buffer[: 2 * RED + content], guarded))
            return guarded

        return make
