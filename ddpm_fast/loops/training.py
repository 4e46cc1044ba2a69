"""Training a model: Ho et al. 2020, alg. 1, with what makes it work in practice (average of the weights, warm-up,
clipping of the gradient) and with checkpoints from which a run resumes bit for bit.

Everything random in training step k is a function of (seed, k): which images, which timesteps, which noise, which
labels are dropped, which activations are dropped. There is no generator state to save, so a resumed run equals an
uninterrupted one. (Importance sampling also uses the losses so far; those are saved.)
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

from ddpm_fast.data import Dataset, Examples
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.files.checkpoint import LoadedModel
from ddpm_fast.loops import graphs
from ddpm_fast.loops.compiled import check_compiler, compiled
from ddpm_fast.loops.fine_tuning import Start, starting_weights
from ddpm_fast.loops.loss_scale import LossScale, Unscaled
from ddpm_fast.loops.metrics import NonFiniteLoss
from ddpm_fast.loops.parts import part
from ddpm_fast.loops.timesteps import TIMESTEP_SAMPLINGS
from ddpm_fast.loops.training_state import check_network, check_tensors, machine, read_state
from ddpm_fast.loops.working_weights import WorkingWeights, copies_pay
from ddpm_fast.nn import EMA, UNet, UNetConfig
from ddpm_fast.nn.block import lay_out
from ddpm_fast.noise import NoiseKey, Stream
from ddpm_fast.ops import LabelDrop

KEEP_CHECKPOINTS = 2
MODEL_NAME = "model.safetensors"
# What the network computes in, by the name of the precision; None is the weights' own dtype.
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_GOLDEN = 0x9E3779B97F4A7C15  # spreads the dropout seeds of consecutive training steps


@dataclass(frozen=True)
class TrainConfig:
    """What determines the trained weights, apart from the data, the network and the diffusion.

    Attributes:
        batch_size: Images in a training step.
        lr: Learning rate after the warm-up.
        warmup: Training steps over which the learning rate rises linearly.
        weight_decay: AdamW's weight decay.
        grad_clip: Largest gradient norm. A longer gradient is scaled down to it.
        ema_decay: Decay of the averaged weights, after its own warm-up.
        label_drop: Share of the labels that are replaced by the null class, so that the model can be guided.
        flip: Whether half of the images are mirrored left-right.
        timestep_sampling: "uniform", "stratified" or "loss_second_moment"; see timesteps.py.
        seed: Seed of everything random.
        precision: "fp32", or "bf16" or "fp16": forward and backward under autocast, with weights and optimiser in fp32.
            In fp16 the loss is scaled (loss_scale.py), and a training step whose gradient overflows changes nothing but
            the scale.

    Raises:
        InputError: For a value that is out of range or unknown.
    """

    batch_size: int = 64
    lr: float = 2e-4
    warmup: int = 500
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    label_drop: float = 0.1
    flip: bool = False
    timestep_sampling: str = "uniform"
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
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
        if self.precision not in AUTOCAST:
            raise InputError(f"precision is {self.precision!r}; expected one of {', '.join(AUTOCAST)}")


class Trainer:
    """A network, the average of its weights, its optimiser, its timestep sampler, and the training step they have
    reached.

    The arithmetic of a training step is one function of tensors that stay where they are, the number of the step among
    them, so nothing waits for the device.

    Attributes:
        model: The network.
        ema: The average of its weights.
        optimizer: AdamW.
        timestep_sampler: See timesteps.py.
        loss_scale: See loss_scale.py.
        step: How many training steps have been taken.
        history: What was changed in the course of the run, one entry for each time: {"step": the steps taken by then,
            the name of what was changed: [before, since then]}.
    """

    def __init__(
        self,
        network: UNetConfig,
        diffusion: GaussianDiffusion,
        config: TrainConfig,
        dataset: Dataset,
        device: torch.device,
        cuda_graph: bool | None = None,
        compile: bool = False,
    ):
        """Start from new weights.

        Args:
            network: The network to build.
            diffusion: The diffusion to train it for.
            config: How to train it.
            dataset: The images.
            device: Where to train.
            cuda_graph: Whether a training step is replayed from a CUDA graph, with the same weights bit for bit. None:
                from the third step on, wherever that is possible (where it is not, the logger "ddpm_fast.graphs" says
                why). True: where it is not possible, raise InputError. False: never.
            compile: Whether the network is called through torch.compile, which gives the same weights to rounding, at
                the price of up to some minutes before the first step.

        Raises:
            InputError: If the dataset does not fit the network (size, channels, classes), or the network's output the
                diffusion's variance, or if torch.compile was asked for and does not work here.
        """
        _check_fit(network, diffusion, dataset)
        if compile:
            check_compiler(device)
        self.config, self.diffusion, self.dataset, self.device = config, diffusion, dataset, device
        torch.manual_seed(config.seed)
        self.model = UNet(network).to(device)
        self._network: Callable[..., Tensor] = compiled(self.model) if compile else self.model
        self._working: WorkingWeights | None = None
        if copies_pay(device):
            lay_out(self.model)
            dtype = AUTOCAST[config.precision]
            if dtype is not None and not compile:  # what is compiled casts within its own kernels
                self._network = self._working = WorkingWeights(self.model, dtype)
        self.ema = EMA(self.model, config.ema_decay)
        self.lr = torch.zeros((), device=device)  # on the device, where a graph reads it
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.lr,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.999),
            fused=True,
            capturable=device.type == "cuda",  # costs time in AdamW's foreach form, but not in its fused one
        )
        self.timesteps = diffusion.schedule.timesteps.to(device)
        self.timestep_sampler = TIMESTEP_SAMPLINGS[config.timestep_sampling](diffusion.num_timesteps, device)
        self.loss_scale = LossScale(device) if config.precision == "fp16" else Unscaled()
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._first_example = 0  # the number of the training example that step 0 would have begun with
        self._step = torch.zeros((), dtype=torch.int64, device=device)  # the same number, where the arithmetic is
        # That of the training step that comes next: its sample ids, the numbers of its examples, advance in place.
        self._key = dataclasses.replace(
            NoiseKey.of(config.seed, config.batch_size, stream=Stream.TRAINING, device=device)
        )
        self._examples = Examples(dataset, config.seed, config.flip)
        self._images = torch.empty((config.batch_size, *dataset.shape), dtype=dataset.dtype, device=device)
        self._labels = torch.empty(config.batch_size, dtype=torch.int64, device=device) if network.num_classes else None
        self._metrics = torch.empty(2, device=device)
        self._before_update: Callable[[], object] = lambda: None
        self.cuda_graph = cuda_graph
        self._advance = self._repeated()

    def _repeated(self) -> Callable[[Callable[[], None]], None]:
        """What calls _compute at each training step: a graph that replays it, or Python itself."""
        if self.cuda_graph is not False:
            reason = graphs.cannot_capture(self.device)
            if not reason:
                return partial(graphs.Repeated(graphs.Pool(self.device)), asked=self.cuda_graph)
            graphs.refuse(reason, self.cuda_graph)
        return lambda run: run()

    def train_step(self, before_update: Callable[[], object] = lambda: None) -> tuple[Tensor, Tensor]:
        """Take one training step on the next batch, without waiting for the device.

        Args:
            before_update: Called when the gradient is there and nothing has been updated yet. An exception before that,
                or from it, leaves everything as it was before the step. A graph that is replayed does not call it.

        Returns:
            The loss and the gradient norm, scalars on the device. The loss is an unbiased estimate of its mean over all
            timesteps, however these are drawn.
        """
        with part("load"):
            self._load_batch()
        # For dropout. A graph reads the generator's seed when it is replayed, not when it is captured (PyTorch's
        # CUDAGeneratorImpl.h, "CUDA Graph-safe RNG states").
        torch.manual_seed((self.config.seed * _GOLDEN + self.step) % 2**63)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        # By the host, in one launch: computed on the device it takes six.
        self.lr.fill_(self.config.lr * min(1.0, (self.step + 1) / max(1, self.config.warmup)))
        self.model.train()
        self._before_update = before_update
        self._advance(self._compute)
        self.step += 1
        loss, norm = self._metrics.clone().unbind()  # the next step writes to the same place
        return loss, norm

    def _load_batch(self) -> None:
        """Copy the images and labels of the next training step to where the device reads them."""
        size = self.config.batch_size
        first = self._first_example + self.step * size  # examples are numbered from the start of training
        images, labels = self._examples.take(first, size, [first + size])
        for batch, place in ((images, self._images), (labels, self._labels)):
            if place is None or batch is None:
                continue
            # A copy from pinned memory does not wait. PyTorch reuses that memory only after the copy is done.
            place.copy_(batch.pin_memory() if place.device.type == "cuda" else batch, non_blocking=True)

    def _compute(self) -> None:
        """The arithmetic of training step number self._step, on the batch that was loaded: nothing that the host
        does."""
        config, images, key = self.config, self._images, self._key
        labels = None
        if self._labels is not None:
            labels = LabelDrop(self._labels, config.label_drop, self.model.config.num_classes)
        with part("draw"):
            draws = dataclasses.replace(key, stream=Stream.TIMESTEP)
            t, weights, network_t, labels_kept = self.timestep_sampler.sample(draws, self.timesteps, labels)
            x_t = self.diffusion.q_sample(images, t, key)
        with part("forward"), self._autocast():
            if self._working is not None:  # here, because the weights may also have been changed from outside
                self._working.refresh()
            output = self._network(x_t, network_t, labels_kept)
        with part("loss"):
            losses = self.diffusion.training_losses(output, images, t, key)
            loss = (weights * losses).mean()
        # To None and not to zeros, so that a graph keeps the gradients in its own memory, where the next step
        # overwrites them.
        self.optimizer.zero_grad(set_to_none=True)
        with part("backward"):
            self.loss_scale.backward(loss)
            if self._working is not None:
                self._working.take_gradients()
            gradient = self.loss_scale.clip(self.model.parameters(), config.grad_clip)
        self._before_update()
        self.timestep_sampler.update(t, losses.detach())
        with part("update"):
            self.loss_scale.step(self.optimizer, gradient)
        with part("average"):
            self.ema.update(self._step, gradient.overflowed)
        torch.stack([loss.detach(), gradient.norm], out=self._metrics)
        self._step.add_(1)
        key.sample_id.add_(config.batch_size)

    def _autocast(self) -> torch.autocast:
        """The context in which the network runs in the precision that was asked for."""
        dtype = AUTOCAST[self.config.precision]
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def start_from(self, loaded: LoadedModel) -> Start:
        """Begin with the weights of a model, before the first step. The average begins with the same ones.

        The model's config must be the network's, but for the classes: those that the model has, by name, keep what it
        has learned of them. The history says which model it was.

        Args:
            loaded: The model.

        Returns:
            What became of the classes.

        Raises:
            InputError: If steps have been taken already, or the network has another shape than the model.
        """
        if self.step:
            raise InputError(f"{self.step} steps have been taken already; start from a model before the first one")
        start = starting_weights(loaded, self.model, self.dataset.label_names)
        self.model.load_state_dict(start.weights)
        self.ema.load_state_dict(dict(self.model.named_parameters()))
        before = f"{loaded.path.name}, SHA-256 {loaded.digest}"
        self.history.append({"step": 0, "weights": ["random", before]})
        return start

    def averaged_model(self) -> UNet:
        """A copy of the network with the averaged weights, for sampling."""
        with torch.random.fork_rng(devices=[]):
            model = UNet(self.model.config).to(self.device)
        self.ema.copy_to(model)
        return model.eval()

    def model_config(self) -> dict[str, Any]:
        """What a model file says about its model."""
        training = {
            **dataclasses.asdict(self.config),
            "data": self.dataset.name,
            "count": len(self.dataset),
            "digest": self.dataset.digest,
            "steps": self.step,
        }
        value_range = self.dataset.value_range
        return {
            "unet": self.model.config.to_dict(),
            "diffusion": self.diffusion.to_dict(),
            "label_names": self.dataset.label_names,
            "training": training | ({"history": self.history} if self.history else {}),
            **({} if value_range is None else {"value_range": value_range.to_dict()}),
        }

    def save(self, folder: Path, arguments: dict[str, Any]) -> Path:
        """Write a training state, and the averaged weights as model.safetensors. Then remove all but the newest states.

        Args:
            folder: Where to write them.
            arguments: Kept in the training state, for resuming.

        Returns:
            The path of the training state.

        Raises:
            NonFiniteLoss: If a weight is not finite; nothing is written.
            InputError: If they cannot be written.
        """
        self._check_weights()
        optimizer = checkpoint.optimizer_to_tensors(self.optimizer, self.model.named_parameters())
        tensors = checkpoint.add_prefix("model.", self.model.state_dict())
        tensors |= checkpoint.add_prefix("ema.", self.ema.state_dict())
        tensors |= checkpoint.add_prefix("optim.", optimizer)
        tensors |= checkpoint.add_prefix("timesteps.", self.timestep_sampler.state_dict())
        tensors |= checkpoint.add_prefix("loss_scale.", self.loss_scale.state_dict())
        path = checkpoint.checkpoint_path(folder, self.step)
        meta = {
            "step": self.step,
            "examples": self._first_example + self.step * self.config.batch_size,
            "arguments": arguments,
            "machine": machine(self.device),
            **self.model_config(),
        }
        checkpoint.save_training(path, tensors, meta)
        self._save_model(folder)
        checkpoint.prune_checkpoints(folder, KEEP_CHECKPOINTS)
        return path

    def _check_weights(self) -> None:
        """Raises NonFiniteLoss if a weight, or the average of one, is not finite."""
        for name, tensor in (*self.model.named_parameters(), *self.ema.state_dict().items()):
            if not tensor.isfinite().all():
                raise NonFiniteLoss(f"step {self.step} gave weights that are not finite ({name}).", self.step)

    def _save_model(self, folder: Path) -> None:
        checkpoint.save_model(folder / MODEL_NAME, self.ema.state_dict(), self.model_config())

    def complete(self, folder: Path) -> bool:
        """Finish what a process that was killed after it had written the training state of this step left undone.

        It may have left no model.safetensors or that of another step, unfinished files, and states that are too old.

        Returns:
            Whether model.safetensors was written.

        Raises:
            InputError: If it cannot be written.
        """
        try:
            found, config = checkpoint.read_model(folder / MODEL_NAME)
        except InputError:
            found, config = {}, {}
        averages = self.ema.state_dict()
        same = found.keys() == averages.keys() and all(
            torch.equal(found[name], average.detach().to("cpu", found[name].dtype))
            for name, average in averages.items()
        )
        same = same and config["training"]["steps"] == self.step
        if not same:
            self._save_model(folder)
        checkpoint.prune_checkpoints(folder, KEEP_CHECKPOINTS)
        return not same

    def load(self, path: Path) -> None:
        """Continue from a training state.

        Raises:
            InputError: If it is damaged, or was saved with another network or another timestep sampling.
        """
        tensors, meta = read_state(path)
        check_network(path, meta, self.model.config)
        for prefix, own in (("model.", self.model.state_dict()), ("ema.", self.ema.state_dict())):
            check_tensors(path, checkpoint.take_prefix(prefix, tensors), own)
        self.timestep_sampler.load_state_dict(checkpoint.take_prefix("timesteps.", tensors))
        self.loss_scale.load_state_dict(checkpoint.take_prefix("loss_scale.", tensors))
        self.model.load_state_dict(checkpoint.take_prefix("model.", tensors))
        self.ema.load_state_dict(checkpoint.take_prefix("ema.", tensors))
        checkpoint.load_optimizer_tensors(
            self.optimizer, self.model.named_parameters(), checkpoint.take_prefix("optim.", tensors)
        )
        self.step = meta["step"]
        self.history = meta["training"].get("history", [])
        # With another batch size the examples go on where they were.
        seen = meta.get("examples", self.step * meta["training"]["batch_size"])
        self._first_example = seen - self.step * self.config.batch_size
        self._step.fill_(self.step)
        torch.arange(seen, seen + self.config.batch_size, out=self._key.sample_id)
        self._advance = self._repeated()  # a new graph, because the optimiser's state is in new tensors


def _check_fit(network: UNetConfig, diffusion: GaussianDiffusion, dataset: Dataset) -> None:
    """Raises InputError if the dataset does not fit the network, or the network's output the diffusion's variance."""
    channels, height, width = dataset.shape
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
