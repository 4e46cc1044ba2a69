"""Configs of small UNet2DModels and of schedulers, as diffusers' folders have them: each kind that there may be.

A field that is left out has diffusers' own default.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.support.made_weights import made_input

_CONV = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_HO_2020 = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
KINDS: dict[str, dict] = {
    "heads of 8 channels by default": _CONV,
    "as Ho et al.": _CONV | _HO_2020 | {"attention_head_dim": None},
    "scale-shift, plain middle attention": _CONV | {"resnet_time_scale_shift": "scale_shift"},
    "scale-shift, normed middle attention": _CONV
    | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4, "attention_head_dim": 4},
    "no middle attention": _CONV | {"add_attention": False},
    "attention on the way up alone": _CONV | {"down_block_types": ["DownBlock2D", "DownBlock2D"]},
    "attention at other levels on the way up": _CONV | {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]},
    "fractional multiples": _CONV
    | {"block_out_channels": [16, 24, 8], "attention_head_dim": 8}
    | {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]}
    | {"up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]},
    "classes": _CONV | {"num_class_embeds": 5},
    "a learned variance": _CONV | {"out_channels": 6},
    "a condition image": _CONV | {"in_channels": 5, "out_channels": 2},
    "resampling in residual blocks": _CONV
    | {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]}
    | {"up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"]}
    | {"downsample_type": "resnet", "upsample_type": "resnet"},
    "not square": _CONV | {"sample_size": [8, 12], "dropout": 0.1, "act_fn": "swish"},
    "one level": {
        "sample_size": [5, 3],
        "block_out_channels": [8],
        "down_block_types": ["UNetResAttnDownBlock2D"],
        "up_block_types": ["UNetResUpBlock2D"],
        "norm_num_groups": 2,
    },
}
# Configs of schedulers, as their scheduler_config.json has them.
SCHEDULERS: dict[str, dict] = {
    "DDPM by default": {"_class_name": "DDPMScheduler"},
    "another range": {
        "_class_name": "DDPMScheduler",
        "beta_start": 0.001,
        "beta_end": 0.05,
        "num_train_timesteps": 200,
    },
    "cosine": {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "sigmoid": {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid", "num_train_timesteps": 300},
    "latent diffusion": {
        "_class_name": "PNDMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "zero terminal SNR": {
        "_class_name": "DDIMScheduler",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
    "betas": {
        "_class_name": "DPMSolverMultistepScheduler",
        "trained_betas": [0.001 * i for i in range(1, 41)],
        "num_train_timesteps": 40,
    },
    "UniPC": {
        "_class_name": "UniPCMultistepScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "num_train_timesteps": 500,
    },
    "a learned range": {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
}


def inputs(fields: Mapping) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, t, labels) for two samples of a network of KINDS."""
    size = fields["sample_size"]
    x = made_input("x", (2, fields.get("in_channels", 3), *(size if isinstance(size, list) else (size, size))))
    return x, torch.tensor([3, 700]), torch.tensor([0, 4]) if "num_class_embeds" in fields else None
