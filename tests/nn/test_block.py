"""Tensors in one block of memory keep their values, formats and gradients; and what is done to the block is done to
each of them."""

import copy

import pytest
import torch
from torch import nn

from ddpm_fast.nn import EMA
from ddpm_fast.nn.block import Block, lay_out, memory_of


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.Conv2d(5, 70, 1), nn.Linear(3, 2))
    return net.to(memory_format=torch.channels_last)


def test_a_layout_keeps_values_and_formats():
    net, twin = model(), model()
    lay_out(net)
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) and p.stride() == q.stride() and p.is_leaf and p.requires_grad, name
        assert p.data_ptr() % 128 == net[0].weight.data_ptr() % 128
    x = torch.randn(2, 3, 8, 8)
    for network in (net, twin):
        network[:3](x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net[:3].parameters(), twin[:3].parameters(), strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_memory_of_a_block_and_of_nothing_else(device):
    parameters = list(model().to(device).parameters())
    assert memory_of(parameters) is None and memory_of(parameters[:1]) is None and memory_of([]) is None
    block = Block(parameters, torch.bfloat16)
    memory = memory_of(block.tensors)
    assert memory.shape == block.memory.shape and memory.dtype == torch.bfloat16
    if device == "cpu":
        assert memory.data_ptr() == block.memory.data_ptr()
        memory.fill_(3.0)
        assert all((tensor == 3).all() for tensor in block.tensors)
    assert memory_of([*block.tensors, parameters[0]]) is None


def test_tensors_of_a_block_do_not_overlap():
    block = Block(list(model().parameters()), torch.float32)
    for number, tensor in enumerate(block.tensors, 1):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(block.tensors, 1))


def test_an_average_of_a_block_is_that_of_its_tensors():
    net, twin = model(), model()
    lay_out(net)
    together, apart = EMA(net, 0.9), EMA(twin, 0.9)
    assert memory_of(list(together.state_dict().values())) is not None
    for step in range(5):
        with torch.no_grad():
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                p.add_(torch.randn_like(p))
                q.copy_(p)
        if step == 3:
            net.to(memory_format=torch.contiguous_format)  # moves some parameters out of the block
            assert memory_of(list(net.parameters())) is None
        for ema in (together, apart):
            ema.update(torch.tensor(step))
        for name, average in apart.state_dict().items():
            torch.testing.assert_close(together.state_dict()[name], average, rtol=1e-6, atol=1e-7, msg=name)
            assert together.state_dict()[name].stride() == average.stride()


def test_an_average_of_a_block_can_be_kept():
    net = model()
    lay_out(net)
    ema = EMA(net, 0.9)
    before = {name: average.clone() for name, average in ema.state_dict().items()}
    nn.init.ones_(net[0].weight)
    ema.update(0, keep=torch.tensor(True))
    assert all(torch.equal(average, before[name]) for name, average in ema.state_dict().items())
    ema.update(0, keep=torch.tensor(False))
    assert not torch.equal(ema.state_dict()["0.weight"], before["0.weight"])


def test_a_copied_network_has_memory_of_its_own():
    net = model()
    lay_out(net)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert net[0].weight.any()
