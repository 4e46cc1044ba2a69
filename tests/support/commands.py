"""What the tests of the commands share: running one in this process, and a small model to run it on."""

import importlib

import torch
from typer.testing import CliRunner

import ddpm_fast as df
from ddpm_fast.files import checkpoint
from ddpm_fast.nn import UNet, UNetConfig


def run(module, *arguments):
    """A command run in this process: exit_code, stdout, stderr."""
    app = importlib.import_module(f"ddpm_fast.commands.{module}").app
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def save_small_model(path, classes=3, channels=3, names=None, training=None):
    torch.manual_seed(0)
    config = UNetConfig(
        image_size=8, in_channels=channels, model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(), num_classes=classes, norm_groups=4,
    )  # fmt: skip
    diffusion = df.GaussianDiffusion(df.Schedule.cosine(20), prediction="v", variance="fixed_small")
    described = {
        "unet": config.to_dict(),
        "diffusion": diffusion.to_dict(),
        "label_names": names,
        "training": training or {},
    }
    checkpoint.save_model(path, UNet(config).state_dict(), described)
    return path
