"""The public names of ddpm_fast. `import ddpm_fast` takes them from here when one of them is first used."""

from ddpm_fast import ops
from ddpm_fast.data import load_dataset, open_dataset
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files.checkpoint import available_models, save_model
from ddpm_fast.files.classifier import save_classifier
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.diffusers.export import export_diffusers
from ddpm_fast.formats.load import load_model
from ddpm_fast.formats.load_classifier import load_classifier
from ddpm_fast.loops.editing import decode, encode, image_to_image, inpaint, interpolate
from ddpm_fast.loops.options import SamplingOptions, Step
from ddpm_fast.loops.sampling import sample
from ddpm_fast.loops.training import TrainConfig, Trainer
from ddpm_fast.nn import EMA, Classifier, ClassifierConfig, Foreign, UNet, UNetConfig
from ddpm_fast.noise import NoiseKey, Stream
from ddpm_fast.ops import use_backend
from ddpm_fast.schedule import Schedule

__all__ = [
    "EMA",
    "Classifier",
    "ClassifierConfig",
    "Foreign",
    "GaussianDiffusion",
    "InputError",
    "LoadedModel",
    "NoiseKey",
    "SamplingOptions",
    "Schedule",
    "Step",
    "Stream",
    "TrainConfig",
    "Trainer",
    "UNet",
    "UNetConfig",
    "available_models",
    "decode",
    "encode",
    "export_diffusers",
    "image_to_image",
    "inpaint",
    "interpolate",
    "load_classifier",
    "load_dataset",
    "load_model",
    "open_dataset",
    "ops",
    "sample",
    "save_classifier",
    "save_model",
    "use_backend",
]
