"""How a model is trained: the numbers that determine its weights, apart from the data, the network and the
diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ddpm_fast.data import CROPS, ORDERS, Augmentation
from ddpm_fast.errors import InputError, check_integer, check_number
from ddpm_fast.loops.timesteps import TIMESTEP_SAMPLINGS
from ddpm_fast.nn.power_average import check_width

# What the network computes in, by the name of the precision; None is the weights' own dtype.
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DROPOUTS = (1, 2)  # versions of dropout; see TrainConfig
LONGEST_WARMUP = 500  # training steps that warmup_for gives at most


@dataclass(frozen=True)
class TrainConfig:
    """What determines the trained weights, apart from the data, the network and the diffusion.

    Attributes:
        batch_size: Images in a training step, in all processes together.
        lr: Learning rate after the warm-up.
        warmup: Training steps over which the learning rate rises linearly.
        weight_decay: AdamW's weight decay.
        grad_clip: Largest gradient norm. A longer gradient is scaled down to it.
        ema_decay: Decay of the averaged weights, after its own warm-up.
        label_drop: Share of the labels that are replaced by the null class, so that the model can be guided.
        flip: Whether half of the images are mirrored left-right.
        crop: "centre" cuts the middle out of a picture, "random" any part; see `Examples`.
        augment: How images are changed in ways that the network is told of, as `Augmentation.of` reads it, such as
            "small" or "edm:0.2". The network needs as many augment_channels as `augmentation` has. "": they are not.
        timestep_sampling: "uniform", "stratified" or "loss_second_moment"; see timesteps.py.
        seed: Seed of everything random.
        precision: "fp32", or "bf16" or "fp16": forward and backward under autocast, with weights and optimiser in fp32.
            In fp16 the loss is scaled (loss_scale.py), and a training step whose gradient overflows changes nothing but
            the scale.
        micro_batch: The most images that a process puts through the network at once, which bounds its memory; the
            gradients of several such parts are added up. None: its whole share of the batch.
        lr_schedule: The learning rate after the warm-up: "constant", "cosine" (falls to lr_least * lr at training step
            lr_steps, as half a cosine, and stays there) or "inverse_sqrt" (falls as 1 / sqrt(step)).
        lr_steps: The training step at which a cosine ends; the others need none.
        lr_least: Where a cosine ends, as a share of lr.
        betas: AdamW's two decays: of the mean gradient and of its mean square.
        order: The version of the order of the data. A run keeps the one that it began with.
        dropout_version: 1: one seed for each training step, as runs before version 2 began. 2: the mask of a training
            example depends on the seed and the example alone. A run keeps the one that it began with.
        average_widths: The widths of the power-function averages that are kept beside the average above, each with at
            most three decimals, such as (0.05, 0.1); see power_average.py. A run keeps those that it began with.

    Raises:
        InputError: For a value that is out of range or unknown.
    """

    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    label_drop: float = 0.1
    flip: bool = False
    timestep_sampling: str = "stratified"
    seed: int = 0
    precision: str = "fp32"
    micro_batch: int | None = None
    lr_schedule: str = "constant"
    lr_steps: int | None = None
    lr_least: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    order: int = 2
    dropout_version: int = 2
    crop: str = "centre"
    augment: str = ""
    average_widths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("warmup", 0), ("seed", 0)):
            check_integer(name, getattr(self, name), least)
        for name in ("lr", "grad_clip"):
            check_number(name, getattr(self, name), lambda value: 0 < value < math.inf, "a positive number")
        check_number("weight_decay", self.weight_decay, lambda value: 0 <= value < math.inf, "a number of at least 0")
        check_number("label_drop", self.label_drop, lambda share: 0 <= share <= 1, "a share in [0, 1]")
        for name, known in (
            ("timestep_sampling", TIMESTEP_SAMPLINGS),
            ("precision", AUTOCAST),
            ("lr_schedule", LR_SCHEDULES),
            ("crop", CROPS),
            ("order", ORDERS),
            ("dropout_version", DROPOUTS),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, known))}")
        if self.micro_batch is not None:
            check_integer("micro_batch", self.micro_batch, 1)
        object.__setattr__(self, "augment", str(self.augmentation or ""))
        if self.flip and "xflip" in self.augment:
            raise InputError(
                "flip mirrors images without telling the network, which makes nothing of an xflip that it is told of: "
                "leave out one of them"
            )
        self._check_schedule()
        object.__setattr__(self, "betas", _checked_betas(self.betas))
        object.__setattr__(self, "average_widths", _checked_widths(self.average_widths))

    def _check_schedule(self) -> None:
        check_number("lr_least", self.lr_least, lambda share: 0 <= share <= 1, "a share in [0, 1]")
        if self.lr_schedule != "cosine":
            return
        if self.lr_steps is None:
            raise InputError("lr_steps is not given; lr_schedule 'cosine' needs the training step at which it ends")
        check_integer("lr_steps", self.lr_steps, 1)
        if self.lr_steps <= self.warmup:
            raise InputError(
                f"lr_steps is {self.lr_steps}; expected more than the {self.warmup} training steps of the warm-up"
            )

    @property
    def augmentation(self) -> Augmentation | None:
        """What `augment` says; None for "". Its `channels` are the network's augment_channels."""
        return Augmentation.of(self.augment) if self.augment else None

    def lr_at(self, step: int) -> float:
        """The learning rate of training step number `step`, counted from 0."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * LR_SCHEDULES[self.lr_schedule](self, step + 1)


def warmup_for(steps: int) -> int:
    """The warm-up, in training steps, of a training of so many if it was told none."""
    return min(LONGEST_WARMUP, steps // 10)


def _cosine(config: TrainConfig, step: int) -> float:
    assert config.lr_steps is not None, "checked when the config was made"
    done = min(1.0, max(0.0, (step - config.warmup) / (config.lr_steps - config.warmup)))
    return config.lr_least + (1 - config.lr_least) * (1 + math.cos(math.pi * done)) / 2


def _inverse_sqrt(config: TrainConfig, step: int) -> float:
    # Vaswani et al. 2017, "Attention is all you need", eq. 3, scaled so that the warm-up ends at lr.
    reached = max(1, config.warmup)
    return math.sqrt(reached / max(reached, step))


# The factor of lr, beside the warm-up's, at the training step of that number, counted from 1.
LR_SCHEDULES: dict[str, Callable[[TrainConfig, int], float]] = {
    "constant": lambda config, step: 1.0,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
}


def _checked_betas(betas: object) -> tuple[float, float]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise InputError(f"betas is {betas!r:.200}; expected two numbers in [0, 1), such as (0.9, 0.999)")
    first, second = (
        check_number(f"betas[{i}]", beta, lambda beta: 0 <= beta < 1, "a number in [0, 1)")
        for i, beta in enumerate(betas)
    )
    return first, second


def _checked_widths(widths: object) -> tuple[float, ...]:
    if not isinstance(widths, (tuple, list)):
        raise InputError(f"average_widths is {widths!r:.200}; expected a tuple of widths, such as (0.05, 0.1)")
    checked = tuple(check_width(f"average_widths[{i}]", width) for i, width in enumerate(widths))
    # Files are named by them.
    if len({f"{width:.3f}" for width in checked}) < len(checked) or any(w != round(w, 3) for w in checked):
        raise InputError(f"average_widths is {widths!r:.200}; expected different numbers of at most three decimals")
    return checked


def divided(config: TrainConfig, processes: int) -> tuple[int, int]:
    """How a process divides its share of a batch.

    Args:
        config: How to train.
        processes: How many train together.

    Returns:
        How many micro-batches it computes one after the other, and how many images each has.

    Raises:
        InputError: If the batch does not divide so; says what would fit.
    """
    size = config.batch_size
    share, rest = divmod(size, processes)
    if rest or not share:
        lower, upper = share * processes, (share + 1) * processes
        raise InputError(
            f"batch_size is {size}, which {processes} processes cannot share equally: give "
            f"{f'{lower} or {upper}' if lower else upper}"
        )
    micro = min(config.micro_batch or share, share)
    if share % micro:
        fits = max(part for part in range(1, micro + 1) if share % part == 0)
        part = micro * processes
        raise InputError(
            f"micro_batch is {micro}, which does not divide the {share} images of each process: give micro_batch "
            f"{fits}, or batch_size {size // part * part} or {(size // part + 1) * part}"
        )
    return share // micro, micro
