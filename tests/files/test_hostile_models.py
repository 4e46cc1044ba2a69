"""Model files from a stranger: a file gives a model that samples, or InputError, in a moment and in little memory.

The systematic test replaces each field of a model's config by each of many values.
"""

import copy
import json
import re
import resource
import time

import pytest
import torch
from support.strange import VALUES

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files import tensorfile
from ddpm_fast.files.fit import build
from ddpm_fast.loops.sampling import sample
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.unet_config import UNetConfig
from ddpm_fast.schedule import Schedule

UNET = UNetConfig(
    image_size=8,
    in_channels=1,
    model_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    norm_groups=4,
    attention_resolutions=(4,),
    num_heads=2,
    num_classes=3,
    scale_shift=True,
)
DIFFUSION = GaussianDiffusion(Schedule.cosine(50), prediction="v", variance="fixed_small")
CONFIG = {
    "unet": UNET.to_dict(),
    "diffusion": DIFFUSION.to_dict(),
    "label_names": ["a", "b", "c"],
    "training": {"steps": 10, "lr": 1e-4},
}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return UNet(UNET).state_dict()


def paths(value, path=()):
    """Each place in the config, by its keys."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*path, key))


def changed(path, value):
    config = copy.deepcopy(CONFIG)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


PLACES = {".".join(path): path for path in paths(CONFIG) if path[:2] != ("training", "steps")}
PLACES["unknown"] = ("unet", "unknown")
PLACES |= {name: ("diffusion", "schedule", name) for name in ("timesteps", "zero_terminal_snr", "betas")}


def outcome(state, path, value):
    """The model of the changed config, or the message of the InputError."""
    text = json.dumps(changed(path, value))
    try:
        config = tensorfile._parsed(path, "config", text)
        model, diffusion = build("a.safetensors", state, config)
        labels = [0] if model.config.num_classes else None
        return sample(model.eval(), diffusion, 1, steps=1, labels=labels)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("path", PLACES.values(), ids=PLACES)
def test_a_changed_config_gives_a_model_or_an_input_error(state, path):
    for name, value in VALUES.items():
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        result = outcome(state, path, value)
        seconds = time.process_time() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert seconds < 10 and grown < 500_000, f"{name}: {seconds:.1f} s, {grown} KiB"
        if isinstance(result, str):
            assert len(result) < 3000, f"{name}: a message of {len(result)} characters"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("unet", "model_channels"), 2048, "a larger network than the file holds, which has .* tensors of .* values"),
        (("unet", "num_res_blocks"), 1000, "a larger network than the file holds"),
        (("unet", "num_res_blocks"), 10**5, "num_res_blocks is 100000; expected an integer in 1..1024"),
        (("unet", "num_classes"), 10**6, "a larger network than the file holds"),
        (("unet", "in_channels"), 10**4, "a larger network than the file holds"),
        (("unet", "channel_mult"), [1, 1000], "a larger network than the file holds"),
        (("unet", "channel_mult"), [1] * 10**6, "channel_mult has 1000000 entries; expected at most 15"),
        (("unet", "norm_eps"), float("inf"), "norm_eps is inf"),
        (("unet", "dropout"), float("nan"), "dropout is nan"),
        (("diffusion", "schedule", "T"), 10**8, "T is 100000000; expected an integer in 1..1000000"),
        (("diffusion", "schedule"), {"kind": "betas", "betas": [10**400]}, "betas must be a 1-D tensor"),
        (("label_names",), 5, "label_names is 5; expected a list of one name for each class, or null"),
        (("label_names",), ["a", "b"], "label_names has 2 names for num_classes = 3"),
        (("label_names",), ["a", "b", 3], r"label_names is \['a', 'b', 3\]; expected a list"),
        (("training",), [1], r"training is \[1\]; expected an object, or null"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_config_is_named(state, path, value, message):
    assert re.search(message, outcome(state, path, value))


def test_no_names_for_the_classes_is_a_model(state):
    assert isinstance(outcome(state, ("label_names",), None), torch.Tensor)
    assert isinstance(outcome(state, ("training",), None), torch.Tensor)
