"""The parameters of improved- and guided-diffusion's networks under our names and in our layouts, and back.

The networks of Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", and of Dhariwal & Nichol
2021, "Diffusion Models Beat GANs on Image Synthesis", have one way of naming. It also is that of the classifier, up to
its last layers. Their attention is a convolution over one dimension, ours a matrix product; and where ours has the
queries of all heads, then all keys, then all values, their older order has queries, keys and values of each head.
"""

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from ddpm_fast.errors import InputError, printable

Heads = Callable[[int], int]  # the heads of an attention, from its channels

# Layers that are at one place, and ours.
_SINGLE = {
    "time_embed.0": "time_embedding.linear1",
    "time_embed.2": "time_embedding.linear2",
    "label_emb": "label_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "norm_out",
    "out.2": "conv_out",
}
# What is inside a residual block, an attention, and a layer that resamples.
_PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "emb",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "skip",
    "norm": "norm",
    "qkv": "qkv",
    "proj_out": "proj",
    "op": "conv",  # of a downsampling
    "conv": "conv",  # of an upsampling
}
_THEIRS = re.compile(r"(?:input_blocks\.([1-9]\d{0,4})|output_blocks\.(\d{1,5})|middle_block)\.([0-2])\.(.+)")
_OURS = re.compile(r"(?:encoder\.(\d+)|decoder\.(\d+)|middle)\.(\d)\.(.+)")


def our_name(name: str) -> str:
    """Our name of one of their parameters.

    Args:
        name: Such as "input_blocks.1.0.in_layers.2.weight".

    Raises:
        InputError: Their networks have no such parameter.
    """
    layer, _, kind = name.rpartition(".")
    if layer in _SINGLE:
        return f"{_SINGLE[layer]}.{kind}"
    match = _THEIRS.fullmatch(layer)
    if match is None or match[4] not in _PARTS:
        raise InputError(f"{printable(name[:200])} is no parameter of improved- or guided-diffusion's networks")
    down, up, place, part = match.groups()
    stage = f"encoder.{int(down) - 1}" if down else f"decoder.{up}" if up else "middle"
    return f"{stage}.{place}.{_PARTS[part]}.{kind}"


def their_name(name: str) -> str:
    """Their name of one of our parameters.

    Args:
        name: Such as "encoder.0.0.conv1.weight".

    Raises:
        InputError: Their networks have no such parameter.
    """
    layer, _, kind = name.rpartition(".")
    single = [theirs for theirs, ours in _SINGLE.items() if ours == layer]
    if single:
        return f"{single[0]}.{kind}"
    match = _OURS.fullmatch(layer)
    parts = [theirs for theirs, ours in _PARTS.items() if match and ours == match[4]]
    if match is None or not parts:
        raise InputError(f"improved- and guided-diffusion's networks have no parameter like {printable(name[:200])}")
    down, up, place, _ = match.groups()
    stage = f"input_blocks.{int(down) + 1}" if down else f"output_blocks.{up}" if up else "middle_block"
    # Of the two that are called conv, "op" is listed first.
    return f"{stage}.{place}.{parts[-1] if up else parts[0]}.{kind}"


def from_theirs(state: Mapping[str, Tensor], heads: Heads, legacy: bool) -> dict[str, Tensor]:
    """Their parameters under our names and in our layouts.

    Args:
        state: Any number of their parameters.
        heads: How many heads an attention of so many channels has.
        legacy: Whether queries, keys and values follow each other in each head (their code without
            use_new_attention_order), or all queries come first.

    Returns:
        Tensors that may be views of the given ones.

    Raises:
        InputError: For a name that their networks do not have.
    """
    return {our_name(name): _from_their_layout(name, value, heads, legacy) for name, value in state.items()}


def to_theirs(state: Mapping[str, Tensor], heads: Heads, legacy: bool) -> dict[str, Tensor]:
    """Our parameters under their names and in their layouts: the inverse of `from_theirs`.

    Raises:
        InputError: For a name that their networks do not have.
    """
    theirs = {their_name(name): value for name, value in state.items()}
    return {name: _to_their_layout(name, value, heads, legacy) for name, value in theirs.items()}


def _from_their_layout(name: str, value: Tensor, heads: Heads, legacy: bool) -> Tensor:
    if name.endswith((".qkv.weight", ".proj_out.weight")):
        value = value.squeeze(-1)
    if ".qkv." in name and legacy:
        parts = value.unflatten(0, (heads(value.shape[0] // 3), 3, -1))
        value = parts.transpose(0, 1).flatten(0, 2)
    return value


def _to_their_layout(name: str, value: Tensor, heads: Heads, legacy: bool) -> Tensor:
    if ".qkv." in name and legacy:
        parts = value.unflatten(0, (3, heads(value.shape[0] // 3), -1))
        value = parts.transpose(0, 1).flatten(0, 2)
    return value.unsqueeze(-1) if name.endswith((".qkv.weight", ".proj_out.weight")) else value
