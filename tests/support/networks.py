"""A small U-Net for tests, of random weights even where a new one has zeros: its output depends on its input."""

import torch

from ddpm_fast.nn import Classifier, ClassifierConfig, UNet, UNetConfig


def random_unet(deviation: float = 0.05, **config) -> UNet:
    """The same network for the same arguments, in eval mode.

    Args:
        deviation: of the weights that are zero in a new network.
        config: of UNetConfig, with one residual block a level and no attention unless it says otherwise.
    """
    torch.manual_seed(0)
    config = {"attention_resolutions": (), "num_res_blocks": 1} | config
    return _with_random_zeros(UNet(UNetConfig(**config)), deviation)


def random_classifier(pool: str = "attention", num_classes: int = 3, **config) -> Classifier:
    """The same classifier of noised images for the same arguments, in eval mode. config: as for random_unet."""
    torch.manual_seed(0)
    config = {"attention_resolutions": (), "num_res_blocks": 1} | config
    return _with_random_zeros(Classifier(ClassifierConfig(UNetConfig(**config), num_classes, pool)), 0.05)


def _with_random_zeros(model: torch.nn.Module, deviation: float):
    """The model in eval mode, with normal numbers in place of weights that are 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, deviation)
    return model.eval()
