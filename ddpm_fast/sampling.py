"""Sampling: the one loop that every sampler and every way of editing runs through, row by row of a table.

Noise comes from each sample's own counter, so a sample is the same image whatever the batch it is drawn in; what
remains is the network's own dependence on the batch size, which is rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import ops
from .diffusion import GaussianDiffusion
from .errors import InputError
from .guidance import Predict, check_guidance, check_output, check_threshold, dynamic_threshold, predictor
from .network import check_labels, evaluating, placement
from .nn import UNet
from .noise import NoiseKey, Stream
from .samplers import SamplerTable, make_table

Paste = Callable[[int, Tensor], Tensor]


def reverse_chain(
    predict: Predict,
    table: SamplerTable,
    x: Tensor,
    key: NoiseKey,
    *,
    model_dtype: torch.dtype | None = None,
    threshold: float | None = None,
    paste: Paste | None = None,
) -> Iterator[Tensor]:
    """The states x after each row of the table, from a given x on: the loop of every sampler.

    predict(x, t) -> output is asked at every row that reads the output; a row whose a_x and a_out are 0 moves x without
    it. It reads x in model_dtype (None: x's own) while the state stays in x's. key.step must be 0 and is advanced in
    place: that one tensor chooses the row, the timestep and the noise, so that no step waits for the device.
    threshold: the quantile of dynamic thresholding, in place of the table's clip. paste(i, x) -> x, if given, has the
    last word on the state after row i.
    """
    asks = (table.coefficients[:, :2] != 0).any(dim=1).tolist()
    looks_back = (table.coefficients[:, 4] != 0).tolist()
    coefficients = table.coefficients.to(x.device, torch.float32)
    rows = coefficients if threshold is None else _on_x0(table).to(x.device, torch.float32)
    timesteps = table.timesteps.to(x.device)
    copy_dtype = None if model_dtype in (None, x.dtype) else model_dtype
    x_model = x if copy_dtype is None else x.to(copy_dtype)
    x0 = None
    for i, asked in enumerate(asks):
        output = x
        if asked:
            # timesteps[step] would read the step back to the host.
            output = predict(x_model, timesteps.index_select(0, key.step.view(1)).expand(x.shape[0]))
            if threshold is not None:
                output = _thresholded(x, output, coefficients.index_select(0, key.step.view(1))[0], threshold)
        x, x0, x_model = ops.reverse_step(
            *(x, output, rows, key.step, key),
            x0_previous=x0 if looks_back[i] else None,
            return_x0=any(looks_back[i + 1 : i + 2]),
            model_dtype=copy_dtype if paste is None else None,
        )
        if paste is not None:
            x = paste(i, x)
            x_model = x if copy_dtype is None else x.to(copy_dtype)
        elif copy_dtype is None:
            x_model = x
        key.step.add_(1)
        yield x


def _on_x0(table: SamplerTable) -> Tensor:
    """The table's coefficients for an "output" that is the predicted x_0, to be taken as it is."""
    coefficients = table.coefficients.clone()
    asks = (coefficients[:, :2] != 0).any(dim=1)
    coefficients[:, 0], coefficients[:, 1], coefficients[:, 6] = 0.0, asks.to(coefficients.dtype), torch.inf
    return coefficients


def _thresholded(x: Tensor, output: Tensor, row: Tensor, quantile: float) -> Tensor:
    """The predicted x_0 in its range, followed by the channels that set the variance if there are any."""
    prediction, variance = output[:, : x.shape[1]], output[:, x.shape[1] :]
    x0 = dynamic_threshold(row[0] * x + row[1] * prediction, quantile)
    return torch.cat([x0, variance], dim=1) if variance.shape[1] else x0


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

    @torch.inference_mode()
    def draw(
        self,
        start: Callable[[NoiseKey, slice], tuple[Tensor, Paste | None]],
        table: SamplerTable | None = None,
        same_noise: bool = False,
    ) -> Tensor:
        """Run the table (None: the sampler's) from start(key, part), batch by batch: fp32 [n, *shape] on the device.

        start gives the state x of the samples number part.start .. part.stop - 1 and what reverse_chain pastes, or
        None; the key names those samples, in Stream.INITIAL, and its step is the loop's own. same_noise: all samples
        draw the noise of the first.
        """
        table = table or self.table
        batches = [torch.empty((0, *self.shape), device=self.device)]
        with evaluating(self.model):
            for first in range(0, self.n, self.batch_size):
                part = slice(first, min(first + self.batch_size, self.n))
                ids = self.key.sample_id[part]
                if same_noise:
                    ids = self.key.sample_id[:1].repeat(len(ids))
                key = replace(self.key, sample_id=ids, step=torch.zeros_like(self.key.step), stream=Stream.INITIAL)
                labels = None if self.labels is None else self.labels[part].to(self.device)
                predict = predictor(self.model, labels, learned=self.diffusion.objective.learned, **self.guidance)
                x, paste = start(key, part)
                x = x.contiguous(memory_format=self.memory_format)
                chain = reverse_chain(
                    *(predict, table, x, replace(key, stream=Stream.REVERSE)),
                    **{"model_dtype": self.model_dtype, "threshold": self.threshold, "paste": paste},
                )
                for i, x in enumerate(chain):
                    if self.on_step is not None:
                        self.on_step(first, i, x)
                batches.append(x)
        return torch.cat(batches)

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
    Raises InputError, before anything is drawn, for n < 0, batch_size < 1, labels, a shape or an output that do not fit
    the model, and where make_table, check_guidance, check_threshold and NoiseKey.of do; a network of one's own shows an
    output that does not fit at the first step.
    """
    run = Run(
        *(model, diffusion, n),
        **{"sampler": sampler, "steps": steps, "spacing": spacing, "eta": eta, "clip": clip},
        **{"guidance": guidance, "guidance_rescale": guidance_rescale, "dynamic_threshold": dynamic_threshold},
        **{"null_label": null_label, "seed": seed, "first_sample_id": first_sample_id, "labels": labels},
        **{"batch_size": batch_size, "shape": shape, "on_step": on_step},
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
