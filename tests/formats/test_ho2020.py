"""Checkpoints of w86763777 and pesser give the outputs and the sampling steps of their own code (golden/ho2020.npz)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.ho2020_cases import (
    DIFFUSIONS,
    NETWORKS,
    PESSER,
    PUBLISHED,
    W86763777,
    Case,
    network_inputs,
    step_inputs,
)
from support.made_weights import made_state
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.errors import InputError
from ddpm_fast.files import fit
from ddpm_fast.formats import pesser, w86763777
from ddpm_fast.formats.imported import Imported

FORMATS = {W86763777: w86763777, PESSER: pesser}
PATH = Path("ckpt.pt")
TABLE = "time_embedding.timembedding.0.weight"


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "ho2020.npz") as file:
        return dict(file)


def shapes_of(golden: dict, name: str) -> dict[str, list[int]]:
    return json.loads(bytes(golden[f"{name}/shapes"]))


def sinusoids(timesteps: int, channels: int) -> Tensor:
    """w86763777's table of timesteps: sin and cos of each frequency in turn."""
    angles = torch.arange(timesteps)[:, None] * torch.exp(-math.log(10000) * torch.arange(0, channels, 2) / channels)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def content_of(code: str, state: dict[str, Tensor]) -> object:
    return {"ema_model": state, "net_model": {}, "step": 3} if code == W86763777 else state


def made_content(golden: dict, name: str, case: Case) -> object:
    shapes = shapes_of(golden, name)
    table = shapes.pop(TABLE, None)
    state = made_state(shapes)
    return content_of(case.code, state if table is None else {**state, TABLE: sinusoids(*table)})


def published(golden: dict, name: str) -> object:
    """The published network's weights, without memory."""
    state = {n: torch.empty(shape, device="meta") for n, shape in shapes_of(golden, name).items()}
    if TABLE in state:
        state[TABLE] = sinusoids(*state[TABLE].shape)
    return content_of(PUBLISHED[name].code, state)


def read(code: str, content: object, flags: str | None = None) -> Imported:
    assert FORMATS[code].claims(content)
    assert not any(other.claims(content) for name, other in FORMATS.items() if name != code)
    return FORMATS[code].read(content, PATH, flags)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_answers_as_its_own_code(golden, tmp_path, name):
    case = NETWORKS[name]
    torch.save(made_content(golden, name, case), tmp_path / "ckpt.pt", _use_new_zipfile_serialization="two" in name)
    loaded = df.load_model(tmp_path / "ckpt.pt", flags=case.flags)
    with torch.no_grad():
        output = loaded.model(*network_inputs(name, case))
    torch.testing.assert_close(output, torch.from_numpy(golden[f"{name}/output"]), rtol=1e-5, atol=1e-5)
    assert loaded.origin["flags"] == case.flags


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_needs_no_flags(golden, name):
    imported = read(PUBLISHED[name].code, published(golden, name))
    with torch.device("meta"):
        wanted = df.UNet(imported.unet).state_dict()
    assert {n: t.shape for n, t in imported.state.items()} == {n: t.shape for n, t in wanted.items()}
    assert sum(t.numel() for t in imported.state.values()) == golden[f"{name}/parameters"]
    assert imported.unet.image_size == PUBLISHED[name].image_size
    assert imported.unet.dropout == PUBLISHED[name].options.get("dropout", 0.0)
    assert imported.diffusion.schedule.source == {"kind": "linear", "T": 1000}


def test_the_cifar_10_networks_have_35_7_million_parameters(golden):
    assert golden["w86763777 cifar10/parameters"] == golden["pesser cifar10/parameters"] == 35_746_307


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_a_sampling_step_is_that_of_its_own_code(golden, name):
    case = DIFFUSIONS[name]
    small = "w86763777 two levels" if case.code == W86763777 else "pesser two levels"
    content = published(golden, name) if name in PUBLISHED else made_content(golden, small, NETWORKS[small])
    flags = case.flags
    if case.code == W86763777 and name not in PUBLISHED:
        content["ema_model"][TABLE] = sinusoids(1000, 32)
    elif name not in PUBLISHED:
        flags += " --resolution 8"
    x_t, t, eps = step_inputs()
    # w86763777 clips x_0 at the end of the chain alone.
    found = read(case.code, content, flags).diffusion.p_mean_variance(eps, x_t, t, clip=case.code == PESSER)
    torch.testing.assert_close(found.mean, torch.from_numpy(golden[f"{name}/mean"]), rtol=1e-5, atol=1e-5)
    # At t = 0 no noise is added, and the variance is a matter of convention.
    expected = torch.from_numpy(golden[f"{name}/log_variance"])[1:]
    torch.testing.assert_close(found.log_variance[1:], expected, rtol=1e-5, atol=1e-5)


def test_without_an_average_the_network_itself_is_read(golden):
    name = "w86763777 two levels"
    content = made_content(golden, name, NETWORKS[name])
    expected = read(W86763777, content).state
    state = read(W86763777, {"net_model": content["ema_model"]}).state
    assert all(torch.equal(state[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("w86763777 two levels", "--T 1000", "--T is 1000, but the weights are those of 20"),
        ("w86763777 two levels", "--ch 128", "--ch is 128, but the weights are those of 32"),
        ("w86763777 two levels", "--ch_mult=1 --ch_mult=1", "--ch_mult is 1 1, but the weights are those of 1 2"),
        ("w86763777 two levels", "--attn 0", "--attn is 0, but the weights are those of 1"),
        ("w86763777 two levels", "--num_res_blocks 2", "num_res_blocks is 2, but the weights are those of 1"),
        ("w86763777 two levels", "--mean_type xprev", "--mean_type is 'xprev'; supported are epsilon"),
        ("w86763777 two levels", "--var_type learned", "--var_type is 'learned'; expected fixedlarge or fixedsmall"),
        ("w86763777 two levels", "--img_size 9", "image_size 9 cannot be halved"),
        ("w86763777 two levels", "--img_size -8", "--img_size is -8"),
        ("w86763777 two levels", "--beta_T 7", "beta"),
        ("w86763777 two levels", "--beta_1 nan", "beta"),
        ("w86763777 two levels", "--flagfile a.txt", "--flagfile is no flag of w86763777's pytorch-ddpm"),
        ("pesser two levels", None, "give it as a flag, such as --flags '--resolution 64'"),
        ("pesser two levels", "--resolution 8 --ch 64", "--ch is 64, but the weights are those of 32"),
        ("pesser two levels", "--resolution 16 --attn_resolutions 4", "--attn_resolutions is 4, but .* those of 8"),
        ("pesser two levels", "--resolution 8 --beta_schedule jsd", "--beta_schedule is 'jsd'; supported are linear"),
        ("pesser two levels", "--resolution 8 --num_diffusion_timesteps 99999999999", "num_diffusion_timesteps"),
        ("pesser two levels", "--resolution 8 --out_ch 6", "--out_ch is 6, but the weights are those of 3"),
    ],
)
def test_flags_that_cannot_be_are_refused_by_name(golden, name, flags, reason):
    case = NETWORKS[name]
    with pytest.raises(InputError, match=rf"^ckpt\.pt: .*{reason}"):
        read(case.code, made_content(golden, name, case), flags)


@pytest.mark.parametrize("name", ["w86763777 two levels", "pesser two levels"])
def test_weights_of_another_network_are_refused_by_name(golden, name):
    case = NETWORKS[name]
    content = made_content(golden, name, case)
    state = content["ema_model"] if case.code == W86763777 else content
    for changed, tensor in [
        *((n, None) for n in state if n not in (*w86763777._CLAIMED, *pesser._CLAIMED)),
        ("conv_shortcut.weight", torch.ones(1)),
        *((n, t[..., :1].clone()) for n, t in state.items() if n in ("head.weight", "conv_in.weight", TABLE)),
        *((n, torch.tensor(1.0)) for n in state if n.endswith(("proj_q.weight", "attn_1.q.bias", "dense.0.weight"))),
    ]:
        other = {n: t for n, t in state.items() if n != changed}
        other |= {} if tensor is None else {changed: tensor}
        flags = "--resolution 8" if case.code == PESSER else None
        with pytest.raises(InputError):
            imported = FORMATS[case.code].read(content_of(case.code, other), PATH, flags)
            config = {"unet": imported.unet.to_dict(), "diffusion": imported.diffusion.to_dict()}
            fit.build(PATH, imported.state, config)


def test_a_learned_table_of_timesteps_is_refused(golden):
    name = "w86763777 two levels"
    content = made_content(golden, name, NETWORKS[name])
    content["ema_model"][TABLE] = content["ema_model"][TABLE].flip(1)
    with pytest.raises(InputError, match="does not hold the sinusoids of 20 timesteps"):
        read(W86763777, content)


@pytest.mark.parametrize(
    "content", [None, 3, [], {}, {"ema_model": None}, {"ema_model": {"a": 1}}, torch.ones(2), {0: torch.ones(1)}]
)
def test_what_is_of_another_format_is_not_claimed(content):
    assert not any(each.claims(content) for each in FORMATS.values())
