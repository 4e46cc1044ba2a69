"""Somebody else's network, called as ours is: model(x, t) or model(x, t, labels), with a tensor for an answer.

The loops take every such network as it is (loops/network.py). Foreign is for what a network does not say of itself: the
shape of its samples, its classes, and of a plain function the device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm_fast.errors import InputError, check_integer

_EXPECTED = "expected a torch.nn.Module or a function that is called as one is, with (x, t) or (x, t, labels)"
# What diffusers' UNet2DModel has in its config, and no other of its networks has with a config of images alone.
_DIFFUSERS = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "block_out_channels")
_MAX = 2**24  # for a size or a number of classes


class Named(nn.Module):
    """Whatever can be called, as a module. The modules that a function names are part of it: as a method's object, in a
    functools.partial, as variables. They say its device and dtype, and follow its mode. A function that names no
    parameters is on the CPU; `.to(device)` says otherwise.

    Args:
        model: A torch.nn.Module or any callable.
        what: What it is, for messages.

    Attributes:
        model: As it was given.

    Raises:
        InputError: For what cannot be called.
    """

    def __init__(self, model: Callable[..., Any], what: str):
        super().__init__()
        _check_callable(model, what)
        self.model = model
        if not isinstance(model, nn.Module):
            self.named = nn.ModuleList(_named_modules(model))
            if next(self.parameters(), None) is None:
                # Says where this is, and goes along with .to().
                self.register_buffer("place", torch.empty(0), persistent=False)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Call it."""
        return self.model(*arguments, **named)


class Foreign(Named):
    """A network that is called as ours is. What it answers is checked, and taken out of diffusers' output object.

    Of diffusers' UNet2DModel the config says everything. For a function's device see Named: one that names no
    parameters is on the CPU, unless `.to(device)` says otherwise, and is given float32.

    Args:
        model: A torch.nn.Module or any callable of (x, t) or (x, t, labels). A parameter called class_labels is given
            the labels by that name.
        shape: The shape of one sample, (C, ...). None for what the network says, if it does.
        out_channels: The channels of its output, likewise.
        classes: The number of classes, 0 for none, likewise. Labels are then checked to be 0 to classes - 1.

    Attributes:
        model: The network as it was given.
        shape, out_channels, classes: See the arguments; None for what is not known.
        takes_labels, needs_labels: Whether it may, and must, be called with labels.
        divisor: What the sizes of an image must be divisible by.

    Raises:
        InputError: For what is no network, and numbers that do not say what they should.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        shape: Sequence[int] | None = None,
        out_channels: int | None = None,
        classes: int | None = None,
    ):
        super().__init__(model, "the model")
        said = _said(model)
        self.shape = said.shape if shape is None else _checked_shape(shape)
        self.out_channels = said.out_channels if out_channels is None else _checked("out_channels", out_channels, 1)
        self.classes = said.classes if classes is None else _checked("classes", classes, 0)
        # What takes neither two arguments nor three says so itself when it is called.
        with_labels, without = _accepts(model, 3), _accepts(model, 2)
        self.takes_labels = self.classes != 0 and (with_labels or not without)
        self.needs_labels = said.needs_labels or (with_labels and not without)
        self.divisor = said.divisor
        self._by_name = said.by_name or _has_parameter(model, "class_labels")

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's answer.

        Args:
            x: float [N, C, ...].
            t: int64 [N].
            labels: int64 [N], or None.

        Returns:
            float [N, C', ...], with the sizes of x behind the channels.

        Raises:
            InputError: If the network answers with something else.
        """
        return self.adapted(self.model)(x, t, labels)

    def adapted(self, call: Callable[..., Any]) -> Callable[..., Tensor]:
        """forward, with `call` in the model's place: a compiled copy of it, say."""

        def adapted(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            if labels is None:
                return _tensor_of(call(x, t), x, self.name)
            answer = call(x, t, class_labels=labels) if self._by_name else call(x, t, labels)
            return _tensor_of(answer, x, self.name)

        return adapted

    @property
    def name(self) -> str:
        """What the network is called, for messages."""
        return name_of(self.model)


def name_of(model: object) -> str:
    """What a network is called: a function's own name, or that of its class."""
    name = getattr(model, "__name__", None)
    return name if isinstance(name, str) and not isinstance(model, nn.Module) else type(model).__name__


# What a network says of itself


class _Said(NamedTuple):
    """What a network says of itself; see Foreign."""

    shape: tuple[int, ...] | None = None
    out_channels: int | None = None
    classes: int | None = None
    needs_labels: bool = False
    by_name: bool = False
    divisor: int = 1


def _said(model: object) -> _Said:
    """What the config of one of diffusers' networks says. Raises InputError for one that needs more than an image."""
    config = getattr(model, "config", None)
    if not isinstance(config, Mapping) or any(key not in config for key in _DIFFUSERS):
        return _Said()
    name = name_of(model)
    if "cross_attention_dim" in config:
        raise InputError(
            f"the {name} needs more than an image and a timestep (encoder_hidden_states): give a function of (x, t) or "
            "(x, t, labels) that calls it with them"
        )
    kind, classes = config.get("class_embed_type"), config["num_class_embeds"]
    if kind == "identity":
        raise InputError(
            f"class_embed_type of the {name} is 'identity', which takes vectors for classes: give a function of (x, t) "
            "or (x, t, labels) that calls it with them"
        )
    in_channels, size = _checked("in_channels", config["in_channels"], 1), config["sample_size"]
    sides = (size, size) if isinstance(size, int) else size
    return _Said(
        shape=None if sides is None else _checked_shape((in_channels, *sides)),
        out_channels=_checked("out_channels", config["out_channels"], 1),
        # "timestep" embeds the label as a number, of which there is no largest.
        classes=None if kind == "timestep" else _checked("num_class_embeds", classes or 0, 0),
        needs_labels=kind is not None or bool(classes),
        by_name=True,
        divisor=2 ** (len(config["block_out_channels"]) - 1),
    )


def _checked(name: str, value: object, low: int) -> int:
    return check_integer(name, value, low, _MAX)


def _checked_shape(shape: object) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not shape:
        raise InputError(f"shape is {shape!r:.200}; expected that of one sample, such as (3, 32, 32)")
    return tuple(_checked(f"shape[{i}]", size, 1) for i, size in enumerate(shape))


def _check_callable(model: object, what: str) -> None:
    if isinstance(model, type) or not callable(model):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        inner = next((name for name in ("model", "unet") if callable(getattr(model, name, None))), None)
        advice = f": give its .{inner}" if inner and not isinstance(model, type) else ""
        raise InputError(f"{what} is {kind}; {_EXPECTED}{advice}")
    if hasattr(model, "unet") and hasattr(model, "scheduler"):
        raise InputError(f"{what} is a {type(model).__name__}, a whole pipeline; {_EXPECTED}: give its .unet")


def _signature(model: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # a function of C, or one that hides what it takes
        return None


def _accepts(model: Callable[..., Any], count: int) -> bool:
    """Whether a network may be called with so many arguments, as far as it says."""
    signature = _signature(model)
    if signature is None:
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return count == 3 and "class_labels" in signature.parameters
    return True


def _has_parameter(model: Callable[..., Any], name: str) -> bool:
    signature = _signature(model)
    return signature is not None and name in signature.parameters


def _named_modules(call: Any) -> Iterator[nn.Module]:
    """The modules that a function names: its object, those of a functools.partial, and its variables."""
    if isinstance(call, nn.Module):
        yield call
    elif isinstance(call, functools.partial):
        for part in (call.func, *call.args, *call.keywords.values()):
            yield from _named_modules(part)
    elif inspect.ismethod(call):
        yield from _named_modules(call.__self__)
        yield from _named_modules(call.__func__)
    elif inspect.isfunction(call):
        try:
            variables = inspect.getclosurevars(inspect.unwrap(call))
        except ValueError:  # a variable that has no value yet
            return
        for value in (*variables.nonlocals.values(), *variables.globals.values()):
            if isinstance(value, nn.Module):
                yield value


# What a network answers


def _tensor_of(answer: object, x: Tensor, name: str) -> Tensor:
    """The tensor in a network's answer to x. Raises InputError for an answer of another kind."""
    if not isinstance(answer, Tensor):
        sample = getattr(answer, "sample", None)
        if not isinstance(sample, Tensor):
            raise InputError(_refusal(answer, name))
        answer = sample
    expected = [x.shape[0], "C", *x.shape[2:]]
    wanted = f"expected floats [{', '.join(map(str, expected))}] on {x.device}"
    if not answer.is_floating_point() or answer.layout is not torch.strided:
        raise InputError(f"the {name} answered with {answer.dtype}, {answer.layout}; {wanted}")
    if answer.ndim != x.ndim or answer.shape[0] != x.shape[0] or answer.shape[2:] != x.shape[2:]:
        raise InputError(f"the {name} answered {list(x.shape)} with {list(answer.shape)}; {wanted}")
    if answer.device != x.device:
        raise InputError(f"the {name} answered on {answer.device}; {wanted}: move it there, or ddpm_fast.Foreign of it")
    return answer


def _refusal(answer: object, name: str) -> str:
    kind = "None" if answer is None else f"a {type(answer).__name__}"
    advice = "return the tensor"
    if isinstance(answer, (tuple, list)):
        advice = "give a function that takes the tensor out of it, such as lambda x, t: model(x, t)[0]"
    elif isinstance(answer, Mapping):
        advice = "give a function that takes the tensor out of it, such as lambda x, t: model(x, t)['out']"
    return (
        f"the {name} answered with {kind}; expected a tensor of floats, [N, C or 2C, ...], or an object with one as "
        f".sample: {advice}"
    )
