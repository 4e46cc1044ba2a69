"""The network, and the averages of its weights."""

from ddpm_fast.nn.classifier import Classifier, ClassifierConfig
from ddpm_fast.nn.ema import EMA
from ddpm_fast.nn.foreign import Foreign
from ddpm_fast.nn.power_average import PowerAverage
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.unet_config import UNetConfig

__all__ = ["EMA", "Classifier", "ClassifierConfig", "Foreign", "PowerAverage", "UNet", "UNetConfig"]
