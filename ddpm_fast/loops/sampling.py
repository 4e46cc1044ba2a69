"""Sampling: the one loop that every sampler and every way of editing runs through, row by row of a table.

Noise comes from each sample's own counter, so a sample is the same image whatever the batch it is drawn in; what
remains is the network's own dependence on the batch size, which is rounding.

A row is one step in place on tensors that stay where they are (Chain.step), and everything that differs between rows
is on the device. So the loop never waits, and where CUDA graphs can be had it is the replay of that same step: the
same kernels on the same numbers, and so the same images bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_fast import ops
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops import graphs
from ddpm_fast.loops.guidance import (
    Predict,
    check_guidance,
    check_output,
    check_threshold,
    dynamic_threshold,
    predictor,
)
from ddpm_fast.loops.network import check_labels, evaluating, placement
from ddpm_fast.nn import UNet
from ddpm_fast.noise import NoiseKey, Stream
from ddpm_fast.samplers import SamplerTable, make_table


class Paste(NamedTuple):
    """Pixels that are known: after each row i with rows[i], the state is known there, noised to the level of the row.

    known: fp32, shaped like the state; where: bool, broadcastable to it, True where it is known; levels: fp32 [S, 2],
    (sqrt(alpha_bar), sqrt(1 - alpha_bar)) after each row, on the device; rows: which rows paste.
    """

    known: Tensor
    where: Tensor
    levels: Tensor
    rows: list[bool]


class DeviceTable(NamedTuple):
    """A sampler's table where the loop reads it. rows: fp32 [S, 8], for ops.reverse_step; to_x0: fp32 [S, 8], the
    sampler's own coefficients if x_0 is formed before that (dynamic thresholding), else None."""

    rows: Tensor
    to_x0: Tensor | None
    timesteps: Tensor

    @classmethod
    def of(cls, table: SamplerTable, device: torch.device, threshold: float | None) -> DeviceTable:
        coefficients = table.coefficients.to(device, torch.float32)
        timesteps = table.timesteps.to(device)
        if threshold is None:
            return cls(coefficients, None, timesteps)
        return cls(_on_x0(table).to(device, torch.float32), coefficients, timesteps)


@dataclass(frozen=True, eq=False)
class Chain:
    """A batch on its way through a table: the state, and all that a step reads, in tensors that stay where they are.

    x: the state. x_model: the same as the network reads it; None if that is x. x0: the latest prediction of x_0, for
    tables that look back. step: the row that is next, from 0 on: it alone chooses the coefficients, the timestep and
    the noise. labels: for the network. known, where, levels: of a Paste.
    """

    x: Tensor
    x_model: Tensor | None
    x0: Tensor | None
    seed: Tensor
    sample_id: Tensor
    step: Tensor
    rows: Tensor
    to_x0: Tensor | None
    timesteps: Tensor
    labels: Tensor | None
    known: Tensor | None
    where: Tensor | None
    levels: Tensor | None

    @classmethod
    def of(
        cls,
        x: Tensor,
        table: DeviceTable,
        key: NoiseKey,
        *,
        looks_back: bool = False,
        model_dtype: torch.dtype | None = None,
        labels: Tensor | None = None,
        paste: Paste | None = None,
    ) -> Chain:
        """The chain that starts from x, which it overwrites. key: of these samples; its step must be 0 and is advanced
        in place. model_dtype: what the network reads; None for x's own."""
        x_model = None if model_dtype in (None, x.dtype) else x.to(model_dtype)
        # Zeros, since the first row multiplies them by 0.
        x0 = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if looks_back else None
        known, where, levels = (None, None, None) if paste is None else paste[:3]
        return cls(x, x_model, x0, key.seed, key.sample_id, key.step, *table, labels, known, where, levels)

    def _tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def layout(self) -> tuple:
        """What a graph of a step over these tensors has in it of them: shapes and dtypes."""
        return tuple(None if t is None else (t.shape, t.dtype) for t in self._tensors().values())

    def copy(self) -> Chain:
        """The same chain in tensors of its own."""
        return Chain(*(None if t is None else t.clone() for t in self._tensors().values()))

    def load(self, other: Chain) -> None:
        """Become another chain of the same layout, in this one's tensors."""
        for mine, theirs in zip(self._tensors().values(), other._tensors().values(), strict=True):
            if mine is not None:
                mine.copy_(theirs)

    def advance(self, predict: Predict, asks: bool, pastes: bool, threshold: float | None = None) -> None:
        """One row: x becomes the next state. predict(x, t) -> output is asked if the row reads it. threshold: the
        quantile of dynamic thresholding, in place of the table's clip.

        Until the network has answered nothing is written.
        """
        x, x_model = self.x, self.x if self.x_model is None else self.x_model
        key = NoiseKey(self.seed, self.sample_id, self.step, Stream.REVERSE)
        output = x
        if asks:
            # timesteps[step] would read the step back to the host.
            t = self.timesteps.index_select(0, self.step.view(1))
            output = predict(x_model, t.expand(x.shape[0]))
            if threshold is not None:
                output = _thresholded(x, output, self.to_x0.index_select(0, self.step.view(1))[0], threshold)
        # In place, where a step of two buffers would need a copy at the end (or two graphs, one for each direction).
        ops.reverse_step_(*(x, output, self.rows, self.step, key), x0=self.x0, x_model=None if pastes else self.x_model)
        if pastes:
            known = replace(key, stream=Stream.KNOWN)
            noised = ops.q_sample(self.known, self.step.expand(x.shape[0]), self.levels, known)
            torch.where(self.where, noised, x, out=x)
            if self.x_model is not None:
                self.x_model.copy_(x)
        self.step.add_(1)


def _on_x0(table: SamplerTable) -> Tensor:
    """The table's coefficients for an "output" that is the predicted x_0, to be taken as it is."""
    coefficients = table.coefficients.clone()
    coefficients[:, 0], coefficients[:, 1], coefficients[:, 6] = 0.0, _asks(table).to(coefficients.dtype), torch.inf
    return coefficients


def _asks(table: SamplerTable) -> Tensor:
    """Which rows read the network's output; one whose a_x and a_out are 0 moves x without it. bool [S]."""
    return (table.coefficients[:, :2] != 0).any(dim=1)


def _thresholded(x: Tensor, output: Tensor, row: Tensor, quantile: float) -> Tensor:
    """The predicted x_0 in its range, followed by the channels that set the variance if there are any."""
    prediction, variance = output[:, : x.shape[1]], output[:, x.shape[1] :]
    x0 = dynamic_threshold(row[0] * x + row[1] * prediction, quantile)
    return torch.cat([x0, variance], dim=1) if variance.shape[1] else x0


class _Plan:
    """A chain whose steps are replayed, and their graphs: one for each kind of row."""

    def __init__(self, chain: Chain, pool: graphs.Pool, careful: bool):
        self.chain = chain
        self._new = partial(graphs.Repeated, pool, careful)
        self._kinds: dict[tuple[bool, bool], graphs.Repeated] = {}

    def of(self, kind: tuple[bool, bool]) -> graphs.Repeated:
        if kind not in self._kinds:
            self._kinds[kind] = self._new()
        return self._kinds[kind]


class Run:
    """n samples to be drawn, with everything decided and checked: sample() and the functions of editing.py.

    The arguments are those of sample(). table: the sampler's. shape: of one sample. labels: int64 [n] or None. device:
    the model's. Raises InputError for whatever is wrong with the arguments; nothing is drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        n: int,
        *,
        sampler: str = "ddpm",
        steps: int | str | Sequence[int] | None = None,
        spacing: str = "even",
        eta: float | None = None,
        clip: bool = True,
        guidance: float | None = None,
        guidance_rescale: float = 0.0,
        dynamic_threshold: float | None = None,
        null_label: int | None = None,
        seed: int = 0,
        first_sample_id: int = 0,
        labels: int | Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        shape: tuple[int, ...] | None = None,
        on_step: Callable[[int, int, Tensor], None] | None = None,
        cuda_graph: bool | None = None,
    ):
        if not isinstance(n, int) or n < 0 or (batch_size is not None and batch_size < 1):
            raise InputError(f"n is {n} and batch_size {batch_size}; expected n >= 0 and batch_size >= 1 or None")
        self.n, self.batch_size, self.on_step = n, batch_size or max(n, 1), on_step
        self.model, self.diffusion, self.threshold = model, diffusion, dynamic_threshold
        self.table = make_table(diffusion, sampler, steps, spacing=spacing, eta=eta, clip=clip)
        check_threshold(dynamic_threshold)
        check_output(model, diffusion.objective.learned)
        null_label = check_guidance(model, labels, guidance, guidance_rescale, null_label)
        self.guidance = {"guidance": guidance, "rescale": guidance_rescale, "null_label": null_label}
        self.labels = check_labels(model, labels, n)
        self.shape = _sample_shape(model, shape)
        self.device, self.model_dtype = placement(model)
        self.memory_format = torch.channels_last if len(self.shape) == 3 else torch.contiguous_format
        self.key = NoiseKey.of(seed, n, first_sample_id=first_sample_id, device=self.device)
        self.cuda_graph = cuda_graph
        if cuda_graph:
            self._why_no_graph()

    @torch.inference_mode()
    def draw(
        self,
        start: Callable[[NoiseKey, slice], tuple[Tensor, Paste | None]],
        table: SamplerTable | None = None,
        same_noise: bool = False,
    ) -> Tensor:
        """Run the table (None: the sampler's) from start(key, part), batch by batch: fp32 [n, *shape] on the device.

        start gives the state x of the samples number part.start .. part.stop - 1 and what is pasted into it, or None;
        the key names those samples, in Stream.INITIAL. same_noise: all samples draw the noise of the first.
        """
        table = table or self.table
        asks, looks_back = _asks(table).tolist(), bool((table.coefficients[:, 4] != 0).any())
        on_device = DeviceTable.of(table, self.device, self.threshold)
        labels = None if self.labels is None else self.labels.to(self.device)
        images = torch.empty((self.n, *self.shape), device=self.device)
        with evaluating(self.model), self._plans() as plans:
            if plans is not None and plans.pool.refused:
                graphs.refuse(plans.pool.refused, self.cuda_graph)
                plans = None
            for first in range(0, self.n, self.batch_size):
                part = slice(first, min(first + self.batch_size, self.n))
                ids = self.key.sample_id[part]
                if same_noise:
                    ids = self.key.sample_id[:1].repeat(len(ids))
                key = replace(self.key, sample_id=ids, step=torch.zeros_like(self.key.step), stream=Stream.INITIAL)
                x, paste = start(key, part)
                chain = Chain.of(
                    # A copy, which is written to: a start may give what it was given.
                    *(x.clone(memory_format=self.memory_format), on_device, key),
                    **{"looks_back": looks_back, "model_dtype": self.model_dtype, "paste": paste},
                    labels=None if labels is None else labels[part],
                )
                pastes = [False] * len(asks) if paste is None else paste.rows
                images[part] = self._run(chain, list(zip(asks, pastes, strict=True)), first, plans)
        return images

    def _run(self, chain: Chain, kinds: list[tuple[bool, bool]], first: int, plans: graphs.Plans | None) -> Tensor:
        """The chain's x after all its rows, each of a kind: whether it asks the network, and whether it pastes."""
        plan, options = None, (*self.guidance.values(), self.threshold, self.diffusion.objective.learned)
        if plans is not None:
            backend = ops.active_backend("reverse_step", self.device, torch.float32)
            layout = (chain.layout(), options, backend)
            plan = plans.take(layout)
            if plan is None:
                # What waits for the device cannot be captured, and our own network does not.
                plan = _Plan(chain.copy(), plans.pool, careful=type(self.model) is not UNet)
            else:
                plan.chain.load(chain)
            chain = plan.chain
        predict = predictor(self.model, chain.labels, learned=self.diffusion.objective.learned, **self.guidance)
        try:
            for i, kind in enumerate(kinds):
                row = partial(chain.advance, predict, *kind, threshold=self.threshold)
                if plan is None:
                    row()
                else:
                    plan.of(kind)(row, self.cuda_graph)
                if self.on_step is not None:
                    self.on_step(first, i, chain.x.clone())  # the next step overwrites x
        finally:
            if plan is not None:
                plans.put(layout, plan)
        return chain.x

    def _why_no_graph(self) -> str:
        """Why the steps are not replayed from graphs now, or the empty string. Raises InputError if they had to be."""
        if self.cuda_graph is False:
            return "cuda_graph is False"
        reason = graphs.cannot_capture(self.device, self.model)
        if reason:
            graphs.refuse(reason, self.cuda_graph)
        return reason

    def _plans(self) -> contextlib.AbstractContextManager[graphs.Plans | None]:
        """The model's graphs, None within if there are none to be had."""
        return contextlib.nullcontext() if self._why_no_graph() else graphs.plans_of(self.model, self.device)

    def noise(self, key: NoiseKey, part: slice) -> tuple[Tensor, None]:
        """Pure noise, where sampling starts: a start for draw."""
        return ops.normal(key, self.shape, memory_format=self.memory_format), None


def sample(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    n: int,
    *,
    sampler: str = "ddpm",
    steps: int | str | Sequence[int] | None = None,
    spacing: str = "even",
    eta: float | None = None,
    clip: bool = True,
    guidance: float | None = None,
    guidance_rescale: float = 0.0,
    dynamic_threshold: float | None = None,
    null_label: int | None = None,
    seed: int = 0,
    first_sample_id: int = 0,
    labels: int | Sequence[int] | Tensor | None = None,
    batch_size: int | None = None,
    shape: tuple[int, ...] | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
    cuda_graph: bool | None = None,
) -> Tensor:
    """Draw n images: fp32 [n, C, H, W], about in [-1, 1], on the model's device.

    model: a UNet, or any network called as model(x, t) or model(x, t, labels) with x [N, C, ...], t int64 [N]; then
    `shape` says what one sample is, (C, ...). sampler, steps, spacing, eta, clip: see make_table; fewer steps are
    faster and coarser. Sample i depends on (seed, first_sample_id + i, label, and the options of sampler and guidance)
    and on nothing else but the network's rounding. labels: a class for all, or one each; None draws unconditionally.

    guidance: the scale w of classifier-free guidance towards the labels; above 1 the network is called on the batch
    doubled. guidance_rescale: 0..1, how far the guided output is brought back to the unguided one's standard deviation.
    dynamic_threshold: a quantile such as 0.995, for large guidance; it replaces the clip. null_label: the class that
    stands for none, of a network of one's own. See guidance.py.

    batch_size: how many at a time (None: all). on_step(first, i, x) is called after step i of the batch whose first
    sample is number `first`, with its x.

    cuda_graph: whether each step is replayed from a CUDA graph, with the same images bit for bit. None: where that can
    be done, and otherwise quietly not (the logger "ddpm_fast.graphs" says why); True: InputError says why not; False:
    never. A graph is captured at the third step of its kind and kept with the model for calls of the same shapes and
    options, as long as the weights stay where they are; their values may change. It repeats what the network did when
    it was captured: a network of one's own that does more in forward than arithmetic on tensors needs False.
    Raises InputError, before anything is drawn, for n < 0, batch_size < 1, labels, a shape or an output that do not fit
    the model, and where make_table, check_guidance, check_threshold and NoiseKey.of do; a network of one's own shows an
    output that does not fit at the first step.
    """
    run = Run(
        *(model, diffusion, n),
        **{"sampler": sampler, "steps": steps, "spacing": spacing, "eta": eta, "clip": clip},
        **{"guidance": guidance, "guidance_rescale": guidance_rescale, "dynamic_threshold": dynamic_threshold},
        **{"null_label": null_label, "seed": seed, "first_sample_id": first_sample_id, "labels": labels},
        **{"batch_size": batch_size, "shape": shape, "on_step": on_step, "cuda_graph": cuda_graph},
    )
    return run.draw(run.noise)


def _sample_shape(model: nn.Module, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of one sample: the U-Net's own, or the given one. Raises InputError for none, or two that differ."""
    own = None
    if isinstance(model, UNet):
        own = (model.config.in_channels, model.config.image_size, model.config.image_size)
    if own is None and shape is None:
        raise InputError(f"the shape of a {type(model).__name__}'s samples is not known: give shape=(C, H, W)")
    if own is not None and shape is not None and tuple(shape) != own:
        raise InputError(f"shape is {tuple(shape)}, but this U-Net draws {own}: leave shape out")
    return own or tuple(shape)
