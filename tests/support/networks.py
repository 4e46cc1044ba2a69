"""A small U-Net for tests, of random weights even where a new one has zeros: its output depends on its input."""

import torch

from ddpm_fast.nn import UNet, UNetConfig


def random_unet(deviation: float = 0.05, **config) -> UNet:
    """The same network for the same arguments, in eval mode.

    Args:
        deviation: of the weights that are zero in a new network.
        config: of UNetConfig, with one residual block a level and no attention unless it says otherwise.
    """
    torch.manual_seed(0)
    config = {"attention_resolutions": (), "num_res_blocks": 1} | config
    model = UNet(UNetConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, deviation)
    return model.eval()
