"""The arithmetic of a training step, on one device or on several: Ho et al. 2020, alg. 1, with what makes it work in
practice (average of the weights, warm-up, clipping of the gradient).

Everything random in it is a function of the seed and of the numbers of the training examples: which images, which
timesteps, which noise, which labels are dropped, which activations are dropped. So a batch may be divided into
micro-batches, and these among processes, without another result than the order of sums gives (summing.py).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ddpm_fast.data import Examples, ImageSet
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.loops import distributed, graphs
from ddpm_fast.loops.compiled import check_compiler, compiled
from ddpm_fast.loops.loss_scale import LossScale, Unscaled
from ddpm_fast.loops.metrics import by_quarter, quarters_of, send
from ddpm_fast.loops.parts import part
from ddpm_fast.loops.summing import Flat, Overlapped, Share
from ddpm_fast.loops.timesteps import TIMESTEP_SAMPLINGS
from ddpm_fast.loops.train_config import AUTOCAST, TrainConfig
from ddpm_fast.loops.working_weights import WorkingWeights, copies_pay
from ddpm_fast.nn import EMA, PowerAverage, UNet, UNetConfig
from ddpm_fast.nn.block import lay_out
from ddpm_fast.noise import NoiseKey, Stream
from ddpm_fast.ops import LabelDrop

_AHEAD = 4  # micro-batches whose images are read before they are needed
# They spread the dropout seeds of training steps, and of the micro-batches of one.
_GOLDEN, _SILVER = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95


class TrainingStep:
    """A network, the average of its weights, its optimiser, its timestep sampler, and the training step they have
    reached.

    The arithmetic of a training step is functions of tensors that stay where they are, the number of the step among
    them, so nothing waits for the device.

    Attributes:
        model: The network.
        ema: The average of its weights.
        averages: Their power-function averages, by width.
        optimizer: AdamW.
        timestep_sampler: See timesteps.py.
        loss_scale: See loss_scale.py.
        step: How many training steps have been taken.
        wants_stop: Set it, at any moment, to end the training: in one process, and all stop after the same step.
        stopping: Whether the training is to end: the same in all processes after each training step.
        quarters: What the losses of the last training step add up to in each quarter of t; see metrics.by_quarter.
    """

    quarters: Tensor

    def __init__(
        self,
        network: UNetConfig,
        diffusion: GaussianDiffusion,
        config: TrainConfig,
        dataset: ImageSet,
        device: torch.device | str = "auto",
        cuda_graph: bool | None = None,
        compile: bool = False,
        grad_checkpoint: bool = False,
    ):
        """See Trainer, which checks that these fit."""
        self._share = Share.of(config)
        device = distributed.local_device(device) if isinstance(device, str) else device
        if compile:
            check_compiler(device)
        self.config, self.diffusion, self.dataset, self.device = config, diffusion, dataset, device
        self.cuda_graph = cuda_graph
        self.step, self.wants_stop, self.stopping = 0, False, False
        torch.manual_seed(config.seed)
        self.model = UNet(network).to(device)
        self.model.recompute = grad_checkpoint
        self._sums = self._prepare_network(compile)
        self.ema = EMA(self.model, config.ema_decay)
        self.averages = {width: PowerAverage(self.model, width) for width in config.average_widths}
        self.lr = torch.zeros((), device=device)  # on the device, where a graph reads it
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.lr,
            weight_decay=config.weight_decay,
            betas=config.betas,
            fused=True,
            capturable=device.type == "cuda",  # costs time in AdamW's foreach form, but not in its fused one
        )
        self.timesteps = diffusion.schedule.timesteps.to(device)
        self.timestep_sampler = TIMESTEP_SAMPLINGS[config.timestep_sampling](
            diffusion.num_timesteps, device, config.batch_size
        )
        self.loss_scale = LossScale(device) if config.precision == "fp16" else Unscaled()
        self._prepare_batch()
        self._before_update: Callable[[], object] = lambda: None
        self._advance = self._repeated()

    def _prepare_network(self, compile: bool) -> Flat | Overlapped | None:
        """Make what is called in place of the network, and what adds up gradients if there are several to add."""
        call: Callable[..., Tensor] = compiled(self.model) if compile else self.model
        self._working: WorkingWeights | None = None
        share, learns = self._share, TIMESTEP_SAMPLINGS[self.config.timestep_sampling].learns
        is_repeated = self.cuda_graph is not False and not graphs.cannot_capture(self.device)
        overlaps = distributed.world_size() > 1 and not is_repeated
        if copies_pay(self.device):
            lay_out(self.model)
            dtype = AUTOCAST[self.config.precision]
            # What is compiled casts within its own kernels, and gradients are only overlapped where they are the
            # parameters' own.
            if dtype is not None and not compile and not overlaps:
                call = self._working = WorkingWeights(self.model, dtype)
        self._network = call
        if overlaps:
            overlapped = Overlapped(self.model, call, share, learns)
            self._network = overlapped.network
            return overlapped
        return Flat(list(self.model.parameters()), share, learns) if share.total > 1 else None

    def _prepare_batch(self) -> None:
        """Make the tensors in which a micro-batch, and what identifies its noise, is given to the arithmetic."""
        config, device, size = self.config, self.device, self._share.size
        self._first_example = 0  # the number of the training example that step 0 would have begun with
        self._step = torch.zeros((), dtype=torch.int64, device=device)  # the training step, where the arithmetic is
        self._places = torch.arange(size, device=device)
        # Its sample ids are the numbers of the training examples.
        self._key = dataclasses.replace(NoiseKey.of(config.seed, size, stream=Stream.TRAINING, device=device))
        self._examples = self._make_examples()
        self._images = torch.empty((size, *self.dataset.shape), dtype=self.dataset.dtype, device=device)
        classes = self.model.config.num_classes
        self._labels = torch.empty(size, dtype=torch.int64, device=device) if classes else None
        told = self.model.config.augment_channels
        self._told = torch.zeros(size, told, device=device) if told else None
        self._metrics = torch.empty(10, device=device)  # the loss, the gradient norm, and the sums by quarter of t
        self._quarters_of = quarters_of(self.diffusion.num_timesteps, device)
        self._stop_flags: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._late_flags = 1 if device.type == "cuda" else 0  # how many training steps later they are read

    def _make_examples(self) -> Examples:
        config = self.config
        return Examples(self.dataset, config.seed, config.flip, config.order, config.crop, config.augmentation)

    @property
    def waited(self) -> float:
        """The seconds that training steps have waited for images so far, in this process."""
        return self._examples.waited

    def _repeated(self) -> list[Callable[[Callable[[], None]], None]]:
        """What calls each part of a training step: graphs that replay them, or Python itself.

        The parts are the first micro-batch, the others, and the update; or, if there is one micro-batch, the whole.
        """
        parts = 3 if self._sums is not None else 1
        if self.cuda_graph is not False:
            reason = graphs.cannot_capture(self.device)
            if not reason:
                pool = graphs.Pool(self.device)
                return [partial(graphs.Repeated(pool), asked=self.cuda_graph) for _ in range(parts)]
            graphs.refuse(reason, self.cuda_graph)
        return [lambda run: run()] * parts

    def train_step(self, before_update: Callable[[], object] = lambda: None) -> tuple[Tensor, Tensor]:
        """Take one training step on the next batch, without waiting for the device.

        Args:
            before_update: Called when the gradient is there and nothing has been updated yet. An exception before that,
                or from it, leaves everything as it was before the step. A graph that is replayed does not call it.
                Where several processes train together it must not raise, or the others wait for this one.

        Returns:
            The loss and the gradient norm of the whole batch, scalars on the device. The loss is an unbiased estimate
            of its mean over all timesteps, however these are drawn.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.lr.fill_(self.config.lr_at(self.step))  # by the host, in one launch: computed on the device it takes six
        self.model.train()
        self._before_update = before_update
        if self._sums is None:
            self._begin_micro_batch(0)
            self._advance[0](self._compute)
        else:
            self._add_up(self._sums)
        self.step += 1
        if self._sums is None or distributed.world_size() == 1:
            self.stopping |= self.wants_stop
        else:
            self._see_stop(self._sums.numbers.stop)
        numbers = self._metrics.clone()  # the next step writes to the same place
        self.quarters = numbers[2:].view(2, 4)
        return numbers[0], numbers[1]

    def _add_up(self, sums: Flat | Overlapped) -> None:
        """A training step of several micro-batches, in this process or in several."""
        first, others, update = self._advance
        sums.numbers.begin(self.wants_stop)
        for number in range(self._share.count):
            self._begin_micro_batch(number)
            with sums.computing(last=number == self._share.count - 1):
                if number == 0:
                    first(partial(self._compute_micro_batch, sums, first=True))
                else:
                    others(partial(self._compute_micro_batch, sums, first=False))
            sums.numbers.note(number)
        sums.sum()
        update(partial(self._update_summed, sums))

    def _begin_micro_batch(self, number: int) -> None:
        """Give the arithmetic the micro-batch of that number of this process's share of the batch."""
        first = self._first(self.step, number)
        with part("load"):
            self._load_batch(number)
        torch.add(self._places, first, out=self._key.sample_id)
        if self.config.dropout_version > 1:
            return
        # For dropout. A graph reads the generator's seed when it is replayed, not when it is captured (PyTorch's
        # CUDAGeneratorImpl.h, "CUDA Graph-safe RNG states").
        seed = self.config.seed * _GOLDEN + self.step + (self._share.first + number) * _SILVER
        torch.manual_seed(seed % 2**63)

    def _first(self, step: int, number: int) -> int:
        """The number of a micro-batch's first training example. They are numbered from the start of training."""
        return self._first_example + step * self.config.batch_size + (self._share.first + number) * self._share.size

    def _load_batch(self, number: int) -> None:
        """Copy the images and labels of a micro-batch, and how these are augmented, to where the device reads them."""
        count = self._share.count
        upcoming = [divmod(self.step * count + number + ahead, count) for ahead in range(1, max(count, _AHEAD) + 1)]
        first, size = self._first(self.step, number), self._share.size
        images, labels = self._examples.take(first, size, [self._first(step, which) for step, which in upcoming])
        told = self._examples.told(first, size)
        for batch, place in ((images, self._images), (labels, self._labels), (told, self._told)):
            if place is None or batch is None:
                continue
            # A copy from pinned memory does not wait. PyTorch reuses that memory only after the copy is done.
            place.copy_(batch.pin_memory() if place.device.type == "cuda" else batch, non_blocking=True)

    def _see_stop(self, wishes: Tensor) -> None:
        """Agree with the other processes on stopping. wishes: how many want to stop, on the device.

        A GPU's number is read one training step later, when it has long arrived: in all processes at the same step.
        """
        self._stop_flags.append(send(wishes))
        while len(self._stop_flags) > self._late_flags:
            number, event = self._stop_flags.popleft()
            if event is not None:
                event.synchronize()
            self.stopping |= bool(number > 0)

    def _compute(self) -> None:
        """The arithmetic of a training step of one micro-batch, which was loaded: nothing that the host does."""
        self._update(*self._propagate(first=True))

    def _compute_micro_batch(self, sums: Flat | Overlapped, first: bool) -> None:
        """The arithmetic of one micro-batch, which was loaded, of several."""
        sums.numbers.find(*self._propagate(first))
        sums.collect(first)

    def _update_summed(self, sums: Flat | Overlapped) -> None:
        sums.hand_over()
        self._update(*sums.numbers.learned_from, sums.numbers.loss, sums.numbers.quarters)

    def _propagate(self, first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Forward and backward of a micro-batch.

        Args:
            first: Whether it is the first one of this process's share of the batch, whose gradients replace those that
                are there.

        Returns:
            Its timesteps, their losses, the mean of these by their weights, and what they add up to in each quarter of
            t.
        """
        config, images, key = self.config, self._images, self._key
        labels = None
        if self._labels is not None:
            labels = LabelDrop(self._labels, config.label_drop, self.model.config.num_classes)
        with part("draw"):
            draws = dataclasses.replace(key, stream=Stream.TIMESTEP)
            t, weights, network_t, labels_kept = self.timestep_sampler.sample(draws, self.timesteps, labels)
            x_t = self.diffusion.q_sample(images, t, key)
        with part("forward"), self._autocast():
            if self._working is not None and first:  # here, because the weights may also have been changed from outside
                self._working.refresh()
            given: tuple[Tensor | None, ...] = ()
            if config.dropout_version > 1 and self.model.config.dropout:
                given = (key.seed, key.sample_id)
            if self._told is not None:
                given = (*(given or (None, None)), None, self._told)
            output = self._network(x_t, network_t, labels_kept, *given)
        with part("loss"):
            losses = self.diffusion.training_losses(output, images, t, key)
            loss = (weights * losses).mean()
            quarters = by_quarter(t, losses.detach(), weights, self._quarters_of)
        if first:
            # To None and not to zeros, so that a graph keeps the gradients in its own memory, where the next step
            # overwrites them.
            self.optimizer.zero_grad(set_to_none=True)
        with part("backward"):
            total = self._share.total
            self.loss_scale.backward(loss if total == 1 else loss / total)
            if self._working is not None:
                self._working.take_gradients()
        return t, losses.detach(), loss.detach(), quarters

    def _update(self, t: Tensor, losses: Tensor, loss: Tensor, quarters: Tensor) -> None:
        """What follows once the gradient of the whole batch is there. t, losses: of the whole batch, if the timestep
        sampler learns from them."""
        with part("update"):
            gradient = self.loss_scale.clip(self.model.parameters(), self.config.grad_clip)
            self._before_update()
            self.timestep_sampler.update(t, losses)
            self.loss_scale.step(self.optimizer, gradient)
        with part("average"):
            for average in (self.ema, *self.averages.values()):
                average.update(self._step, gradient.overflowed)
        torch.cat([loss.reshape(1), gradient.norm.reshape(1), quarters.flatten()], out=self._metrics)
        self._step.add_(1)

    def _autocast(self) -> torch.autocast:
        """The context in which the network runs in the precision that was asked for."""
        dtype = AUTOCAST[self.config.precision]
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
