"""diffusers' own networks and schedulers, saved by it and read from their folders: the same outputs and tables."""

import importlib.util

import pytest
import torch
from support.diffusers_configs import KINDS
from support.made_weights import made_input, made_state
from torch.testing import assert_close

from ddpm_fast.formats.diffusers_folder import read_folder
from ddpm_fast.nn.unet import UNet

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
]


@pytest.fixture(autouse=True)
def _silent():
    from diffusers.utils import logging

    logging.set_verbosity_error()


def theirs(fields):
    """A UNet2DModel with made weights, in eval mode."""
    from diffusers import UNet2DModel

    model = UNet2DModel.from_config(fields).eval()
    model.load_state_dict(made_state({name: tensor.shape for name, tensor in model.state_dict().items()}))
    return model


def loaded(imported):
    model = UNet(imported.unet).eval()
    model.load_state_dict(imported.state)
    return model


def saved(tmp_path, fields, scheduler="DDPMScheduler", **options):
    """A pipeline's folder as diffusers saves it, and its network."""
    import diffusers

    model = theirs(fields)
    pipeline = diffusers.DDPMPipeline(model, getattr(diffusers, scheduler)(**options))
    pipeline.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_network_of_each_kind_gives_the_same_output(kind, tmp_path):
    fields = KINDS[kind]
    learned = {"variance_type": "learned_range"} if kind == "a learned variance" else {}
    peer = saved(tmp_path, fields, **learned)
    imported = read_folder(tmp_path)
    model = loaded(imported)
    size = fields["sample_size"]
    x = made_input("x", (2, fields.get("in_channels", 3), *(size if isinstance(size, list) else (size, size))))
    t = torch.tensor([3, 700])
    labels = torch.tensor([0, 4]) if "num_class_embeds" in fields else None
    expected = peer(x, t, class_labels=labels).sample
    given = {"condition": x[:, 2:]} if kind == "a condition image" else {}
    x = x[:, : imported.unet.in_channels]
    assert x.shape[1:] == imported.unet.shape
    assert_close(model(x, t, labels, **given), expected, rtol=1e-5, atol=1e-5)
    assert imported.diffusion.objective.learned == bool(learned)
