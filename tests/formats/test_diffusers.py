"""Weights are converted between our UNet and diffusers' UNet2DModel, in both directions."""

import importlib.util

import pytest
import torch

import ddpm_fast as df
from ddpm_fast.errors import InputError
from ddpm_fast.formats.diffusers import network as diffusers

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
]
HO_2020 = {"downsample_padding": "asymmetric", "norm_eps": 1e-6, "time_denominator": "half-1", "time_order": "sin|cos"}
SMALL = df.UNetConfig(
    image_size=16,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    num_classes=3,
    **HO_2020,
)


def random_network(config: df.UNetConfig) -> df.UNet:
    """Random values everywhere: layers that start at zero would hide that they are in the wrong place."""
    torch.manual_seed(0)
    model = df.UNet(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model


def test_the_same_weights_give_the_same_output():
    model = random_network(SMALL)
    peer = diffusers.same_weights(model)
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([0, 2])
    with torch.no_grad():
        ours, theirs = model(x, t, labels), peer(x, t, class_labels=labels).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_weights_survive_the_way_there_and_back():
    model = random_network(SMALL)
    state = model.state_dict()
    back = diffusers.from_diffusers(diffusers.same_weights(model).state_dict(), SMALL)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(df.UNetConfig(**HO_2020), id="cifar10"),
        pytest.param(df.UNetConfig(image_size=64, channel_mult=(1, 2, 2, 2, 4), **HO_2020), id="64x64"),
        pytest.param(df.UNetConfig(num_heads=4, attention_resolutions=(16, 8)), id="heads of one width"),
        pytest.param(df.UNetConfig(resample="resblock", scale_shift=True, head_channels=64), id="resblock"),
    ],
)
def test_the_peer_has_as_many_parameters(config):
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in net.parameters()) for net in (diffusers.peer_network(config), df.UNet(config))]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4, "channel_mult": (1, 2, 4), "attention_resolutions": (16,)}, "heads of one width"),
        ({"timestep_scale": 0.25}, "this network's timestep_scale is 0.25"),
        ({"stem_channels": 64}, "this network's stem_channels is 64"),
        ({"channel_mult": (2, 2), "attention_resolutions": ()}, r"this network's channel_mult is \(2, 2\)"),
        ({"middle_attention": "plain"}, "this network's middle_attention is 'plain'"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        diffusers.peer_network(df.UNetConfig(**changes))


def test_a_parameter_too_many_is_named():
    model = random_network(SMALL)
    names = diffusers.peer_network(SMALL).state_dict()
    state = {**model.state_dict(), "extra.weight": torch.zeros(1)}
    with pytest.raises(InputError, match=r"differ in extra\.weight"):
        diffusers.to_diffusers(state, names, SMALL)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_scheduler_takes_the_same_step(prediction):
    diffusion = df.GaussianDiffusion(df.Schedule.cosine(100), prediction=prediction, variance="fixed_small")
    made = diffusers.scheduler(diffusion, [80, 40, 0])
    x, output = torch.randn(2, 3, 8, 8), 0.3 * torch.randn(2, 3, 8, 8)
    respaced = df.GaussianDiffusion(diffusion.schedule.respace([0, 40, 80]), prediction=prediction)
    expected = respaced.p_mean_variance(output, x, torch.tensor([0, 0]))
    # The last step adds no noise: it is the mean.
    torch.testing.assert_close(made.step(output, 0, x).prev_sample, expected.mean, rtol=1e-4, atol=1e-4)
    assert made.timesteps.tolist() == [80, 40, 0]


@pytest.mark.parametrize(
    "name", ["x", "down_blocks.7.resnets.0.conv1.weight", "conv_in", "down_blocks.0.resnets.0.conv9.weight"]
)
def test_a_parameter_of_another_network_is_named(name):
    with pytest.raises(InputError, match=f"{name} is no parameter of the UNet2DModel of this config"):
        diffusers.from_diffusers({name: torch.zeros(1)}, SMALL)
