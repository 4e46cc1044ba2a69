"""Files of improved- and guided-diffusion against their own code (tests/golden/make_openai.py): outputs of small
networks of every kind, tables, reverse steps and losses of their diffusions, and the shapes of what they published."""

import functools
import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast.files.pickles import read_pickle
from ddpm_fast.formats.imported import Imported
from ddpm_fast.formats.openai.names import to_theirs
from ddpm_fast.formats.openai.network import claims, read
from ddpm_fast.formats.openai.weights import unfilled
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.unet_config import UNetConfig
from tests.support.made_weights import made_state
from tests.support.openai_cases import DIFFUSIONS, NETWORKS, PUBLISHED, diffusion_inputs, network_inputs, thinned

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "openai.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@functools.cache
def their_parameters(config: UNetConfig) -> dict[str, Tensor]:
    """Parameters on the meta device, under their names."""
    return to_theirs(unfilled(lambda: UNet(config)), config.heads, legacy=False)


def their_file(config: UNetConfig) -> dict[str, Tensor]:
    """What a file of theirs holds: weights that are made up, a function of their names."""
    return made_state({name: value.shape for name, value in their_parameters(config).items()})


def imported(name: str) -> Imported:
    case = NETWORKS[name]
    return read(their_file(case.config), Path("model.pt"), case.flags)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_answer_as_theirs(name, golden):
    found = imported(name)
    assert found.unet == NETWORKS[name].config
    model = UNet(found.unet).eval()
    model.load_state_dict(found.state)
    x, t, labels, condition = network_inputs(NETWORKS[name])
    with torch.no_grad():
        output = model(x, t, labels, condition=condition)
    torch.testing.assert_close(thinned(output), golden[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_diffusions_are_theirs(name, golden):
    case = DIFFUSIONS[name]
    diffusion = read(their_parameters(case.config), Path("model.pt"), case.flags).diffusion
    g = {key.removeprefix(f"{name}/"): value for key, value in golden.items() if key.startswith(f"{name}/")}
    x0, noise, output, t = diffusion_inputs(case, diffusion.num_timesteps)
    for table in ("betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"):
        ours = getattr(diffusion.schedule, table)
        torch.testing.assert_close(torch.cat([ours[t], ours.sum()[None]]), g[table], rtol=1e-9, atol=1e-15)
    x_t = diffusion.q_sample(x0, t, noise)
    step = diffusion.p_mean_variance(output, x_t, t)
    torch.testing.assert_close(step.mean, g["mean"], rtol=0, atol=1e-5)
    torch.testing.assert_close(step.log_variance.expand_as(g["mean"]), g["log_variance"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.pred_x0, g["pred_xstart"], rtol=0, atol=1e-5)
    # Theirs is fp32 too, and of the bound the difference of large terms.
    torch.testing.assert_close(diffusion.training_losses(output, x0, t, noise), g["loss"], rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_theirs(name):
    theirs = json.loads((GOLDEN / "openai_published.json").read_text())[name]
    case = PUBLISHED[name]
    file = their_parameters(case.config)
    shapes = "\n".join(sorted(f"{name} {list(value.shape)}" for name, value in file.items()))
    assert sum(value.numel() for value in file.values()) == theirs["parameters"]
    assert hashlib.sha256(shapes.encode()).hexdigest() == theirs["shapes"]
    assert claims(file)
    found = read(file, Path("model.pt"), case.flags)
    assert found.unet == case.config
    diffusion, objective = found.diffusion, found.diffusion.objective
    assert diffusion.num_timesteps == theirs["timesteps"]
    assert diffusion.schedule.betas.sum().item() == pytest.approx(theirs["betas"], rel=1e-9)
    assert (objective.prediction, objective.variance) == ("eps", "learned_range")
    assert (theirs["prediction"], theirs["variance"]) == ("EPSILON", "LEARNED_RANGE")
    loss = (objective.loss, objective.vlb_weight if objective.loss == "hybrid" else None)
    weights = {"RESCALED_MSE": 1 / 1000, "MSE": 1 / theirs["timesteps"]}
    assert loss == (("rescaled_vlb", None) if theirs["loss"] == "RESCALED_KL" else ("hybrid", weights[theirs["loss"]]))
    assert found.unet.timestep_scale == (1000 / theirs["timesteps"] if theirs["rescale_timesteps"] else 1)


def test_what_their_training_writes_is_read(tmp_path):
    case = NETWORKS["guided_new_order"]
    file = their_file(case.config)
    # With use_fp16 all weights are views of one flat parameter.
    flat = torch.cat([value.flatten() for value in file.values()])
    views = [
        part.view(value.shape)
        for part, value in zip(flat.split([v.numel() for v in file.values()]), file.values(), strict=True)
    ]
    path = tmp_path / "ema_0.9999_010000.pt"
    torch.save(OrderedDict((name, torch.nn.Parameter(view)) for name, view in zip(file, views, strict=True)), path)
    content = read_pickle(path)
    assert claims(content)
    found, expected = read(content, path, case.flags), imported("guided_new_order")
    assert found.unet == expected.unet
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(found.state[name], value) for name, value in expected.state.items())
    assert not any(value.requires_grad for value in found.state.values())
