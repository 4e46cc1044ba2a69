"""Small networks of features that tests take in place of large ones, and weights for the large ones."""

import warnings
from pathlib import Path

import torch
from support.made_weights import made_input, made_state
from torch import Tensor, nn

from ddpm_fast.metrics.features import inception

INCEPTION_IMAGES = (2, 3, 40, 52)


class Tiny(nn.Module):
    """Gives 6 features and 4 logits of images of any size."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2)
        self.last = nn.Linear(6, 4)
        self.load_state_dict(made_state({name: tensor.shape for name, tensor in self.state_dict().items()}))

    def features(self, images: Tensor) -> Tensor:
        return torch.relu(self.first(images.float() / 127.5 - 1)).mean((2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return features, self.last(features)


class LikeNvidias(nn.Module):
    """Has the interface of NVIDIA's inception-2015-12-05.pt: features, or probabilities, with or without the bias.

    Args:
        temperature: If it is not 1, the probabilities are not those of the features and output.weight.
    """

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2)
        self.output = nn.Linear(6, 4)
        self.temperature = temperature
        self.load_state_dict(made_state({name: tensor.shape for name, tensor in self.state_dict().items()}))

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        features = torch.relu(self.first((img.to(torch.float32) - 128) / 128)).mean((2, 3))
        if return_features:
            return features
        bias = None if no_output_bias else self.output.bias
        return (nn.functional.linear(features, self.output.weight, bias) * self.temperature).softmax(1)


def scripted(module: nn.Module, path: Path) -> Path:
    """A module as a TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(path)
    return path


def made_images(shape, name: str = "images") -> Tensor:
    """uint8 images around grey."""
    return made_input(name, shape).mul(60).add(128).clamp(0, 255).to(torch.uint8)


def inception_state() -> dict[str, Tensor]:
    """Made-up weights of the Inception network of 2015, such that its features depend on the images."""
    state = made_state(inception.shapes())
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.abs_().mul_(5).add_(0.5)
        elif name.endswith("conv.weight"):
            tensor.mul_(1.4)  # a ReLU halves the variance
    return state
