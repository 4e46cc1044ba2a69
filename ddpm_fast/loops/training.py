"""Training a model: Ho et al. 2020, alg. 1, with what makes it work in practice (EMA, warm-up, clipping) and survive
(atomic checkpoints that resume bit for bit, a stop at the first non-finite loss).

Everything random in step k is a function of (seed, k): which images, which timesteps, which noise, which labels are
dropped, which activations. There is no generator state to save, so a resumed run is the uninterrupted one. (Importance
sampling chooses timesteps by the losses so far as well; those are saved.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.data import Dataset, batch_indices, flip_mask
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.loops import graphs
from ddpm_fast.loops.timesteps import TIMESTEP_SAMPLINGS
from ddpm_fast.nn import EMA, UNet, UNetConfig
from ddpm_fast.noise import NoiseKey, Stream, uniform_integers

KEEP_CHECKPOINTS = 2
_GOLDEN = 0x9E3779B97F4A7C15  # spreads consecutive steps over the dropout seeds


@dataclass(frozen=True)
class TrainConfig:
    """What determines the trained weights, beside the data, the network and the diffusion."""

    batch_size: int = 64
    lr: float = 2e-4
    warmup: int = 500  # steps over which the learning rate rises linearly
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # largest norm of the gradient
    ema_decay: float = 0.9999
    label_drop: float = 0.1  # share of labels replaced by the null class, for guidance
    flip: bool = False
    timestep_sampling: str = "uniform"  # or "stratified", "loss_second_moment": see ddpm_fast.timesteps
    seed: int = 0
    precision: str = "fp32"  # "bf16": forward and backward under autocast; weights and optimiser stay fp32

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("warmup", 0), ("weight_decay", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least {least}")
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}; expected a positive number")
        if not 0 <= self.label_drop <= 1:
            raise InputError(f"label_drop is {self.label_drop}; expected a share in [0, 1]")
        if self.timestep_sampling not in TIMESTEP_SAMPLINGS:
            raise InputError(
                f"timestep_sampling is {self.timestep_sampling!r}; expected one of {', '.join(TIMESTEP_SAMPLINGS)}"
            )
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"precision is {self.precision!r}; expected fp32 or bf16")


class NonFiniteLoss(RuntimeError):
    """The loss stopped being a number. The message names the step and the checkpoint that remains."""


class Trainer:
    """A network, its average, its optimiser, what it knows of its timesteps, and the step they have reached.

    A step's arithmetic is one function of tensors that stay where they are, the number of the step among them, so that
    nothing waits for the device. cuda_graph: whether that function is replayed from a CUDA graph, with the same weights
    bit for bit. None: where that can be done, from the third step on, and otherwise quietly not (the logger
    "ddpm_fast.graphs" says why); True: InputError says why not; False: never.
    Raises InputError if the dataset does not fit the network (size, channels, classes), or the network's output the
    diffusion's variance.
    """

    def __init__(
        self,
        network: UNetConfig,
        diffusion: GaussianDiffusion,
        config: TrainConfig,
        dataset: Dataset,
        device: torch.device,
        cuda_graph: bool | None = None,
    ):
        channels, height, width = dataset.images.shape[1:]
        if (channels, height, width) != (network.in_channels, network.image_size, network.image_size):
            raise InputError(
                f"{dataset.name} has images of shape {channels}x{height}x{width} and the network takes "
                f"{network.in_channels}x{network.image_size}x{network.image_size}: give --image-size and --channels"
            )
        if network.num_classes and dataset.num_classes != network.num_classes:
            raise InputError(
                f"{dataset.name} has {dataset.num_classes or 'no'} classes and the network {network.num_classes}"
            )
        if network.learned_variance != diffusion.objective.learned:
            raise InputError(
                f"the diffusion's variance is {diffusion.objective.variance!r} and the network's learned_variance "
                f"{network.learned_variance}: make the network with UNetConfig(learned_variance="
                f"{diffusion.objective.learned}, ...), or choose another variance"
            )
        self.config, self.diffusion, self.dataset, self.device = config, diffusion, dataset, device
        torch.manual_seed(config.seed)
        self.model = UNet(network).to(device)
        self.ema = EMA(self.model, config.ema_decay)
        # On the device, where it is computed from the step. capturable has a price for foreach AdamW, none for fused.
        self.lr = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            **{"lr": self.lr, "weight_decay": config.weight_decay, "betas": (0.9, 0.999)},
            **{"fused": True, "capturable": device.type == "cuda"},
        )
        self.timesteps = diffusion.schedule.timesteps.to(device)
        self.timestep_sampler = TIMESTEP_SAMPLINGS[config.timestep_sampling](diffusion.num_timesteps, device)
        self.step = 0
        self._step = torch.zeros((), dtype=torch.int64, device=device)  # the same number, where the arithmetic is
        self._key = NoiseKey.of(config.seed, config.batch_size, stream=Stream.TRAINING, device=device)
        pixels = dataset.images
        self._images = torch.empty((config.batch_size, *pixels.shape[1:]), dtype=pixels.dtype, device=device)
        self._labels = torch.empty(config.batch_size, dtype=torch.int64, device=device) if network.num_classes else None
        self._metrics = torch.empty(2, device=device)
        self.cuda_graph = cuda_graph
        self._advance = self._repeated()

    def _repeated(self) -> Callable[[Callable[[], None]], None]:
        """What calls _compute at each step: from a graph, or as it is."""
        if self.cuda_graph is not False:
            reason = graphs.cannot_capture(self.device)
            if not reason:
                return partial(graphs.Repeated(graphs.Pool(self.device)), asked=self.cuda_graph)
            graphs.refuse(reason, self.cuda_graph)
        return lambda run: run()

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One step on the next batch. Returns the loss and the gradient's norm, as tensors on the device.

        The loss is an unbiased estimate of its mean over all timesteps, however they are drawn. Nothing waits for the
        device: whoever wants the numbers reads them when it suits.
        """
        self._load_batch()
        # Dropout. The generator's seed is read when a graph is replayed, not when it is captured (PyTorch's
        # CUDAGeneratorImpl.h, "CUDA Graph-safe RNG states").
        torch.manual_seed((self.config.seed * _GOLDEN + self.step) % 2**63)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.model.train()
        self._advance(self._compute)
        self.step += 1
        loss, norm = self._metrics.clone().unbind()  # the next step writes to the same place
        return loss, norm

    def _load_batch(self) -> None:
        """The images and labels of the next step, to where the device reads them."""
        config, size = self.config, self.config.batch_size
        first = self.step * size  # examples are numbered from the start of training
        images, labels = self.dataset.batch(batch_indices(config.seed, first, size, len(self.dataset)))
        if config.flip:
            mirrored = flip_mask(config.seed, first, size)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        for batch, place in ((images, self._images), (labels, self._labels)):
            if place is None:
                continue
            # From pinned memory a copy does not wait; PyTorch reuses that memory when the copy is done, and not before.
            place.copy_(batch.pin_memory() if place.device.type == "cuda" else batch, non_blocking=True)

    def _compute(self) -> None:
        """Step number self._step on the batch that is there: all of its arithmetic, and nothing of the host's."""
        config, images, labels = self.config, self._images, self._labels
        key = dataclasses.replace(self._key, sample_id=self._key.sample_id + self._step * config.batch_size)
        t, weights = self.timestep_sampler.sample(dataclasses.replace(key, stream=Stream.TIMESTEP))
        if labels is not None:
            dice = uniform_integers(dataclasses.replace(key, stream=Stream.LABEL), 2**24)
            dropped = dice < round(config.label_drop * 2**24)
            labels = labels.masked_fill(dropped, self.model.config.num_classes)

        warmed_up = ((self._step + 1).double() / max(1, config.warmup)).clamp(max=1.0)
        self.lr.copy_(config.lr * warmed_up)
        x_t = self.diffusion.q_sample(images, t, key)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            output = self.model(x_t, self.timesteps[t], labels)
        losses = self.diffusion.training_losses(output, images, t, key)
        self.timestep_sampler.update(t, losses.detach())
        loss = (weights * losses).mean()
        # None, not zeros: in a graph the gradients then lie in its own memory, where the next step overwrites them.
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.ema.update(self._step)
        torch.stack([loss.detach(), norm], out=self._metrics)
        self._step.add_(1)

    def averaged_model(self) -> UNet:
        """A copy of the network with the averaged weights, for sampling."""
        with torch.random.fork_rng(devices=[]):
            model = UNet(self.model.config).to(self.device)
        self.ema.copy_to(model)
        return model.eval()

    def model_config(self, **training: Any) -> dict[str, Any]:
        """The config that a model file carries."""
        return {
            "unet": self.model.config.to_dict(),
            "diffusion": self.diffusion.to_dict(),
            "label_names": self.dataset.label_names,
            "training": {**dataclasses.asdict(self.config), "data": self.dataset.name, "steps": self.step, **training},
        }

    def save(self, folder: Path, arguments: dict[str, Any]) -> Path:
        """Write the training state, and the averaged weights as model.safetensors, then remove all but the newest
        states. `arguments` are kept for resuming."""
        tensors = {
            **checkpoint.add_prefix("model.", self.model.state_dict()),
            **checkpoint.add_prefix("ema.", self.ema.state_dict()),
            **checkpoint.add_prefix(
                "optim.", checkpoint.optimizer_to_tensors(self.optimizer, self.model.named_parameters())
            ),
            **checkpoint.add_prefix("timesteps.", self.timestep_sampler.state_dict()),
        }
        path = checkpoint.checkpoint_path(folder, self.step)
        checkpoint.save_training(path, tensors, {"step": self.step, "arguments": arguments, **self.model_config()})
        checkpoint.save_model(folder / "model.safetensors", self.ema.state_dict(), self.model_config())
        checkpoint.prune_checkpoints(folder, KEEP_CHECKPOINTS)
        return path

    def load(self, path: Path) -> None:
        """Continue from a training state. Raises InputError if it is damaged, of another network, or of another way of
        drawing timesteps."""
        tensors, meta = checkpoint.read_training(path)
        if meta["unet"] != self.model.config.to_dict():
            raise InputError(
                f"{path} is of another network than this run's: resume with the arguments it was started with"
            )
        self.timestep_sampler.load_state_dict(checkpoint.take_prefix("timesteps.", tensors))
        self.model.load_state_dict(checkpoint.take_prefix("model.", tensors))
        self.ema.load_state_dict(checkpoint.take_prefix("ema.", tensors))
        checkpoint.load_optimizer_tensors(
            self.optimizer, self.model.named_parameters(), checkpoint.take_prefix("optim.", tensors)
        )
        self.step = meta["step"]
        self._step.fill_(self.step)
        self._advance = self._repeated()  # the optimiser's state is in new tensors
