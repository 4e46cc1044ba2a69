"""diffusers' own networks and schedulers, saved by it and read from their folders: the same outputs and tables."""

import importlib.util

import pytest
import torch
from support.diffusers_configs import KINDS, SCHEDULERS, inputs
from support.made_weights import made_state
from torch.testing import assert_close

from ddpm_fast.formats.diffusers.diffusion import read_diffusion
from ddpm_fast.formats.load import load_model

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
]


@pytest.fixture(autouse=True)
def _silent():
    from diffusers.utils import logging

    logging.set_verbosity_error()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_network_of_each_kind_gives_the_same_output(kind, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    peer = UNet2DModel.from_config(KINDS[kind]).eval()
    peer.load_state_dict(made_state({name: tensor.shape for name, tensor in peer.state_dict().items()}))
    learned = kind == "a learned variance"
    chain = DDPMScheduler(variance_type="learned_range" if learned else "fixed_large")
    DDPMPipeline(peer, chain).save_pretrained(tmp_path, max_shard_size="20KB" if kind == "classes" else "1GB")
    loaded = load_model(tmp_path)
    x, t, labels = inputs(KINDS[kind])
    expected = peer(x, t, class_labels=labels).sample
    channels, condition = loaded.model.config.in_channels, None
    if kind == "a condition image":
        x, condition = x[:, :channels], x[:, channels:]
    assert x.shape[1:] == loaded.model.config.shape
    assert_close(loaded.model(x, t, labels, condition=condition), expected, rtol=1e-5, atol=1e-5)
    assert loaded.diffusion.objective.variance == chain.config.variance_type


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_of_each_kind_has_the_same_tables(kind):
    import diffusers

    fields = SCHEDULERS[kind]
    chosen = {name: value for name, value in fields.items() if name != "_class_name"}
    chain = getattr(diffusers, fields["_class_name"])(**chosen)
    schedule = read_diffusion(dict(chain.config) | {"_class_name": fields["_class_name"]}).schedule
    assert_close(schedule.betas.float(), chain.betas, rtol=1e-4, atol=2e-7)
    assert_close(schedule.alphas_cumprod, chain.alphas_cumprod.double(), rtol=2e-4, atol=1e-6)
