"""The network, and the moving average of its weights."""

from ddpm_fast.nn.ema import EMA
from ddpm_fast.nn.unet import UNet, UNetConfig

__all__ = ["EMA", "UNet", "UNetConfig"]
