"""Configs of small UNet2DModels, as their config.json has them: each kind of network that diffusers' folders may hold.

A field that is left out has diffusers' own default.
"""

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
