"""Low-precision copies of the weights, with which a network trains in mixed precision without casting them.

Under autocast each convolution and linear layer casts its fp32 weight in every forward, and its gradient back in every
backward: small kernels, two for each of some 100 weights. Here the copies are leaves of their own, written in one
operation after the optimiser's step, and their gradients become the weights' in another one. The numbers are those of
autocast, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddpm_fast import compat
from ddpm_fast.nn.block import Block, flat, memory_of, strided_like
from ddpm_fast.nn.layers import Attention, TimeEmbedding, Upsample
from ddpm_fast.nn.unet import UNet


def copies_pay(device: torch.device) -> bool:
    """Whether the launches that are saved are worth the memory: on a GPU."""
    return device.type in ("cuda", "meta")


class WorkingWeights:
    """A model, and copies of those of its weights that autocast would cast.

    These are the matrices and filters of its linear layers and convolutions, and some of their biases.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        """Copy the weights.

        Args:
            model: Its parameters are fp32, in one block of memory (nn/block.py), and stay its own.
            dtype: That of autocast, within which the model is called.
        """
        self._model = model
        parameters = list(model.parameters())
        weights = memory_of(parameters)
        if weights is None:
            raise ValueError("the model's parameters are not in one block of memory: call lay_out(model) before")
        self._weights, self._addresses = weights, [parameter.data_ptr() for parameter in parameters]
        # A copy of all, so that they are written in one operation; those that are not used are small.
        self._copies = Block(parameters, dtype)
        self._gradients = Block(parameters, torch.float32)
        cast = set(map(id, _cast_by_autocast(model)))
        names = (name for name, _ in model.named_parameters())
        self._leaves: dict[str, Tensor] = {
            name: nn.Parameter(copy)
            for name, parameter, copy in zip(names, parameters, self._copies.tensors, strict=True)
            if id(parameter) in cast
        }
        self._own = [
            (self._leaves[name], parameter, gradient)
            for (name, parameter), gradient in zip(model.named_parameters(), self._gradients.tensors, strict=True)
            if name in self._leaves
        ]
        self.refresh()

    def __call__(self, *arguments: Any) -> Tensor:
        """Run the model with the copies."""
        return functional_call(self._model, self._leaves, arguments, tie_weights=False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the copies, after the weights have changed where they are."""
        if self._addresses != [parameter.data_ptr() for parameter in self._model.parameters()]:
            raise RuntimeError("the model's parameters were moved to other memory: make a new Trainer")
        self._copies.memory.copy_(self._weights)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """After a backward: the copies' gradients become the weights', in fp32.

        They stay where they are from step to step, and the copies' own are dropped.
        """
        to, taken = [], []
        for leaf, parameter, gradient in self._own:
            if leaf.grad is None:
                continue
            parameter.grad = gradient
            to.append(flat(gradient))
            taken.append(flat(strided_like(leaf.grad, gradient)))
            leaf.grad = None
        compat.copy_all(to, taken)


# Layers whose bias goes to a convolution or a matrix product as it is. That of all others may be added by an op that
# takes fp32, or to another one first (nn/pending.py).
_WITH_BIAS = {TimeEmbedding: ("linear1", "linear2"), Attention: ("qkv",), UNet: ("conv_out",)}


def _cast_by_autocast(model: nn.Module) -> Iterator[Tensor]:
    """The parameters that autocast casts as they are. Upsampling computes with its filters before they are cast."""
    modules = list(model.modules())
    computed = {id(module.conv) for module in modules if isinstance(module, Upsample)}
    for module in modules:
        if isinstance(module, (nn.Conv2d, nn.Linear)) and id(module) not in computed:
            yield module.weight
        for name in _WITH_BIAS.get(type(module), ()):
            bias = getattr(getattr(module, name), "bias", None)
            if bias is not None:
                yield bias
