"""Images that are ready to be drawn, and the loop that draws them, row by row of a table.

draw() runs the whole table, and batches() does so for whoever wants each batch as soon as it is finished. Each row is
run in place on tensors that stay where they are (BatchState.advance), so the loop never waits for the device. Where
CUDA graphs can be captured, the loop replays that same row: the same kernels on the same numbers, and so the same
images bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.loops import graphs
from ddpm_fast.loops.classifier_guidance import Gradient, Judge, shift_table
from ddpm_fast.loops.compiled import compiled
from ddpm_fast.loops.guidance import predictor
from ddpm_fast.loops.inputs import scaled_to
from ddpm_fast.loops.network import Call, Network, evaluating, frozen
from ddpm_fast.loops.options import SamplingOptions, Step
from ddpm_fast.loops.state import BatchState, DeviceTable, Given, Paste, RowKind, asking_rows, looks_back
from ddpm_fast.nn import derived
from ddpm_fast.noise import NoiseKey, Stream
from ddpm_fast.samplers import SamplerTable

# start(key, part) gives the first state of the samples number part.start .. part.stop - 1, and what is pasted into it
# (or None). The key is that of these samples, in Stream.INITIAL.
Start = Callable[[NoiseKey, slice], tuple[Tensor, Paste | None]]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Images that are ready to be drawn: everything is decided and checked, and nothing is computed yet.

    Attributes:
        network: The network to be called.
        diffusion: The diffusion that it was trained for.
        options: What was asked for.
        table: The rows to be run, in order.
        shape: The shape of one sample.
        labels: int64 [n] on the CPU for the network, or None.
        null_label: The null class to guide away from, or None.
        key: The noise of the n samples, on the network's device.
        start: Where each batch starts; None for pure noise.
        same_noise: Whether all samples draw the noise of the first one.
        condition: The second images, [n or 1, C', h, w] as they were given, or None.
        judge: The classifier that guides, or None.
        targets: int64 [n] on the CPU, the classes that it guides towards, or None.
    """

    network: Network
    diffusion: GaussianDiffusion
    options: SamplingOptions
    table: SamplerTable
    shape: tuple[int, ...]
    labels: Tensor | None
    null_label: int | None
    key: NoiseKey
    start: Start | None = None
    same_noise: bool = False
    condition: Tensor | None = None
    judge: Judge | None = None
    targets: Tensor | None = None

    @property
    def n(self) -> int:
        """How many images there are."""
        return len(self.key.sample_id)

    @property
    def rows(self) -> int:
        """How many rows each batch runs through, which is how often on_step is called for it."""
        return len(self.table.timesteps)

    @torch.inference_mode()
    def draw(self) -> Tensor:
        """Draw the images, batch by batch: fp32 [n, *shape] on the network's device."""
        return gather(self.batches(), self)

    @torch.inference_mode()
    def batches(
        self, check: Callable[[], object] | None = None, wanted: Callable[[slice], bool] | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Draw the images and give each batch when it is finished.

        Args:
            check: Called before each row. What it raises ends the drawing.
            wanted: wanted(part) says whether a batch is to be drawn; None draws all. Leaving one out changes no other.

        Yields:
            part, the numbers of the batch's samples among the n; and x, fp32 [len(part), *shape] on the network's
            device, which the next batch may overwrite.
        """
        device, model = self.network.device, self.network.model
        batch_size = self.options.batch_size or max(self.n, 1)
        table = self._device_table()
        labels, targets = (None if t is None else t.to(device) for t in (self.labels, self.targets))
        judging = contextlib.nullcontext() if self.judge is None else frozen(self.judge.model)
        with evaluating(model), derived.held(model), judging, self._replays() as replays:
            for first in range(0, self.n, batch_size):
                part = slice(first, min(first + batch_size, self.n))
                if wanted is not None and not wanted(part):
                    continue
                key = self._initial_key(part)
                x, paste = (self.start or self.noise)(key, part)
                state = BatchState.of(
                    # A copy, because it is overwritten: a start may give what it was given itself.
                    x.clone(memory_format=self._memory_format()),
                    table,
                    key,
                    keeps_x0=self._looks_back or self.options.on_step is not None,
                    model_dtype=self.network.dtype,
                    given=Given(
                        labels=None if labels is None else labels[part],
                        targets=None if targets is None else targets[part],
                        condition=self._condition(part),
                    ),
                    paste=paste,
                )
                yield part, self._run_rows(state, self._kinds(paste), first, replays, check or _never)

    def _run_rows(
        self,
        state: BatchState,
        kinds: list[RowKind],
        first: int,
        replays: graphs.Replays | None,
        check: Callable[[], object],
    ) -> Tensor:
        """The state's x after all rows. first: the number of the batch's first sample."""
        on_step = self.options.on_step
        with self._repeating(state, replays) as (state, repeat):
            predict = predictor(
                self._call,
                state.labels,
                learned=self.diffusion.objective.learned,
                guidance=self.options.guidance,
                rescale=self.options.guidance_rescale,
                null_label=self.null_label,
                condition=state.condition,
            )
            gradient = self._gradient(state.targets)
            for i, kind in enumerate(kinds):
                check()
                repeat(kind, partial(state.advance, predict, kind, self.options.dynamic_threshold, gradient))
                if on_step is not None:
                    # Copies, because the next row overwrites both.
                    x0 = state.x0.clone() if kind.asks and state.x0 is not None else None
                    on_step(Step(first, i, self._timesteps[i], state.x.clone(), x0))
            return state.x

    @contextlib.contextmanager
    def _repeating(
        self, state: BatchState, replays: graphs.Replays | None
    ) -> Iterator[tuple[BatchState, Callable[[RowKind, Callable[[], None]], None]]]:
        """The state to be advanced, and repeat(kind, row), which runs a row of it: eagerly, or from a graph."""
        if replays is None:
            yield state, lambda kind, row: row()
            return
        layout = (
            state.layout(),
            (self.options.guidance, self.options.guidance_rescale, self.null_label, self.options.dynamic_threshold),
            self.options.compile,
            self.diffusion.objective.learned,
            None if self.judge is None else self.judge.scale,
            ops.active_backend("reverse_step", self.network.device, torch.float32),
        )
        replay = replays.take(layout)
        if replay is None:
            may_wait = self.network.may_wait or (self.judge is not None and self.judge.may_wait)
            replay = graphs.Replay(state.copy(), replays.pool, careful=may_wait)
        else:
            replay.state.load(state)
        try:
            yield replay.state, lambda kind, row: replay.of(kind)(row, self.options.cuda_graph)
        finally:
            replays.put(layout, replay)

    def _kinds(self, paste: Paste | None) -> list[RowKind]:
        """The kind of each row."""
        pastes = [False] * self.rows if paste is None else paste.rows
        reports = self.options.on_step is not None and not self._looks_back
        return [
            RowKind(asks=row_asks, pastes=row_pastes, reports=reports)
            for row_asks, row_pastes in zip(self._asks, pastes, strict=True)
        ]

    @functools.cached_property
    def _call(self) -> Call:
        """What is called as the network."""
        return self.network.called(compiled(self.network.model) if self.options.compile else None)

    # What the table says, as Python values: read once, and not for each batch.

    @functools.cached_property
    def _asks(self) -> list[bool]:
        return asking_rows(self.table).tolist()

    @functools.cached_property
    def _looks_back(self) -> bool:
        return looks_back(self.table)

    @functools.cached_property
    def _timesteps(self) -> list[int]:
        return self.table.timesteps.tolist()

    def _initial_key(self, part: slice) -> NoiseKey:
        """The noise that the samples of one batch start from, with a step of its own to be advanced."""
        ids = self.key.sample_id[part]
        if self.same_noise:
            ids = self.key.sample_id[:1].repeat(len(ids))
        return replace(self.key, sample_id=ids, step=torch.zeros_like(self.key.step), stream=Stream.INITIAL)

    def noise(self, key: NoiseKey, part: slice) -> tuple[Tensor, None]:
        """Pure noise: where sampling starts unless `start` says otherwise."""
        return ops.normal(key, self.shape, memory_format=self._memory_format()), None

    def _device_table(self) -> DeviceTable:
        shifts = None
        if self.judge is not None:
            shifts = shift_table(self.diffusion, self.table, self.options.sampler)
        return DeviceTable.of(self.table, self.network.device, self.options.dynamic_threshold, shifts)

    def _gradient(self, targets: Tensor | None) -> Gradient | None:
        """What a batch is guided by, or None. targets: its classes on the device."""
        if self.judge is None or self.targets is None or targets is None:
            return None
        return self.judge.gradient(targets, int(self.targets.max()) + 1)

    def _condition(self, part: slice) -> Tensor | None:
        """The second images of one batch, of the samples' size: fp32 [len(part), C', H, W] on the network's device."""
        if self.condition is None:
            return None
        images = self.condition if len(self.condition) == 1 else self.condition[part]
        return scaled_to(images.to(self.network.device), part.stop - part.start, self.shape[1:])

    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if len(self.shape) == 3 else torch.contiguous_format

    def _replays(self) -> contextlib.AbstractContextManager[graphs.Replays | None]:
        """The model's graphs; inside, None if there can be none."""
        if why_no_graph(self.network, self.judge, self.options.cuda_graph):
            return contextlib.nullcontext()
        classifier = None if self.judge is None else self.judge.model
        return graphs.replays_of(self.network.model, self.network.device, self.options.cuda_graph, classifier)


@torch.inference_mode()
def gather(batches: Iterator[tuple[slice, Tensor]], prepared: Prepared) -> Tensor:
    """What Prepared.batches gives, in one tensor: fp32 [n, *shape] on the network's device."""
    images = torch.empty((prepared.n, *prepared.shape), device=prepared.network.device)
    for part, x in batches:
        images[part] = x
    return images


def _never() -> None:
    """The check that stops nothing."""


def why_no_graph(network: Network, judge: Judge | None, cuda_graph: bool | None) -> str:
    """Why the rows cannot be replayed from graphs now, or the empty string. Raises InputError if they had to be."""
    if cuda_graph is False:
        return "cuda_graph is False"
    reason = graphs.cannot_capture(network.device, network.model)
    if judge is not None and not reason:
        reason = graphs.cannot_capture(network.device, judge.model)
    if reason:
        graphs.refuse(reason, cuda_graph)
    return reason
