"""One batch on its way through a sampler's table: its tensors, and the arithmetic of one row.

A row is run in place on tensors that stay where they are, and everything that differs between two rows is on the
device. So a row never waits for the device, and the same code runs eagerly and under a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.loops.classifier_guidance import Gradient
from ddpm_fast.loops.guidance import Predict, dynamic_threshold
from ddpm_fast.loops.parts import part
from ddpm_fast.noise import NoiseKey, Stream
from ddpm_fast.samplers import SamplerTable


class Paste(NamedTuple):
    """Known pixels, which replace those of the state after some rows, noised to the level that the row ends at.

    Attributes:
        known: The known pixels: fp32, shaped like the state.
        where: bool, broadcastable to the state; True where the pixel is known.
        levels: fp32 [S, 2] on the device, (sqrt(alpha_bar), sqrt(1 - alpha_bar)) after each row.
        rows: For each row, whether the known pixels are pasted after it.
    """

    known: Tensor
    where: Tensor
    levels: Tensor
    rows: list[bool]


class Given(NamedTuple):
    """What the networks are given beside the state and the timestep. None for what they are not given.

    Attributes:
        labels: int64 [N] for the network.
        targets: int64 [N], the classes that a classifier guides towards.
        condition: fp32 [N, C', ...], the second image of each sample.
    """

    labels: Tensor | None = None
    targets: Tensor | None = None
    condition: Tensor | None = None


_NOTHING = Given()


class RowKind(NamedTuple):
    """What a row does besides its arithmetic. Rows of one kind can be replayed from one CUDA graph.

    Attributes:
        asks: Whether the row calls the network.
        pastes: Whether known pixels are pasted after it.
        reports: Whether x0 is kept for on_step alone: no row of the table reads the x_0 of the row before it.
    """

    asks: bool
    pastes: bool = False
    reports: bool = False


def asking_rows(table: SamplerTable) -> Tensor:
    """Which rows read the network's output: bool [S]. A row whose a_x and a_out are both 0 does not."""
    return (table.coefficients[:, :2] != 0).any(dim=1)


def looks_back(table: SamplerTable) -> bool:
    """Whether some row of the table reads the x_0 that the row before it predicted."""
    return any(b_previous != 0 for b_previous in table.coefficients[:, 4].tolist())


class DeviceTable(NamedTuple):
    """A sampler's table on the device.

    Attributes:
        rows: fp32 [S, 8], for ops.reverse_step.
        to_x0: fp32 [S, 8], the sampler's own coefficients, if x_0 is formed before ops.reverse_step (dynamic
            thresholding); else None.
        timesteps: int64 [S].
        shifts: fp32 [S, 2 or 3], what a classifier's gradient adds in each row (classifier_guidance.shift_table), or
            None.
    """

    rows: Tensor
    to_x0: Tensor | None
    timesteps: Tensor
    shifts: Tensor | None = None

    @classmethod
    def of(
        cls, table: SamplerTable, device: torch.device, threshold: float | None, shifts: Tensor | None = None
    ) -> DeviceTable:
        """Copy a table to the device. threshold: the quantile of dynamic thresholding, or None. shifts: See above."""
        coefficients = table.coefficients.to(device, torch.float32)
        timesteps = table.timesteps.to(device)
        shifts = None if shifts is None else shifts.to(device, torch.float32)
        if threshold is None:
            return cls(coefficients, None, timesteps, shifts)
        # The "output" will be the thresholded x_0, to be taken as it is: a_x = 0, a_out = 1, no clip.
        rows = table.coefficients.clone()
        rows[:, 0] = 0.0
        rows[:, 1] = asking_rows(table).to(rows.dtype)
        rows[:, 6] = torch.inf
        return cls(rows.to(device, torch.float32), coefficients, timesteps, shifts)


@dataclass(frozen=True, eq=False)
class BatchState:
    """A batch and all that a row reads, in tensors that stay where they are. Make one with BatchState.of.

    Attributes:
        x: The state, [N, C, ...].
        x_model: The state in the dtype that the network reads. None if that is x itself.
        x0: The latest prediction of x_0, for tables that look back and for on_step. None if nobody reads it.
        seed, sample_id: The noise of these samples; see NoiseKey.
        step: The row that is next, from 0. It alone chooses the coefficients, the timestep and the noise.
        rows, to_x0, timesteps, shifts: See DeviceTable.
        labels, targets, condition: See Given.
        known, where, levels: See Paste; None if nothing is pasted.
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
    shifts: Tensor | None
    labels: Tensor | None
    targets: Tensor | None
    condition: Tensor | None
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
        keeps_x0: bool = False,
        model_dtype: torch.dtype | None = None,
        given: Given = _NOTHING,
        paste: Paste | None = None,
    ) -> BatchState:
        """The state that starts from x.

        Args:
            x: Where to start. It is overwritten.
            table: The rows to be run.
            key: The noise of these samples. Its step must be 0; it is advanced in place.
            keeps_x0: Whether the predicted x_0 is kept.
            model_dtype: The dtype that the network reads; None for x's own.
            given: What the networks are given besides, on x's device.
            paste: The known pixels, or None.
        """
        # The first row multiplies x0 by 0, so it must be finite.
        x0 = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if keeps_x0 else None
        return cls(
            x=x,
            x_model=None if model_dtype in (None, x.dtype) else x.to(model_dtype),
            x0=x0,
            seed=key.seed,
            sample_id=key.sample_id,
            step=key.step,
            rows=table.rows,
            to_x0=table.to_x0,
            timesteps=table.timesteps,
            shifts=table.shifts,
            labels=given.labels,
            targets=given.targets,
            condition=given.condition,
            known=None if paste is None else paste.known,
            where=None if paste is None else paste.where,
            levels=None if paste is None else paste.levels,
        )

    def _tensors(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def layout(self) -> tuple:
        """What a graph over these tensors depends on: their shapes and dtypes."""
        return tuple(None if t is None else (t.shape, t.dtype) for t in self._tensors().values())

    def copy(self) -> BatchState:
        """The same state in tensors of its own."""
        clones: dict[str, Any] = {name: None if t is None else t.clone() for name, t in self._tensors().items()}
        return BatchState(**clones)

    def load(self, other: BatchState) -> None:
        """Take over the values of another state of the same layout, in this one's tensors."""
        for mine, theirs in zip(self._tensors().values(), other._tensors().values(), strict=True):
            if mine is not None:
                mine.copy_(theirs)

    def advance(
        self, predict: Predict, kind: RowKind, threshold: float | None = None, gradient: Gradient | None = None
    ) -> None:
        """Run one row: x becomes the next state. Nothing is written before the network has answered.

        Args:
            predict: predict(x, t) -> output, called if the row asks.
            kind: What the row does besides its arithmetic.
            threshold: The quantile of dynamic thresholding, in place of the table's clip; None for none.
            gradient: gradient(x, t) of a classifier that guides, if the table has shifts.
        """
        key = NoiseKey(self.seed, self.sample_id, self.step, Stream.REVERSE)
        output = self._asked(predict, threshold) if kind.asks else self.x
        push = None if gradient is None or not kind.asks else self._push(gradient, output)
        is_changed = kind.pastes or push is not None
        if kind.reports and self.x0 is not None:
            # reverse_step_ adds 0 * x0 for such a table. With x0 = -0 that is -0, and adding -0 changes no bit of x.
            self.x0.fill_(-0.0)
        with part("step"):
            # In place: two buffers would need a copy at the end, or two graphs, one for each direction.
            ops.reverse_step_(
                self.x,
                output,
                self.rows,
                self.step,
                key,
                x0=self.x0,
                x_model=None if is_changed else self.x_model,
            )
            if push is not None:
                self._shift(*push)
            if kind.pastes:
                self._paste(key)
            if is_changed and self.x_model is not None:
                self.x_model.copy_(self.x)
            self.step.add_(1)

    def _asked(self, predict: Predict, threshold: float | None) -> Tensor:
        """What the network answers; with a threshold, the x_0 that follows from it, brought into its range."""
        x, x_model = self.x, self.x if self.x_model is None else self.x_model
        with part("network"):
            output = predict(x_model, self._t())
        if threshold is None or self.to_x0 is None:
            return output
        row = self.to_x0.index_select(0, self.step.view(1))[0]
        prediction, variance = output[:, : x.shape[1]], output[:, x.shape[1] :]
        x0 = dynamic_threshold(row[0] * x + row[1] * prediction, threshold)
        return torch.cat([x0, variance], dim=1) if variance.shape[1] else x0

    def _t(self) -> Tensor:
        """The timestep of every sample: int64 [N], expanded, with the stride 0: the U-Net embeds such a timestep once
        for all samples."""
        # index_select, because timesteps[step] would read the step back to the host.
        return self.timesteps.index_select(0, self.step.view(1)).expand(self.x.shape[0])

    def _push(self, gradient: Gradient, output: Tensor) -> tuple[Tensor, Tensor]:
        """What a classifier's gradient adds to the state and to the predicted x_0."""
        assert self.shifts is not None
        row = self.shifts.index_select(0, self.step.view(1))[0]
        with part("classifier"):
            g = gradient(self.x, self._t())
        to_x = row[0] * g
        if len(row) == 3:  # a learned variance
            to_x = to_x * (row[2] * output[:, self.x.shape[1] :].to(g.dtype)).exp()
        return to_x, row[1] * g

    def _shift(self, to_x: Tensor, to_x0: Tensor) -> None:
        self.x.add_(to_x)
        if self.x0 is not None:
            self.x0.add_(to_x0)

    def _paste(self, key: NoiseKey) -> None:
        if self.known is None or self.where is None or self.levels is None:
            return
        known = replace(key, stream=Stream.KNOWN)
        noised = ops.q_sample(self.known, self.step.expand(self.x.shape[0]), self.levels, known)
        torch.where(self.where, noised, self.x, out=self.x)
