"""What is counted of a network's work."""

import pytest

from ddpm_fast.nn.unet_config import UNetConfig
from ddpm_fast.nn.work import work


def test_the_work_of_the_cifar10_network():
    counted = work(UNetConfig())
    assert counted.parameters == 35_746_307
    # 6.1 billion multiplications and additions are the figure known of this network.
    assert counted.flops == pytest.approx(2 * 6.1e9, rel=0.05)
    # The first layer needs no gradient of its input: a little less than three times.
    assert 2.9 < counted.training_flops / counted.flops <= 3
    assert counted.bytes(8, 4) - counted.bytes(7, 4) == 4 * counted.activations
