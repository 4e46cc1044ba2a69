"""Recipes: everything that a training is made of but its seed, by code. Ours are what is tried out; the others are what
those codes do if they are told nothing.

diffusers' is examples/unconditional_image_generation/train_unconditional.py with --use_ema, as its README runs it;
lucidrains' is Trainer(GaussianDiffusion(...)) of denoising-diffusion-pytorch 2.3.4.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import ddpm_fast as df
from ddpm_fast.data import ImageSet
from ddpm_fast.errors import InputError
from ddpm_fast.loops.train_config import TrainConfig, warmup_for

OURS, DIFFUSERS, LUCIDRAINS = "ours", "diffusers", "lucidrains"
SCHEDULES = {"linear": df.Schedule.linear, "cosine": df.Schedule.cosine, "sigmoid": df.Schedule.sigmoid}
T = 1000  # of all three codes

# What the arguments of the script default to, by their names, and what it has no argument for (the clipping).
SCRIPT = {
    "train_batch_size": 16,
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 500,
    "adam_beta1": 0.95,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-6,
    "adam_epsilon": 1e-8,
    "ema_inv_gamma": 1.0,
    "ema_power": 3 / 4,
    "ema_max_decay": 0.9999,
    "ddpm_num_steps": T,
    "ddpm_beta_schedule": "linear",
    "clip_grad_norm": 1.0,
}
# What the arguments of lucidrains' Trainer default to. Its flip is off: digits have a left and a right.
TRAINER = {
    "train_batch_size": 16,
    "train_lr": 1e-4,
    "adam_betas": (0.9, 0.99),
    "ema_update_every": 10,
    "ema_decay": 0.995,
    "max_grad_norm": 1.0,
}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        loop: Whose training loop it is: OURS, DIFFUSERS or LUCIDRAINS.
        network: The fields of UNetConfig that are not those of UNetConfig.for_images.
        diffusion: The "schedule", the "prediction" and the "loss_weighting".
        config: Of our loop.
        settings: Those of SCRIPT or TRAINER that are to be otherwise than they default to.
        own_network: Whether diffusers' loop trains a UNet2DModel with the weights that it begins with by itself.
            Otherwise it trains our UNet, from the weights that our loop begins with.
    """

    loop: str
    network: dict[str, Any] = field(default_factory=dict)
    diffusion: dict[str, str] = field(default_factory=dict)
    config: TrainConfig = field(default_factory=TrainConfig)
    settings: dict[str, Any] = field(default_factory=dict)
    own_network: bool = False

    @property
    def batch_size(self) -> int:
        """Images in a training step."""
        default = {DIFFUSERS: SCRIPT, LUCIDRAINS: TRAINER}.get(self.loop)
        return self.config.batch_size if default is None else {**default, **self.settings}["train_batch_size"]

    def unet(self, data: ImageSet) -> df.UNetConfig:
        """The network for images. Classes are not told to it, because neither of the other codes has them."""
        return df.UNetConfig.for_images(data, **{"num_classes": 0, **self.network})

    def made_diffusion(self) -> df.GaussianDiffusion:
        """What the network is trained for, and sampled with."""
        fields = dict(self.diffusion)
        return df.GaussianDiffusion(SCHEDULES[fields.pop("schedule")](T), variance="fixed_small", **fields)

    def replace(self, **changes: Any) -> Recipe:
        """The same but for some fields. Those of `network`, `diffusion`, `config` and `settings` are given as
        dictionaries of what changes in them."""
        made = {}
        for name, change in changes.items():
            old = getattr(self, name)
            if isinstance(old, TrainConfig):
                made[name] = dataclasses.replace(old, **change)
            else:
                made[name] = {**old, **change} if isinstance(old, dict) else change
        return dataclasses.replace(self, **made)

    def to_dict(self) -> dict[str, Any]:
        """All that a result says about it, in JSON's types."""
        fields = dataclasses.asdict(self)
        if self.loop != OURS:
            del fields["config"]
        return fields


def theirs(loop: str, **fields: Any) -> Recipe:
    """The recipe of a code that is told nothing. Raises InputError for an unknown one."""
    if loop == DIFFUSERS:
        return Recipe(loop, diffusion={"schedule": "linear", "prediction": "eps"}, **fields)
    if loop == LUCIDRAINS:
        # Its loss_weight of v is SNR / (1 + SNR), which makes of it the squared error of the noise.
        return Recipe(loop, diffusion={"schedule": "sigmoid", "prediction": "v", "loss_weighting": "snr"}, **fields)
    raise InputError(f"loop {loop!r} is unknown; there are {DIFFUSERS} and {LUCIDRAINS}")


def ours(images: int, **fields: Any) -> Recipe:
    """What `python -m ddpm_fast.train` does if it is told nothing else but --steps, in fp32.

    Args:
        images: How many it sees, which tells the steps.
        fields: Of Recipe, as Recipe.replace takes them.
    """
    made = Recipe(OURS, diffusion={"schedule": "cosine", "prediction": "v"})
    warmup = warmup_for(-(-images // made.config.batch_size))
    return made.replace(config={"warmup": warmup}).replace(**fields)
