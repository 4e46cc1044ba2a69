"""guided-diffusion's classifiers against their own code (tests/golden/make_guidance.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.formats.openai import network as openai
from ddpm_fast.formats.openai.classifier import claims, read
from ddpm_fast.formats.openai.config import CHANNEL_MULT
from ddpm_fast.nn.classifier import Classifier, ClassifierConfig
from ddpm_fast.nn.unet_config import UNetConfig
from tests.support.classifier_cases import CLASSIFIERS, PUBLISHED, classifier_inputs, thinned
from tests.support.made_weights import made_state

PATH = Path("classifier.pt")


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "guidance.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def content(golden):
    """content(name): what a file of theirs holds."""
    return lambda name: made_state(json.loads(str(golden[f"shapes of {name}"])))


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("says_flags", [True, False], ids=["flags", "no flags"])
def test_logits_and_gradients_are_those_of_their_code(name, says_flags, golden, content):
    classifier = read(content(name), PATH, CLASSIFIERS[name] if says_flags else None)
    assert not classifier.training and classifier.config.pool == name
    x, t = classifier_inputs(name)
    x.requires_grad_(True)
    logits = classifier(x, t)
    (gradient,) = torch.autograd.grad(torch.log_softmax(logits, 1)[:, 7].sum(), x)
    for found, expected in ((logits.detach(), f"logits of {name}"), (gradient, f"gradient of {name}")):
        torch.testing.assert_close(thinned(found), torch.from_numpy(golden[expected]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_classifiers_have_as_many_parameters_as_theirs(size, golden):
    attends = (32, 16, 8)
    unet = UNetConfig(
        image_size=size,
        model_channels=128,
        channel_mult=CHANNEL_MULT[size],
        num_res_blocks=4 if size == 64 else 2,
        attention_resolutions=attends,
        head_channels=64,
        scale_shift=True,
        resample="resblock",
        stem_channels=64 if size == 512 else 0,
    )
    with torch.device("meta"):
        classifier = Classifier(ClassifierConfig(unet))
    assert sum(value.numel() for value in classifier.parameters()) == golden[f"parameters of {size}"]


def test_only_classifiers_are_claimed(content):
    state = content("attention")
    assert claims(state) and not openai.claims(state)
    assert not claims(state | {"output_blocks.0.0.in_layers.0.weight": torch.zeros(1)})
    assert not any(claims(other) for other in ({}, [], None, 3, {1: 2}, {"time_embed.0.weight": 1}))


def test_rescaled_timesteps(content):
    given = content("adaptive")
    rescaled = read(given, PATH, "--diffusion_steps 4000 --rescale_timesteps True")
    assert rescaled.config.unet.timestep_scale == 0.25
    assert read(given, PATH, "--diffusion_steps 4000").config.unet.timestep_scale == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--classifier_depth 2", "--classifier_depth 2 contradicts the weights, .* --classifier_depth 1"),
        ("--classifier_width 64", "--classifier_width 64 contradicts"),
        ("--image_size 128", "--image_size 128 contradicts the weights, which are those of --image_size 64"),
        ("--classifier_pool spatial", "--classifier_pool spatial contradicts .* --classifier_pool attention"),
        ("--classifier_resblock_updown False", "contradicts"),
        ("--classifier_use_scale_shift_norm no", "contradicts"),
        ("--classifier_attention_resolutions 32,16", "32,16 contradicts the weights, which have attention at 8"),
        ("--classifier_attention_resolutions 8,x", "expected heights such as 32,16,8"),
        ("--classifier_colour red", "--classifier_colour is no flag of guided-diffusion"),
        ("--rescale_timesteps True --diffusion_steps 0", "--diffusion_steps is 0"),
    ],
)
def test_flags_that_contradict_the_weights_are_refused(flags, message, content):
    with pytest.raises(InputError, match=rf"classifier\.pt: .*{message}"):
        read(content("attention"), PATH, flags)


def _without(name):
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("input_blocks.3.0.in_layers.2.weight"), r"it lacks encoder\.2\.0\.conv1\.weight"),
        (_without("time_embed.0.weight"), r"it has no time_embed\.0\.weight"),
        (_without("input_blocks.2.0.out_layers.0.weight"), "its stages have .* of none of guided-diffusion's"),
        (_without("out.2.positional_embedding"), "are those of no pool"),
        (_without("out.2.c_proj.bias"), r"it has no out\.2\.c_proj\.bias"),
        (lambda state: state.update({"out.9.weight": torch.zeros(3)}), r"out\.9\.weight is no parameter"),
        (lambda state: state.update({"out.2.positional_embedding": torch.zeros(128, 9)}), "of another shape is pool"),
        (lambda state: state.update({"middle_block.1.qkv.weight": torch.zeros(5, 1)}), "of another shape is middle"),
        (lambda state: state.update({"out.0.bias": torch.zeros(1).expand(2**40)}), "no floating-point weights"),
        (lambda state: state.update({"out.0.bias": torch.full((128,), torch.nan)}), "not finite"),
    ],
)
def test_what_is_no_such_classifier_is_refused(damage, message, content):
    state = dict(content("attention"))
    damage(state)
    with pytest.raises(InputError, match=message):
        read(state, PATH, None)
