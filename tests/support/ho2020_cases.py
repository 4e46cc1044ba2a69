"""The networks and diffusions of w86763777 and pesser that the golden file has numbers of, and their inputs."""

from typing import Any, NamedTuple

import torch
from support.made_weights import made_input
from torch import Tensor

W86763777, PESSER = "w86763777", "pesser"


class Case(NamedTuple):
    """A network or diffusion of another code.

    Attributes:
        code: W86763777 or PESSER.
        options: What its class is given.
        flags: What our reader is given.
        image_size: Of a network, the size of its images.
    """

    code: str
    options: dict[str, Any]
    flags: str | None
    image_size: int = 8


def _pesser(**options: Any) -> dict[str, Any]:
    return {"in_channels": 3, "out_ch": 3, **options}


_LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_diffusion_timesteps": 1000}

NETWORKS = {
    "w86763777 two levels": Case(
        W86763777,
        {"T": 20, "ch": 32, "ch_mult": [1, 2], "attn": [1], "num_res_blocks": 1, "dropout": 0.1},
        "--T=20 --attn=1 --ch=32 --ch_mult=1 --ch_mult=2 --num_res_blocks=1 --img_size=8 --notrain --logdir=./logs",
    ),
    "w86763777 three levels": Case(
        W86763777,
        {"T": 50, "ch": 32, "ch_mult": [1, 1, 2], "attn": [2, 0], "num_res_blocks": 2, "dropout": 0.0},
        "--img_size 8 --attn 2 --attn 0",
    ),
    "pesser two levels": Case(
        PESSER,
        _pesser(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), resolution=8),
        "--resolution 8 --ch_mult 1,2 --attn_resolutions 4",
    ),
    "pesser three levels": Case(
        PESSER,
        _pesser(ch=32, ch_mult=(1, 1, 2), num_res_blocks=2, attn_resolutions=(8, 2), resolution=8),
        "--resolution 8",
    ),
}
PUBLISHED = {
    "w86763777 cifar10": Case(
        W86763777,
        {"T": 1000, "ch": 128, "ch_mult": [1, 2, 2, 2], "attn": [1], "num_res_blocks": 2, "dropout": 0.1},
        None,
        32,
    ),
    "pesser cifar10": Case(
        PESSER,
        _pesser(ch=128, ch_mult=(1, 2, 2, 2), num_res_blocks=2, attn_resolutions=(16,), dropout=0.1, resolution=32),
        None,
        32,
    ),
    "pesser lsun": Case(
        PESSER,
        _pesser(ch=128, ch_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256),
        None,
        256,
    ),
}
DIFFUSIONS = {
    "w86763777 cifar10": Case(W86763777, {"beta_1": 1e-4, "beta_T": 0.02, "T": 1000}, None),
    "w86763777 small": Case(
        W86763777,
        {"beta_1": 2e-4, "beta_T": 0.01, "T": 1000, "var_type": "fixedsmall"},
        "--beta_1 2e-4 --beta_T 0.01 --var_type fixedsmall",
    ),
    "pesser cifar10": Case(PESSER, {**_LINEAR, "model_var_type": "fixedlarge"}, None),
    "pesser lsun": Case(PESSER, {**_LINEAR, "model_var_type": "fixedsmall"}, None),
    "pesser quad": Case(
        PESSER,
        {"beta_schedule": "quad", "beta_start": 0.001, "beta_end": 0.015, "num_diffusion_timesteps": 1000},
        "--beta_schedule quad --beta_start 0.001 --beta_end 0.015",
    ),
}


def network_inputs(name: str, case: Case) -> tuple[Tensor, Tensor]:
    return made_input(name, (2, 3, case.image_size, case.image_size)), torch.tensor([3, 17])


def step_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and the network's output for four samples."""
    return made_input("x_t", (4, 3, 4, 4)), torch.tensor([0, 1, 500, 999]), made_input("eps", (4, 3, 4, 4))
