"""ddpm_fast: train denoising diffusion models and sample from them, at the speed of the hardware.

    import ddpm_fast as df
    loaded = df.load_model("mnist")
    images = df.sample(loaded.model, loaded.diffusion, 64, steps=50, seed=0, labels=7)

Inside your own loop: df.ops.q_sample, df.ops.diffusion_loss, df.ops.reverse_step, df.ops.normal.
"""

__version__ = "0.1.0"

from . import ops
from .checkpoint import LoadedModel, available_models, load_model, save_model
from .diffusion import GaussianDiffusion
from .editing import decode, encode, image_to_image, inpaint, interpolate
from .errors import InputError
from .nn import EMA, UNet, UNetConfig
from .noise import NoiseKey, Stream
from .ops import use_backend
from .sampling import sample
from .schedule import Schedule

__all__ = [
    "EMA",
    "GaussianDiffusion",
    "InputError",
    "LoadedModel",
    "NoiseKey",
    "Schedule",
    "Stream",
    "UNet",
    "UNetConfig",
    "available_models",
    "decode",
    "encode",
    "image_to_image",
    "inpaint",
    "interpolate",
    "load_model",
    "ops",
    "sample",
    "save_model",
    "use_backend",
]
