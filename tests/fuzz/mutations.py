"""What is done to the arguments of a good call, so that it becomes a bad or an unusual one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.noise import NoiseKey
from tests.fuzz.maker import Call, Maker

INTEGERS = (-1, 0, 1, 2, 3, 7, 255, 256, 2**31, 2**32, 2**33, 2**40, 2**62, 2**63 - 1, -(2**63), 2**64, 2**70)
ODD = (
    None,
    True,
    False,
    1.5,
    float("nan"),
    float("inf"),
    "3",
    "",
    b"3",
    (),
    [1, 2],
    {},
    1j,
    np.int64(3),
    np.int32(-1),
    np.uint8(200),
    np.float32(0.5),
    np.float64("nan"),
    np.bool_(True),
    np.array(2),
    torch.tensor(2),
    torch.tensor([1]),
    object,
)
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)


def mutate(call: Call, make: Maker) -> str:
    """Change one argument of the call. Returns what was done."""
    rng = make.rng
    name = rng.choice(list(call.arguments))
    value = call.arguments[name]
    if isinstance(value, NoiseKey):
        new, how = _key(value, make)
    elif isinstance(value, Tensor):
        new, how = _tensor(name, value, call, make)
    elif isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) for v in value):
        i = rng.randrange(len(value))
        part, how = _tensor(name, value[i], call, make)
        new = (*value[:i], part, *value[i + 1 :])
    elif isinstance(value, torch.dtype) or name.endswith("dtype"):  # torch 2.13 crashes where a dtype is a tensor
        new, how = rng.choice((*DTYPES, None)), "another dtype"
    elif value is None:
        new, how = _instead_of_none(call, make)
    elif isinstance(value, (list, tuple)):
        new, how = list(value), "another size"
        if new:
            new[rng.randrange(len(new))] = rng.choice((-1, 0, 1, 2, 5, 2**31, 2**40, 2**62, True, 1.5, None))
        new = value._make(new) if hasattr(value, "_make") else type(value)(new)
    elif isinstance(value, bool):
        new, how = rng.choice((not value, None, 1, 0.5)), "no bool"
    elif isinstance(value, int):
        new, how = rng.choice((*INTEGERS, *ODD)), "another number"
    else:
        new, how = rng.choice((0.0, -1.0, 1e300, *ODD)), "another value"
    call.arguments[name] = new
    return f"{name}: {how}"


def _instead_of_none(call: Call, make: Maker) -> tuple[Any, str]:
    tensors = [v for v in call.arguments.values() if isinstance(v, Tensor)]
    if not tensors:
        return make.rng.choice(ODD), "something for None"
    return make.rng.choice(tensors), "the same tensor as another argument"


def _key(key: NoiseKey, make: Maker) -> tuple[Any, str]:
    rng = make.rng
    kind = rng.randrange(5) if key.seed.device.type == "cpu" else 1
    if kind == 0:
        return make.key(len(key.sample_id) + rng.choice((-1, 1, 5)) if len(key.sample_id) else 1), "of more samples"
    if kind == 1:
        return rng.choice(ODD), "no key"
    if kind == 2:
        return NoiseKey(key.seed.to("meta"), key.sample_id.to("meta"), key.step.to("meta"), key.stream), "on meta"
    if kind == 3:
        # Ids and steps beyond their range wrap around in every backend alike.
        ids = make.plain(
            torch.tensor([-1, 2**56, 2**63 - 1, -(2**63)] * len(key.sample_id), dtype=torch.int64)[: len(key.sample_id)]
        )
        return NoiseKey(key.seed, ids, make.number(rng.choice((-1, 2**32, -(2**63)))), key.stream), "beyond its range"
    return (key.seed, key.sample_id, key.step, key.stream), "a tuple"


def _tensor(name: str, x: Tensor, call: Call, make: Maker) -> tuple[Any, str]:
    mutation = make.rng.choice(_MUTATIONS)
    if x.layout != torch.strided:
        return None, "None"
    return mutation(name, x, call, make), mutation.__name__.strip("_").replace("_", " ")


def _other_shape(name: str, x: Tensor, call: Call, make: Maker) -> Tensor:
    """One dimension more or less, or one of another size; the values repeat."""
    rng, shape = make.rng, list(x.shape)
    kind = rng.randrange(6)
    if kind == 0 or not shape:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((1, 2)))
    elif kind == 1:
        shape.pop(rng.randrange(len(shape)))
    elif kind == 2:
        i = rng.randrange(len(shape))
        shape[i] = max(0, shape[i] + rng.choice((-1, 1)))
    elif kind == 3:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1))
    elif kind == 4:
        i = rng.randrange(len(shape))
        shape[i] = min(2 * shape[i], 64)
    else:
        rng.shuffle(shape)
    count = int(np.prod(shape))
    if not x.numel():
        values = torch.ones(shape, dtype=torch.float32).to(x.dtype)
    else:
        flat = x.detach().cpu().reshape(-1) if x.device.type == "cpu" else torch.ones(1, dtype=x.dtype)
        values = flat.repeat(-(-count // len(flat)))[:count].reshape(shape)
    return make.plain(values)


def _other_dtype(name: str, x: Tensor, call: Call, make: Maker) -> Tensor:
    dtype = make.rng.choice(DTYPES)
    return make.plain(x.detach().to(dtype)) if x.device.type == "cpu" else x.to(dtype)


def _on_meta(name: str, x: Tensor, call: Call, make: Maker) -> Tensor:
    return x.detach().to("meta")


def _expanded(name: str, x: Tensor, call: Call, make: Maker) -> Tensor:
    """The first of a dimension, seen as often as there were."""
    if not x.numel() or not x.ndim:
        return x
    d = make.rng.randrange(x.ndim)
    return x.detach().narrow(d, 0, 1).expand(x.shape)


def _transposed(name: str, x: Tensor, call: Call, make: Maker) -> Tensor:
    return x.detach().transpose(0, -1) if x.ndim else x


def _other_values(name: str, x: Tensor, call: Call, make: Maker) -> Tensor:
    """Infinities, NaN and large numbers; indices out of range."""
    rng = make.rng
    values = x.detach().clone()
    if not values.numel() or values.device.type != "cpu":
        return values
    flat = values.reshape(-1)
    i = rng.randrange(len(flat))
    if values.is_floating_point():
        flat[i] = rng.choice((float("nan"), float("inf"), -float("inf"), 1e10, -1e10, 0.0))
        call.wild = True
    elif values.dtype == torch.int64:
        flat[i] = rng.choice((-1, 1000, 2**31, 2**32, 2**63 - 1, -(2**63)))
    return make.laid_out(flat.reshape(values.shape)) if values.ndim else make.plain(flat.reshape(()))


def _shared(name: str, x: Tensor, call: Call, make: Maker) -> Tensor:
    """Memory of another argument: all of it, or shifted by an element or more."""
    rng = make.rng
    others = [v for k, v in call.arguments.items() if isinstance(v, Tensor) and k != name and v.device.type == "cpu"]
    others = [v for v in others if v.layout == torch.strided and v.dtype == x.dtype and v.numel() and x.numel()]
    if not others:
        return x
    other = rng.choice(others)
    if other.shape == x.shape and rng.random() < 0.5:
        return other
    extent = x.numel()
    available = other.numel() if other.is_contiguous() else 0
    if available >= extent:
        return other.detach().view(-1)[available - extent :].view(x.shape)
    # Both in one buffer, the one beginning inside the other.
    shift = rng.randrange(max(1, other.numel()))
    values = (
        torch.randn(shift + extent).to(x.dtype) if x.is_floating_point() else torch.zeros(shift + extent).to(x.dtype)
    )
    memory = make.plain(values)
    key = next(k for k, v in call.arguments.items() if v is other)
    if shift + extent >= other.numel():
        call.arguments[key] = memory[: other.numel()].view(other.shape)
    return memory[shift:].view(x.shape)


def _no_tensor(name: str, x: Tensor, call: Call, make: Maker) -> Any:
    rng = make.rng
    return rng.choice((None, x.tolist() if x.device.type == "cpu" and x.numel() < 100 else 0, rng.choice(ODD)))


def _sparse(name: str, x: Tensor, call: Call, make: Maker) -> Tensor:
    return x.detach().to_sparse() if x.ndim and x.device.type == "cpu" and x.dtype.itemsize > 1 else x


def _with_gradient(name: str, x: Tensor, call: Call, make: Maker) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


_MUTATIONS = (
    _other_shape,
    _other_shape,
    _other_shape,
    _other_dtype,
    _on_meta,
    _expanded,
    _transposed,
    _other_values,
    _other_values,
    _shared,
    _shared,
    _no_tensor,
    _sparse,
    _with_gradient,
)


def hostile(rng: random.Random, good: Any) -> Any:
    """A number or something else in the place of a good number."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(INTEGERS)
    if kind == 1:
        return rng.choice(ODD)
    if kind == 2 and isinstance(good, int):
        return rng.choice((np.int64, np.int32, np.uint8, float, str, bool, np.float64))(max(0, min(good, 100)))
    if kind == 3 and isinstance(good, float):
        return rng.choice((np.float32, np.float64, str, int, lambda v: -v, lambda v: v + 1))(good)
    return good
