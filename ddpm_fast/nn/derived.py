"""What layers derive from their weights where additions are fused (pending.py), such as the joined projections of the
embedding. It depends on no image, so a loop that calls the network again and again has it computed once.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ddpm_fast.nn.pending import is_fused

# Of each layer; the tensors stay where they are, because CUDA graphs that were captured earlier read them. They are not
# attributes of the layer, because a copied, pickled or averaged network must not carry them.
_tensors: weakref.WeakKeyDictionary[nn.Module, tuple[Tensor, ...]] = weakref.WeakKeyDictionary()
_holders: Counter[int] = Counter()  # by id: how many blocks hold a layer's tensors now
_lock = threading.Lock()


class Derives(nn.Module, ABC):
    """A layer that derives tensors from its weights."""

    @abstractmethod
    def derive(self) -> tuple[Tensor, ...]:
        """Compute them, differentiably."""

    def derived(self) -> tuple[Tensor, ...]:
        """Those that are held, or new ones."""
        if _holders[id(self)] and not torch.is_grad_enabled():
            return _tensors[self]
        return self.derive()


@contextlib.contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Inside, what the model's layers derive is computed once: its weights must not change meanwhile."""
    layers = [layer for layer in model.modules() if isinstance(layer, Derives) and is_fused(next(layer.parameters()))]
    with _lock, torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            _refresh(layer)
            _holders[id(layer)] += 1
    try:
        yield
    finally:
        with _lock:
            for layer in layers:
                _holders[id(layer)] -= 1


def _refresh(layer: Derives) -> None:
    """Compute the layer's tensors, where the earlier ones are if they are alike."""
    new, old = layer.derive(), _tensors.get(layer, ())
    if [_kind(tensor) for tensor in new] == [_kind(tensor) for tensor in old]:
        for tensor, place in zip(new, old, strict=True):
            place.copy_(tensor)
    else:
        _tensors[layer] = new


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
