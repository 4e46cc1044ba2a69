"""How an op is declared to PyTorch, once: its schema, what runs it, the shapes of its results, and its gradient.

`Library.define` rather than `custom_op`: 2 us a call rather than 8 to 13. What runs an op is registered for all devices
at once, since the choice of a backend is ours (dispatch.py).

A derivative that an op does not have is refused, and never 0 in silence: of an input that it is not differentiable in,
a second one, and one in forward mode.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ddpm_fast import compat
from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.direct import is_plain
from ddpm_fast.ops.dispatch import current_block, kernel, within
from ddpm_fast.ops.tensors import pack_noise, unpack_noise

# A schema says NOISE where the op takes noise: a tensor, or the parts of a NoiseKey. The functions of a declaration get
# it as one argument.
NOISE = "Tensor? noise, Tensor? seed, Tensor? sample_id, Tensor? step_id, int stream"
_NOISE_ARGUMENTS = 5

_library = torch.library.Library("ddpm_fast", "DEF")


class Gradient(NamedTuple):
    """An op's gradient.

    of: the names of the inputs that the op is differentiable in.
    save: called as save(ctx, inputs, outputs) after a forward. `inputs` has the schema's arguments by name, and as
        `inputs.noise_parts` the tuple of the noise's five.
    backward: called as backward(ctx, *gradients of the outputs). It returns the gradients of the inputs by name, those
        that there are.
    instead: what to do for a second derivative, or the empty string where backward is made of differentiable
        operations. Where it is not, something must have been saved that leads back to the inputs: one of them, or an
        output.
    """

    of: tuple[str, ...]
    save: Callable[[Any, Any, Any], None]
    backward: Callable[..., dict[str, Tensor | None]]
    instead: str = ""


def declare(
    schema: str, run: Callable[..., Any], shapes: Callable[..., Any], gradient: Gradient | None = None
) -> Callable[..., Any]:
    """Defines torch.ops.ddpm_fast.<name>.

    Args:
        schema: in PyTorch's language, with NOISE for the arguments of the noise.
        run: what the op does, called with the schema's arguments and one `noise` (a tensor or a NoiseKey). It begins by
            calling `shapes`.
        shapes: likewise; checks the arguments, and gives empty results of the right shapes, dtypes and memory formats.
        gradient: None for an op without one.

    Returns:
        A function that calls the op, or just `run` where that is the same (direct.py). It takes what `run` takes.
    """
    own = run
    schema = schema.replace("NOISE", NOISE)
    name, _, rest = schema.partition("(")
    arguments = [argument.split()[-1] for argument in rest[: rest.index(") ->")].split(", ")]
    at = arguments.index("noise") if "noise" in arguments else None
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    required = [
        (i, argument.split()[1])
        for i, argument in enumerate(rest[: rest.index(") ->")].split(", "))
        if argument.startswith("Tensor") and "?" not in argument
    ]
    run, shapes = (_refusing_none(name, _with_noise(function, at), required) for function in (run, shapes))
    _library.impl(name, _guarded(name, run, gradient is not None), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ddpm_fast::{name}", shapes, lib=_library)
    if gradient is not None:
        _register_gradient(name, arguments, at, gradient)
    op = getattr(torch.ops.ddpm_fast, name)

    def call(*given):
        parts = () if at is None else unpack_noise(given[at], name)
        if is_plain(*given):
            return own(*given)
        return op(*given) if at is None else op(*given[:at], *parts, *given[at + 1 :])

    return call


def kernel_for(op: str, image: Tensor, *others: Tensor | NoiseKey | None) -> Callable[..., None]:
    """The kernel that runs `op` on tensors of this device and these dtypes."""
    dtypes = [other.dtype for other in others if isinstance(other, Tensor)]
    return kernel(op, image.device, image.dtype, *dtypes)


def _with_noise(function: Callable[..., Any], at: int | None) -> Callable[..., Any]:
    """The function, called with the schema's arguments: those of the noise, from the at-th on, become one."""
    if at is None:
        return function
    end = at + _NOISE_ARGUMENTS

    def call(*arguments):
        return function(*arguments[:at], pack_noise(*arguments[at:end]), *arguments[end:])

    return call


def _refusing_none(name: str, function: Callable[..., Any], required: list[tuple[int, str]]) -> Callable[..., Any]:
    """The function, which says so if a tensor is None, as which torch lets it pass.

    required: the place and the name of each tensor that must be given.
    """

    def call(*arguments):
        try:
            return function(*arguments)
        except AttributeError:
            for i, argument in required:
                if arguments[i] is None:
                    raise InputError(f"{name}: {argument} is None; expected a tensor") from None
            raise

    return call


def _guarded(name: str, run: Callable[..., Any], has_gradient: bool) -> Callable[..., Any]:
    """The function that runs an op, and refuses to where a derivative would be lost."""

    def call(*arguments):
        # Whether there are tangents cannot be seen here: torch.func.jvp keeps them where only its own rules look.
        if compat.in_forward_mode() and any(isinstance(x, Tensor) and x.is_floating_point() for x in arguments):
            raise InputError(
                f"{name} has no derivative in forward mode (torch.func.jvp, dual_level): use reverse mode, call it "
                "outside, or compute it in plain torch"
            )
        return run(*arguments)

    def call_without_gradient(*arguments):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            raise InputError(f"{name} has no gradient: use torch.no_grad(), or compute it in plain torch")
        return call(*arguments)

    return call if has_gradient else call_without_gradient


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients as they are, with a derivative that raises. It stands between them and what they depend on."""

    @staticmethod
    def forward(ctx, message, gradients, *depend_on):
        ctx.message = message
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)


def _once(name: str, gradient: Gradient) -> Callable[..., dict[str, Tensor | None]]:
    """The backward of an op whose gradient is not differentiable: recorded for a second derivative, it raises there.

    torch.autograd.function.once_differentiable does not suffice: it looks at the incoming gradients alone, and these
    do not depend on anything where a loss is summed.
    """
    message = f"{name} has no second derivative: {gradient.instead}"

    def backward(ctx, *incoming):
        if not torch.is_grad_enabled():  # no create_graph=True
            return gradient.backward(ctx, *incoming)
        with torch.no_grad():
            found = gradient.backward(ctx, *incoming)
        if not found:
            return found
        depend_on = [x for x in (*ctx.saved_tensors, *incoming) if isinstance(x, Tensor) and x.requires_grad]
        return dict(zip(found, _NoSecondDerivative.apply(message, list(found.values()), *depend_on), strict=True))

    return backward


def _register_gradient(name: str, arguments: list[str], at: int | None, gradient: Gradient) -> None:
    inputs_of = cast(Any, namedtuple("Inputs", arguments))
    if at is not None:
        inputs_of.noise_parts = property(lambda inputs: inputs[at : at + _NOISE_ARGUMENTS])
    place = {argument: i for i, argument in enumerate(arguments)}
    constant = [i for i, argument in enumerate(arguments) if argument not in gradient.of]
    backward_of = _once(name, gradient) if gradient.instead else gradient.backward

    def save(ctx, inputs, output):  # torch's registration calls it by these names
        needed = ctx.needs_input_grad
        if any(needed[i] for i in constant):
            wrong = ", ".join(arguments[i] for i in constant if needed[i])
            raise InputError(
                f"{name} has no gradient in {wrong}, only in {', '.join(gradient.of)}: call .detach() on it, or "
                "compute it in plain torch"
            )
        gradient.save(ctx, inputs_of._make(inputs), output)
        ctx.block = current_block()

    def backward(ctx, *gradients):
        if ctx.block is not current_block():  # autograd may call this from a thread of its own
            with within(ctx.block):
                return backward(ctx, *gradients)
        results = [None] * len(arguments)
        for argument, found in backward_of(ctx, *gradients).items():
            results[place[argument]] = found
        return tuple(results)

    if compat.HAS_BELOW_AUTOGRAD:
        _register_directly(name, save, backward)
    else:
        torch.library.register_autograd(f"ddpm_fast::{name}", backward, setup_context=save, lib=_library)


def _register_directly(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """What torch.library.register_autograd does, for schemas without defaults and keywords, in less time a call."""
    op = getattr(torch.ops.ddpm_fast, name).default

    def run(*inputs):
        with compat.below_autograd():
            return op(*inputs)

    def forward(ctx, *inputs):
        outputs = run(*inputs)
        save(ctx, inputs, outputs)
        return outputs

    function = type(
        f"{name}_gradient",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def choose(*inputs):
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        return function.apply(*inputs) if wanted else run(*inputs)

    _library.impl(name, choose, "Autograd")
