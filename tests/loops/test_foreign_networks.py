"""Sampling, every edit and the likelihood take other people's networks as they are: the numbers are those of our own
U-Net called in their way."""

import types

import pytest
import torch
from support.networks import random_unet

import ddpm_fast as df
from ddpm_fast.loops import graphs
from ddpm_fast.loops.compiled import compiled
from ddpm_fast.loops.network import Network

DIFFUSION = df.GaussianDiffusion(df.Schedule.cosine(20), prediction="v", variance="fixed_small")
SHAPE = (2, 8, 8)
NETWORK = {"image_size": 8, "in_channels": 2, "model_channels": 8, "channel_mult": (1, 2), "norm_groups": 4}


class Diffusers(torch.nn.Module):
    """Our U-Net behind the face of diffusers' UNet2DModel. `asked` has each call's batch."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.asked = unet, []
        self.config = {
            "sample_size": 8,
            "in_channels": 2,
            "out_channels": unet.config.out_channels,
            "num_class_embeds": unet.config.num_classes or None,
            "block_out_channels": (8, 16),
        }

    def forward(self, sample, timestep, class_labels=None):
        self.asked.append(len(sample))
        assert not self.training
        return types.SimpleNamespace(sample=self.unet(sample, timestep, class_labels))


IMAGES = torch.linspace(-1, 1, 256).view(2, *SHAPE)
USES = {
    "sample": lambda model, **given: df.sample(model, DIFFUSION, 2, steps=4, seed=1, **given),
    "encode": lambda model, **given: df.encode(model, DIFFUSION, IMAGES, steps=4, **given),
    "decode": lambda model, **given: df.decode(model, DIFFUSION, IMAGES, steps=4, **given),
    "image to image": lambda model, **given: df.image_to_image(model, DIFFUSION, IMAGES, steps=4, **given),
    "inpaint": lambda model, **given: df.inpaint(
        model, DIFFUSION, IMAGES, torch.eye(8), steps=4, jump_length=2, **given
    ),
    "interpolate": lambda model, **given: df.interpolate(model, DIFFUSION, *IMAGES, 3, steps=4, **given),
    "bits per dim": lambda model, **given: DIFFUSION.bits_per_dim(model, IMAGES, steps=4, **given).total,
}


@pytest.mark.parametrize("word", USES)
def test_every_use_takes_every_kind_of_network(word):
    use, unet = USES[word], random_unet(**NETWORK)
    expected = use(unet)
    peer = Diffusers(unet).train()
    assert torch.equal(use(peer), expected)
    assert peer.training and peer.asked
    without_a_config = torch.nn.Module()
    without_a_config.forward = unet.forward
    for model in (unet.forward, lambda x, t: peer.eval()(x, t), without_a_config, df.Foreign(unet, shape=SHAPE)):
        shape = {"shape": SHAPE} if word == "sample" else {}
        assert torch.equal(use(model, **shape), expected)


@pytest.mark.parametrize("word", USES)
def test_every_use_refuses_an_answer_of_another_kind(word):
    shape = {"shape": SHAPE} if word == "sample" else {}
    with pytest.raises(df.InputError, match=r"the <lambda> answered with a tuple; expected a tensor of floats"):
        USES[word](lambda x, t: (x,), **shape)
    with pytest.raises(df.InputError, match=r"expects C = 2|twice the channels"):
        USES[word](lambda x, t: torch.cat([x, x], dim=1), **shape)
    with pytest.raises(df.InputError, match=r"the model is a dict; expected a torch\.nn\.Module or a function"):
        USES[word]({}, **shape)


def test_classes_of_a_network_without_a_null_class():
    unet = random_unet(num_classes=3, **NETWORK)
    peer = Diffusers(unet)
    expected = df.sample(unet, DIFFUSION, 2, steps=3, labels=[0, 2])
    assert torch.equal(df.sample(peer, DIFFUSION, 2, steps=3, labels=[0, 2]), expected)
    with pytest.raises(df.InputError, match="cannot be called without labels: give labels, its classes, 0 to 2"):
        df.sample(peer, DIFFUSION, 2, steps=3)
    with pytest.raises(df.InputError, match=r"labels run from 3 to 3; this model has the classes 0\.\.2$"):
        df.sample(peer, DIFFUSION, 2, steps=3, labels=3)
    with pytest.raises(df.InputError, match="give null_label, or leave guidance out"):
        df.sample(peer, DIFFUSION, 2, steps=3, labels=1, guidance=2.0)
    with pytest.raises(df.InputError, match=r"null_label is 3; this Diffusers has the classes 0\.\.2"):
        df.sample(peer, DIFFUSION, 2, steps=3, labels=1, guidance=2.0, null_label=3)
    guided = df.sample(peer, DIFFUSION, 2, steps=3, labels=1, guidance=2.0, null_label=0)
    assert not torch.equal(guided, df.sample(peer, DIFFUSION, 2, steps=3, labels=1))


def test_labels_for_a_function_that_takes_none():
    with pytest.raises(df.InputError, match="takes x and t alone: leave the labels out"):
        df.sample(lambda x, t: x, DIFFUSION, 2, shape=SHAPE, steps=2, labels=1)
    with pytest.raises(df.InputError, match="cannot be called without labels"):
        df.sample(lambda x, t, y: x, DIFFUSION, 2, shape=SHAPE, steps=2)


def test_a_shape_other_than_the_configs():
    for model in (random_unet(**NETWORK), Diffusers(random_unet(**NETWORK))):
        assert df.sample(model, DIFFUSION, 1, steps=2, shape=(2, 4, 10)).shape == (1, 2, 4, 10)
        assert df.encode(model, DIFFUSION, torch.zeros(1, 2, 6, 4), steps=2).shape == (1, 2, 6, 4)
        with pytest.raises(df.InputError, match="7 is not divisible by 2: give 8, or leave shape out"):
            df.sample(model, DIFFUSION, 1, steps=2, shape=(2, 8, 7))
        with pytest.raises(df.InputError, match=r"draws \(2, H, W\): give as many dimensions and channels"):
            df.sample(model, DIFFUSION, 1, steps=2, shape=(3, 8, 8))
        with pytest.raises(df.InputError, match=r"the images are \[1, 2, 8\], but"):
            df.encode(model, DIFFUSION, torch.zeros(1, 2, 8), steps=2)


def test_the_device_and_dtype_are_those_of_the_modules_that_a_function_names():
    unet = random_unet(**NETWORK).to(torch.bfloat16)
    found = Network.of(lambda x, t: unet(x, t))
    assert found.dtype == torch.bfloat16 and found.device.type == "cpu" and found.may_wait
    assert found.name == "<lambda>" and found.shape is None
    assert Network.of(df.Foreign(lambda x, t: x).to("meta")).device.type == "meta"


def test_a_module_keeps_its_graphs_from_call_to_call(recording):
    peer = Diffusers(random_unet(**NETWORK))
    eager = df.sample(peer, DIFFUSION, 2, steps=6, cuda_graph=False)
    for _ in range(2):
        assert torch.equal(df.sample(peer, DIFFUSION, 2, steps=6), eager)
    assert recording.captures == 1
    assert list(graphs._replays) == [peer]


class Labelled(torch.nn.Module):
    """The least network that takes labels by name."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.tensor([0.5, 0.25, -1.0]))

    def forward(self, x, t, *, class_labels):
        return {"sample": x * self.rows[class_labels].view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1)}


def test_a_compiled_network_is_called_in_its_own_way(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, backend="eager"))
    module, (x, t, labels) = Labelled(), (torch.ones(2, *SHAPE), torch.tensor([3, 5]), torch.tensor([2, 0]))
    network = Network.of(module)
    raw = compiled(module)
    assert torch.equal(raw(x, t, class_labels=labels)["sample"], module(x, t, class_labels=labels)["sample"])
    assert network.takes_labels and network.needs_labels
    with pytest.raises(df.InputError, match=r"the Labelled answered with a dict; .*\['out'\]"):
        network.called(raw)(x, t, labels)


def test_guidance_goes_the_networks_own_way():
    unet = random_unet(num_classes=3, **NETWORK)
    options = {"steps": 3, "labels": [0, 1], "guidance": 3.0}
    found = df.sample(Diffusers(unet), DIFFUSION, 2, **options, null_label=2)
    expected = df.sample(lambda x, t, y: unet(x, t, y), DIFFUSION, 2, **options, null_label=2, shape=SHAPE)
    assert torch.equal(found, expected) and not torch.equal(found, df.sample(unet, DIFFUSION, 2, **options))
