"""What a training step draws besides its noise, in one pass: `draw_timesteps`. And `record_losses`, which keeps the
losses that importance sampling draws by. ddpm_fast/loops/timesteps.py has the rules and the papers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.checks import check_device, check_layout, check_tensors
from ddpm_fast.ops.declare import declare, kernel_for
from ddpm_fast.ops.tensors import Draw, Drawn, dense_noise, pack_noise
from ddpm_fast.wide import wide

LABELS = 2**24  # a label is dropped or kept by an integer below this
_MOST = 2**31  # timesteps, parts and labels: what 32 random bits can choose among, and int64 can multiply
_ops = torch.ops.ddpm_fast


class LabelDrop(NamedTuple):
    """Class labels of which some are replaced, so that a network can be guided (Ho & Salimans 2022).

    Attributes:
        labels: int64 [N].
        share: The probability with which a label is replaced, in [0, 1], in steps of 2^-24.
        null_label: What replaces it.
    """

    labels: Tensor
    share: float
    null_label: int


# --- draw_timesteps


def draw_timesteps(
    key: NoiseKey,
    num_timesteps: int,
    *,
    parts: int = 0,
    probabilities: Tensor | None = None,
    network_timesteps: Tensor | None = None,
    label_drop: LabelDrop | None = None,
) -> Drawn:
    """A timestep for each sample, the weight of its loss, and its label or the null label.

    All come from the first random words of the samples' counters: the timesteps' from the key's stream, the labels'
    from Stream.LABEL. So the draws of a sample do not depend on the batch that it is in.

    Args:
        key: Names the N samples, and is on the device where the draws are wanted.
        num_timesteps: T, in 1..2^31.
        parts: 0: uniform in 0..T-1. Otherwise sample id i draws from the (i mod parts)-th of `parts` equal parts of
            0..T-1.
        probabilities: float64 [T] (float32 on a device without) that sum to 1: draw in proportion to them, with weights
            1 / (T p_t). None: as `parts` says, with weights 1.
        network_timesteps: int64 [T], what the network calls each timestep. None: as they are.
        label_drop: The labels, and which share of them is dropped. None: there are no labels.

    Returns:
        t, the weights, the network's timesteps and the labels.

    Raises:
        InputError: If numbers, shapes, dtypes or devices do not fit.
    """
    if not isinstance(key, NoiseKey):
        raise InputError(f"draw_timesteps: key is a {type(key).__name__}; expected a NoiseKey")
    if label_drop is not None and not isinstance(label_drop, LabelDrop):
        raise InputError(f"draw_timesteps: label_drop is a {type(label_drop).__name__}; expected a LabelDrop")
    labels, share, null_label = label_drop or (None, 0.0, 0)
    if not 0 <= share <= 1:
        raise InputError(f"draw_timesteps: {share} of the labels are to be dropped; expected a share in [0, 1]")
    for name, tensor in (
        ("probabilities", probabilities),
        ("network_timesteps", network_timesteps),
        ("labels", labels),
    ):
        if tensor is not None:
            check_tensors("draw_timesteps", **{name: tensor})
            check_layout("draw_timesteps", name, tensor)
    t, weights, network_t, kept = _ops.draw_timesteps(
        key.seed,
        key.sample_id,
        key.step,
        key.stream,
        num_timesteps,
        parts,
        probabilities,
        None if probabilities is None else probabilities.cumsum(0),
        network_timesteps,
        labels,
        round(share * LABELS),
        null_label,
    )
    return Drawn(t, weights, t if network_timesteps is None else network_t, None if labels is None else kept)


def _draw_empty(*arguments):
    draw = Draw(pack_noise(None, *arguments[:4]), *arguments[4:])
    ids = draw.key.sample_id
    for name, number, least, most in (
        ("num_timesteps", draw.num_timesteps, 1, _MOST),
        ("parts", draw.parts, 0, _MOST),
        ("dropped", draw.dropped, 0, LABELS),
    ):
        if not least <= number <= most:
            raise InputError(f"draw_timesteps: {name} is {number}; expected an integer in {least}..{most}")
    if (draw.probabilities is None) != (draw.cumulative is None):
        raise InputError("draw_timesteps: probabilities and their cumulative sums belong together; give both or none")
    for name, tensor, dtype, size in (
        ("probabilities", draw.probabilities, wide(ids.device), draw.num_timesteps),
        ("cumulative", draw.cumulative, wide(ids.device), draw.num_timesteps),
        ("network_timesteps", draw.network_timesteps, torch.int64, draw.num_timesteps),
        ("labels", draw.labels, torch.int64, ids.shape[0]),
    ):
        if tensor is not None:
            _check_vector("draw_timesteps", name, tensor, dtype, size)
            check_device("draw_timesteps", name, tensor, "the NoiseKey", ids)
    t = ids.new_empty(ids.shape)
    return (
        t,
        t.new_empty(t.shape, dtype=torch.float32),
        t.new_empty(0 if draw.network_timesteps is None else t.shape),
        t.new_empty(0 if draw.labels is None else t.shape),
    )


def _draw(*arguments):
    results = _draw_empty(*arguments)
    key = dense_noise(pack_noise(None, *arguments[:4]))
    draw = Draw(key, *(x.contiguous() if isinstance(x, Tensor) else x for x in arguments[4:]))
    kernel_for("draw_timesteps", results[1])(draw, Drawn(*results))
    return results


declare(
    "draw_timesteps(Tensor seed, Tensor sample_id, Tensor step_id, int stream, int num_timesteps, int parts, "
    "Tensor? probabilities, Tensor? cumulative, Tensor? network_timesteps, Tensor? labels, int dropped, "
    "int null_label) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_draw,
    shapes=_draw_empty,
)


# --- record_losses


def record_losses(history: Tensor, counts: Tensor, t: Tensor, losses: Tensor) -> None:
    """Remember the losses of a batch, in place: of each timestep the last ones, in the order of the batch.

    A timestep's loss number k, counted from 0, goes to slot k mod S. Losses that are not finite are left out.

    Args:
        history: fp32 [T, S], contiguous; written to.
        counts: int64 [T], contiguous: how many losses each timestep had; added to.
        t: int64 [N], in 0..T-1. On a GPU, a loss whose t is outside is left out.
        losses: fp32 [N].

    Raises:
        InputError: If shapes, dtypes or devices do not fit; on the CPU also for a t outside of 0..T-1.
    """
    check_tensors("record_losses", history=history, counts=counts, t=t, losses=losses)
    _ops.record_losses(history, counts, t, losses)


def _check_record(history, counts, t, losses):
    check_layout("record_losses", "history", history)
    if history.dtype != torch.float32 or history.ndim != 2 or not history.shape[1] or not history.is_contiguous():
        raise InputError(
            f"record_losses: history is {history.dtype} of shape {tuple(history.shape)} and strides "
            f"{history.stride()}; expected contiguous float32 [T, slots]"
        )
    _check_vector("record_losses", "counts", counts, torch.int64, history.shape[0])
    if not counts.is_contiguous():
        raise InputError("record_losses: counts is not contiguous; make it so once, beforehand")
    _check_vector("record_losses", "losses", losses, torch.float32, losses.shape[0] if losses.ndim else 1)
    _check_vector("record_losses", "t", t, torch.int64, losses.shape[0])
    for name, tensor in (("counts", counts), ("t", t), ("losses", losses)):
        check_device("record_losses", name, tensor, "history", history)


def _check_apart(history, counts, t, losses):
    """What is written shares memory with nothing else: a t that changed after it was checked could be anything. All are
    contiguous."""
    places = [
        (name, tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        for name, tensor in (("history", history), ("counts", counts), ("t", t), ("losses", losses))
    ]
    for i, (written, start, end) in enumerate(places[:2]):
        for other, first, last in places[i + 1 :]:
            if start < last and first < end:
                raise InputError(
                    f"record_losses: {other} shares memory with {written}, which is written to: give each its own"
                )


def _record(history, counts, t, losses):
    _check_record(history, counts, t, losses)
    t, losses = t.contiguous(), losses.contiguous()
    _check_apart(history, counts, t, losses)
    kernel_for("record_losses", history)(history, counts, t, losses)
    torch.autograd.graph.increment_version([history, counts])  # torch does not see these writes


declare(
    "record_losses(Tensor(a!) history, Tensor(b!) counts, Tensor t, Tensor losses) -> ()",
    run=_record,
    shapes=_check_record,
)


def _check_vector(op: str, name: str, tensor: Tensor, dtype: torch.dtype, size: int) -> None:
    check_layout(op, name, tensor)
    if tensor.dtype != dtype or tensor.ndim != 1 or tensor.shape[0] != size:
        raise InputError(f"{op}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype} [{size}]")
