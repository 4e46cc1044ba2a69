"""Which kernels torch launches on a GPU for each op, from its CUDA sources (2.11). A kernel reads each of its tensors
once and writes its results once; what stays in a cache is not guessed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ledger.entries import (
    ATTENTION,
    CONVOLUTIONS,
    COPIES,
    DIFFUSION,
    ELEMENTWISE,
    NORMS,
    OPTIMISER,
    PRODUCTS,
    REDUCTIONS,
    RESAMPLING,
    Call,
    Line,
    flat,
    is_channels_last,
    line,
    size,
)
from benchmarks.ledger.launches import is_streamed, launches_of_ours, multi_tensor_launches
from benchmarks.ledger.pretence import META

_COPYING = {"clone", "_to_copy", "copy_", "copy", "cat", "stack", "contiguous", "repeat", "roll", "flip"}
_PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "_addmm_activation"}
_REDUCING = {"sum", "mean", "amax", "amin", "prod", "linalg_vector_norm", "norm", "var", "var_mean", "std"}
_RESAMPLING = {"avg_pool2d", "avg_pool2d_backward", "upsample_nearest2d", "upsample_nearest2d_backward"}
_FILLING = {"fill_", "zero_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "arange"}
_FILLING |= {"new_zeros", "new_ones", "new_full"}
# A row of the table for each index: only what is picked is read.
_PICKING = {"index", "index_select", "gather", "embedding"}
# The kinds of our ops that are not the diffusion's own.
_OURS = {"group_norm": NORMS, "group_norm_backward": NORMS, "group_norm_parameters": NORMS}
_OURS |= {"add_bias": ELEMENTWISE, "dropout": ELEMENTWISE, "channel_sums": REDUCTIONS}
# Without a kernel, though the schema does not call their results views.
_FREE = {"_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "set_", "resize_", "record_stream"}


def _copy(op: str, tensor: Tensor) -> tuple[Line, Tensor]:
    """A copy in the other memory format, and what it makes."""
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
    return line(op, COPIES, [tensor], [made], fusable=True), made


def _contiguous(op: str, tensor: Tensor) -> tuple[list[Line], Tensor]:
    if tensor.is_contiguous():
        return [], tensor
    copied, made = _copy(op, tensor)
    return [copied], made


def _as_channels_last(op: str, tensor: Tensor, wanted: bool) -> tuple[list[Line], Tensor]:
    """The copies that bring a tensor into the format that a convolution computes in."""
    there = is_channels_last(tensor) if wanted else tensor.is_contiguous()
    if there:
        return [], tensor
    copied, made = _copy(op, tensor)
    return [copied], made


def _convolution(call: Call) -> list[Line]:
    """cuDNN computes in channels_last where the image or the weight is; it adds no bias: that is a kernel of its own,
    which reads and writes the result once more."""
    x, weight, bias = (call.arguments[name] for name in ("input", "weight", "bias"))
    last = is_channels_last(x) or is_channels_last(weight)
    first, x = _as_channels_last("convolution: layout", x, last)
    second, weight = _as_channels_last("convolution: layout", weight, last)
    (y,) = call.results
    if bias is None:
        return [*first, *second, line("convolution", CONVOLUTIONS, [x, weight], [y])]
    without = torch.empty(y.shape, dtype=y.dtype, device=META)
    return [
        *first,
        *second,
        line("convolution", CONVOLUTIONS, [x, weight], [without]),
        line("convolution: bias", ELEMENTWISE, [without, bias], [y], fusable=True),
    ]


def _convolution_backward(call: Call) -> list[Line]:
    """One kernel for each gradient; that of the bias is a sum over the incoming gradient."""
    grad, x, weight = (call.arguments[name] for name in ("grad_output", "input", "weight"))
    last = is_channels_last(x) or is_channels_last(weight)
    made, grad = _as_channels_last("convolution: layout", grad, last)
    for i, (read, name) in enumerate(((weight, "input"), (x, "weight"), (None, "bias"))):
        if not call.arguments["output_mask"][i]:
            continue
        result = call.results[sum(call.arguments["output_mask"][:i])]
        if read is None:
            made.append(line("convolution: gradient of the bias", REDUCTIONS, [grad], [result], fusable=True))
            continue
        copies, read = _as_channels_last("convolution: layout", read, last)
        made += [*copies, line(f"convolution: gradient of the {name}", CONVOLUTIONS, [grad, read], [result])]
    return made


def _group_norm(call: Call) -> list[Line]:
    """It knows no channels_last: a copy, then the moments of each group, each channel's factor and summand, and the
    pass that applies them."""
    copies, x = _contiguous("native_group_norm: layout", call.arguments["input"])
    y, mean, rstd = call.results
    affine = [v for v in (call.arguments["weight"], call.arguments["bias"]) if v is not None]
    factors = torch.empty(2, *y.shape[:2], device=META)
    return [
        *copies,
        line("native_group_norm: moments", NORMS, [x], [mean, rstd], fusable=True),
        line("native_group_norm: factors", NORMS, [mean, rstd, *affine], [factors], fusable=True),
        line("native_group_norm: apply", NORMS, [x, factors], [y], fusable=True),
    ]


def _group_norm_backward(call: Call) -> list[Line]:
    """Both images contiguous, two sums for each channel, each group's factors, the gradient of the image, and that of
    the weights."""
    first, grad = _contiguous("native_group_norm_backward: layout", call.arguments["grad_out"])
    second, x = _contiguous("native_group_norm_backward: layout", call.arguments["input"])
    sums = torch.empty(2, *x.shape[:2], device=META)
    dx, *affine = call.results
    return [
        *first,
        *second,
        line("native_group_norm_backward: sums", NORMS, [grad, x], [sums], fusable=True),
        line("native_group_norm_backward: factors", NORMS, [sums], [sums], fusable=True),
        line("native_group_norm_backward: image", NORMS, [grad, x], [dx], fusable=True),
        line("native_group_norm_backward: weights", NORMS, [sums], affine, fusable=True),
    ]


def _attention(call: Call) -> list[Line]:
    q, k, v = (call.arguments[name] for name in ("query", "key", "value"))
    return [line("attention", ATTENTION, [q, k, v], call.results[:1])]


def _attention_backward(call: Call) -> list[Line]:
    """The sums of grad * out, the gradients (that of the queries is gathered in fp32), and the cast of the latter."""
    names = ("grad_out", "query", "key", "value", "out")
    grad, q, k, v, out = (call.arguments[name] for name in names)
    gathered = torch.empty(q.shape, device=META)
    return [
        line("attention backward: sums", ATTENTION, [grad, out], []),
        line("attention backward", ATTENTION, [grad, q, k, v], [gathered, *call.results[1:]]),
        line("attention backward: cast", ATTENTION, [gathered], call.results[:1]),
    ]


def _pad(call: Call) -> list[Line]:
    """The whole result is filled, and then the image copied into it; what only cuts off is a copy."""
    image, (result,) = call.arguments["self"], call.results
    fill = line("constant_pad_nd", COPIES, [], [result], fusable=True)
    moved = min(image, result, key=size)
    copy = line("constant_pad_nd", COPIES, [image], [result], fusable=True)._replace(bytes=2 * size(moved))
    return [fill, copy] if result.numel() > image.numel() else [copy]


def _mse(call: Call) -> list[Line]:
    between = torch.empty(call.arguments["self"].shape, device=META)
    return [
        line("mse_loss", ELEMENTWISE, call.inputs, [between], fusable=True),
        line("mse_loss", REDUCTIONS, [between], call.results, fusable=True),
    ]


def _fused_optimiser(call: Call) -> list[Line]:
    """Parameters and moments are read and written, gradients read: several tensors a launch."""
    lists = [call.arguments[name] for name in ("self", "grads", "exp_avgs", "exp_avg_sqs")]
    kernels = multi_tensor_launches([t.numel() for t in lists[0]], len(lists))
    written = [*lists[0], *lists[2], *lists[3]]
    return [line(call.name, OPTIMISER, flat(lists), written, kernels)]


def _multi_tensor(call: Call) -> list[Line]:
    """The _foreach_ ops: several tensors a launch."""
    lists = [value for value in call.arguments.values() if isinstance(value, list | tuple) and flat([value])]
    in_place = call.name.endswith("_")
    results = list(lists[0]) if in_place else call.results
    depth = len(lists) + (not in_place and len(results) > 0)
    extra = 0
    if call.name == "_foreach_norm":  # fills the sums of the chunks, and adds them
        depth, extra = 1, 2
    kernels = multi_tensor_launches([t.numel() for t in lists[0]], depth) + extra
    return [line(call.name, OPTIMISER, call.inputs, results, kernels)]


RULES: dict[str, Callable[[Call], list[Line]]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_group_norm": _group_norm,
    "native_group_norm_backward": _group_norm_backward,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_backward": _attention_backward,
    "constant_pad_nd": _pad,
    "mse_loss": _mse,
    "_fused_adamw_": _fused_optimiser,
}


def lines_of(call: Call, ours: bool, views: bool) -> list[Line]:
    """What a call adds to the ledger. ours: whether it is an op of ddpm_fast. views: whether its results are views of
    its arguments."""
    name, inputs, results = call.name, call.inputs, [t for t in call.results if t.device == META]
    if views or name in _FREE or name.startswith(("empty", "new_empty")) or not (inputs or results):
        return []
    if ours:
        written = [t for t in results if all(t is not other for other in inputs)]
        twice = [t for t in inputs if t.ndim == 4] if is_streamed(name, call.arguments) else []
        kernels = launches_of_ours(name, call.arguments)
        return [line(name, _OURS.get(name, DIFFUSION), [*inputs, *twice], written, kernels)]
    if name in RULES:
        return RULES[name](call)
    if name.startswith("_foreach_"):
        return _multi_tensor(call)
    if name in _FILLING:
        return [line(name, COPIES, [], results, fusable=True)]
    if any(t.device != META and t.ndim for t in flat(call.arguments.values())):
        return []  # from the host or to it: no kernel
    if name in _PICKING:
        rest = [t for t in inputs[1:] if t.dtype in (torch.int64, torch.int32)]
        return [line(name, COPIES, [*results, *rest], results, fusable=True)]
    if name == "copy_":
        return [line(name, COPIES, [call.arguments["src"]], results, fusable=True)]
    kinds = ((PRODUCTS, _PRODUCTS), (COPIES, _COPYING), (REDUCTIONS, _REDUCING), (RESAMPLING, _RESAMPLING))
    kind = next((kind for kind, names in kinds if name in names), ELEMENTWISE)
    return [line(name, kind, inputs, results, fusable=kind in (ELEMENTWISE, COPIES, REDUCTIONS))]
