"""Whether an op's derivatives are right, and those that it has not are refused."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.autograd.forward_ad as forward
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.errors import InputError
from tests.fuzz.formulas import FORMULAS
from tests.fuzz.maker import Call
from tests.fuzz.supervise import Failed

PRECISION = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float64: 1e-9}


def _first(value: Any) -> Tensor:
    """What is differentiated: the op's first result."""
    return value if isinstance(value, Tensor) else value[0]


def check_derivatives(call: Call, name: str, said: object, rng: random.Random) -> int:
    """First derivatives, and one kind of derivative that there is none of. Returns how many calls that took."""
    leaves = {}
    for argument in call.differentiable:
        value = call.arguments.get(argument)
        if argument == "shift" and "scale_shift" in call.arguments:
            continue
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() and rng.random() < 0.8:
            leaves[argument] = value.detach().clone().requires_grad_()
    if not leaves or call.wild:
        return 0
    made = Call(call.op, call.direct, {**call.arguments, **leaves}, call.positional)
    if made.direct and "with_residual" in made.arguments:
        made.arguments["with_residual"] = True
    if made.direct and "with_gradient" in made.arguments:
        made.arguments["with_gradient"] = True
    double = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    formula = FORMULAS.get(call.op)
    wanted = formula and formula({**made.arguments, **double})
    if rng.random() < 0.3:
        return 1 + _check_second(made, name, said, leaves, wanted, double, rng)
    out = _first(made())
    incoming = torch.randn(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), incoming, allow_unused=True)
    if wanted is None:
        return 1 + _check_against_reference(made, name, said, leaves, incoming, found)
    expected = torch.autograd.grad(wanted, list(double.values()), incoming.double(), allow_unused=True)
    try:
        for leaf, one, other in zip(leaves, found, expected, strict=True):
            _compare(call, name, said, leaf, leaves[leaf], one, other)
    except Failed:
        if not _as_good_as_plain(made, list(leaves.values()), incoming, found, expected):
            raise
    return 1


def _as_good_as_plain(
    call: Call,
    leaves: list[Tensor],
    incoming: Tensor,
    found: tuple[Tensor | None, ...],
    expected: tuple[Tensor | None, ...],
) -> bool:
    """Whether plain torch is about as far off, as where the variance of a group is tiny."""
    with ops.use_backend("reference"):
        plain = torch.autograd.grad(_first(call()), leaves, incoming, allow_unused=True)
    for one, same, exact in zip(found, plain, expected, strict=True):
        if one is None or same is None or exact is None:
            return False
        if (one.double() - exact).abs().max() > 8 * (same.double() - exact).abs().max():
            return False
    return True


def _precision(call: Call) -> float:
    """That of the least precise of the tensors and dtypes: float64 counts where all are."""
    values = [v.dtype if isinstance(v, Tensor) else v for v in call.arguments.values()]
    parts = [p.dtype for v in call.arguments.values() if isinstance(v, tuple) for p in v if isinstance(p, Tensor)]
    return max([PRECISION[v] for v in (*values, *parts) if isinstance(v, torch.dtype) and v in PRECISION])


def _size_of_parts(call: Call) -> float:
    """How large the parts of a gradient are at least. Where they cancel, the gradient has their rounding."""
    x, groups, eps = (call.arguments.get(name) for name in ("x", "groups", "eps"))
    if groups and x.numel() == x.shape[0] * groups:  # a group norm of single values, whose variance is 0
        return eps**-0.5
    if groups and x.shape[1] == groups:  # what is added to a channel that is a group has no effect
        return 1.0
    return 0.02


def _compare(
    call: Call, name: str, said: object, by: str, leaf: Tensor, found: Tensor | None, expected: Tensor | None
) -> None:
    if found is None or expected is None:
        if (found is None) != (expected is None) and bool((found if expected is None else expected).any()):
            raise Failed(
                f"{name}: wrong gradient", f"{said}by {by}: {'none' if found is None else 'one'} where torch differs"
            )
        return
    if found.shape != leaf.shape or found.dtype != leaf.dtype:
        raise Failed(f"{name}: wrong gradient", f"{said}by {by}: {found.dtype} {tuple(found.shape)}")
    if not expected.numel():
        return
    scale = expected.abs().max().clamp_min(_size_of_parts(call))
    error = (found.double() - expected).abs()
    if not bool((error <= 4 * _precision(call) * scale).all()):
        raise Failed(
            f"{name}: wrong gradient", f"{said}by {by}: off by {error.max():.3g} where the largest is {scale:.3g}"
        )


def _check_against_reference(
    call: Call, name: str, said: object, leaves: dict[str, Tensor], incoming: Tensor, found: tuple[Tensor | None, ...]
) -> int:
    """The bound's gradients: their formulas are the reference's own, which the tests compare with autograd."""
    with ops.use_backend("reference"):
        expected = torch.autograd.grad(_first(call()), list(leaves.values()), incoming, allow_unused=True)
    for leaf, one, other in zip(leaves, found, expected, strict=True):
        if one is None or other is None or not one.numel():
            continue
        # Near the floor of the paper's decoder a derivative jumps, so that single elements may differ.
        off = (one.double() - other.double()).abs() > 1e-2 * other.double().abs().amax().clamp_min(1e-3)
        if bool((one.isnan() != other.isnan()).any()) or off.sum() > 1 + 0.02 * off.numel():
            raise Failed(f"{name}: wrong gradient", f"{said}by {leaf}: {int(off.sum())} of {off.numel()} are off")
    return 1


def _check_second(
    call: Call,
    name: str,
    said: object,
    leaves: dict[str, Tensor],
    wanted: Tensor | None,
    double: dict[str, Tensor],
    rng: random.Random,
) -> int:
    """A second derivative, or one in forward mode, is right or it raises."""
    if rng.random() < 0.5:
        return _check_forward(call, name, said, leaves, wanted, double)
    inputs = list(leaves.values())
    weight = torch.randn(_first(call()).shape)
    try:
        out = _first(call())
        gradients = torch.autograd.grad(
            out, inputs, weight.to(out.dtype).requires_grad_(), create_graph=True, allow_unused=True
        )
        penalty = sum((g.double() ** 2).sum() for g in gradients if g is not None)
        second = torch.autograd.grad(out.double().sum() + penalty, inputs, allow_unused=True)
    except (RuntimeError, NotImplementedError, InputError):
        return 1
    if wanted is None:
        raise Failed(f"{name}: a second derivative did not raise", said)
    inputs = list(double.values())
    gradients = torch.autograd.grad(wanted, inputs, weight.double(), create_graph=True, allow_unused=True)
    penalty = sum((g**2).sum() for g in gradients if g is not None)
    expected = torch.autograd.grad(wanted.sum() + penalty, inputs, allow_unused=True)
    try:
        for leaf, one, other in zip(leaves, second, expected, strict=True):
            _compare(call, name, said, leaf, leaves[leaf], one, other)
    except Failed as failed:
        raise Failed(f"{name}: wrong second derivative", failed.what) from None
    return 1


def _check_forward(
    call: Call, name: str, said: object, leaves: dict[str, Tensor], wanted: Tensor | None, double: dict[str, Tensor]
) -> int:
    tangents = {k: torch.randn(v.shape).to(v.dtype) for k, v in leaves.items()}
    try:
        with forward.dual_level():
            duals = {k: forward.make_dual(v.detach(), tangents[k]) for k, v in leaves.items()}
            out = _first(Call(call.op, call.direct, {**call.arguments, **duals}, call.positional)())
            tangent = forward.unpack_dual(out).tangent
    except (RuntimeError, NotImplementedError, InputError):
        return 1
    if wanted is None:
        raise Failed(f"{name}: forward mode did not raise", said)
    with forward.dual_level():
        duals = {k: forward.make_dual(v.detach(), tangents[k].double()) for k, v in double.items()}
        expected = forward.unpack_dual(FORMULAS[call.op]({**call.arguments, **duals})).tangent
    if expected is None or not bool(expected.any()):
        return 1
    found = torch.zeros_like(expected) if tangent is None else tangent.double()
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise Failed(f"{name}: wrong derivative in forward mode", f"{said}{'none' if tangent is None else 'another'}")
    return 1
