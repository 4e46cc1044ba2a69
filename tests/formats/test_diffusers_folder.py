"""Folders of diffusers' networks and pipelines, read without it: against outputs and tables that it made
(tests/golden/make_diffusers.py); folders of every layout and age; and what is asked for."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from support.diffusers_configs import KINDS, SCHEDULERS, inputs
from support.diffusers_folders import GOLDEN, HO_2020, WEIGHTS, state_of, write
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_fast as df
from ddpm_fast.errors import InputError
from ddpm_fast.formats.diffusers.config import unet_config
from ddpm_fast.formats.diffusers.diffusion import read_diffusion
from ddpm_fast.formats.diffusers.folder import is_folder, read_folder
from ddpm_fast.formats.load import load_model
from ddpm_fast.nn.unet import UNet

STORED = [name.removesuffix(", output") for name in GOLDEN.files if name.endswith(", output")]
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@torch.no_grad()
def check_output(imported, kind=HO_2020, tolerance=1e-5):
    """The network gives what diffusers' own gave."""
    model = UNet(imported.unet).eval()
    model.load_state_dict(imported.state)
    x, t, labels = inputs(KINDS[kind])
    output = torch.from_numpy(GOLDEN[f"{kind}, output"])
    assert_close(model(x, t, labels), output, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", STORED)
def test_a_network_gives_diffusers_output(kind, tmp_path):
    check_output(read_folder(write(tmp_path, kind)), kind)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_has_diffusers_table(kind):
    """diffusers' own is computed in float32."""
    ours = read_diffusion(SCHEDULERS[kind]).schedule.alphas_cumprod[::20]
    assert_close(ours, torch.from_numpy(GOLDEN[f"{kind}, alphas_cumprod"]), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("DDPM by default", ("linear-1000", "eps", "fixed_small")),
        ("cosine", ("cosine-1000", "x0", "fixed_small")),
        ("sigmoid", ("betas-300", "eps", "fixed_small")),
        ("latent diffusion", ("scaled_linear-1000", "eps", "fixed_small")),
        ("zero terminal SNR", ("linear-1000-zero-snr", "v", "fixed_small")),
        ("a learned range", ("linear-1000", "eps", "learned_range")),
    ],
)
def test_a_scheduler_is_called_by_its_name(kind, expected):
    diffusion = read_diffusion(SCHEDULERS[kind])
    assert (diffusion.schedule.name, diffusion.objective.prediction, diffusion.objective.variance) == expected


@pytest.mark.parametrize("name", ["fixed_large", "fixed_large_log", "fixed_small_log", "fixed_small"])
def test_the_variances_by_their_logarithms_are_the_same(name):
    diffusion = read_diffusion(SCHEDULERS["DDPM by default"] | {"variance_type": name})
    assert diffusion.objective.variance == name.removesuffix("_log")


def test_what_a_scheduler_does_to_x0_is_said():
    with pytest.warns(UserWarning, match="clip_sample = false: for the same samples give clip=False"):
        read_diffusion(SCHEDULERS["DDPM by default"] | {"clip_sample": False})
    with pytest.warns(UserWarning, match="dynamic_threshold"):
        read_diffusion(SCHEDULERS["DDPM by default"] | {"thresholding": True})


# The published configs, as their config.json have them.
_PUBLISHED = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.1.1",
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
CIFAR10 = _PUBLISHED | {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CELEBAHQ256 = _PUBLISHED | {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        pytest.param(CIFAR10, 35_746_307, id="google/ddpm-cifar10-32"),
        pytest.param(CELEBAHQ256, 113_673_219, id="google/ddpm-celebahq-256"),
    ],
)
def test_the_published_networks_have_their_number_of_parameters(fields, parameters):
    with torch.device("meta"):
        model = UNet(unet_config(fields, learned=False))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_published_network_is_that_of_the_paper():
    assert unet_config(CIFAR10, learned=False) == df.UNetConfig(
        downsample_padding="asymmetric", norm_eps=1e-6, time_denominator="half-1", time_order="sin|cos"
    )


class _Operations(TorchDispatchMode):
    """Notes each operation, with the strides of what it makes, which tell the memory format."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.found.append((str(function), made.stride() if isinstance(made, torch.Tensor) else None))
        return made


@torch.no_grad()
def test_a_network_from_a_folder_runs_the_same_kernels_as_one_from_a_file_of_ours(tmp_path):
    theirs = load_model(write(tmp_path / "folder"))
    config = {"unet": theirs.model.config.to_dict(), "diffusion": theirs.diffusion.to_dict()}
    df.save_model(tmp_path / "model.safetensors", theirs.model.state_dict(), config, dtype=torch.float32)
    x, t, _ = inputs(KINDS[HO_2020])
    found = []
    for loaded in (theirs, load_model(tmp_path / "model.safetensors")):
        loaded.model(x, t)  # what is derived from the weights is made once
        with _Operations() as operations:
            loaded.model(x, t)
        found.append(operations.found)
    assert found[0] == found[1]
    assert sum(name.startswith("ddpm_fast.") for name, _ in found[0]) > 10


# Layouts


def test_load_model_takes_the_folder_and_says_where_it_is_from(tmp_path):
    loaded = load_model(write(tmp_path))
    assert loaded.origin == {"format": "diffusers", "pipeline": "DDPMPipeline", "scheduler": "DDPMScheduler"}
    assert not loaded.model.training


def test_old_names_in_one_folder(tmp_path):
    """As pipelines were published in 2022."""
    source = write(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    for path in (source / "unet" / "config.json", *source.glob("*/scheduler_config.json"), *source.glob("*.json")):
        path.rename(old / path.name)
    state = {}
    for name, tensor in state_of(HO_2020).items():
        for present, former in OLD_NAMES.items():
            name = name.replace(f".{present}.", f".{former}.")
        state[name] = tensor
    assert any(".proj_attn." in name for name in state)
    torch.save(state, old / f"{WEIGHTS}.bin")
    assert is_folder(old)
    check_output(read_folder(old))


def test_shards(tmp_path):
    write(tmp_path)
    unet, state = tmp_path / "unet", state_of(HO_2020)
    (unet / f"{WEIGHTS}.safetensors").unlink()
    files = {name: f"{WEIGHTS}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in state.items() if files[name] == file}, unet / file)
    (unet / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    check_output(read_folder(tmp_path))


def test_half_precision_alone(tmp_path):
    write(tmp_path)
    unet = tmp_path / "unet"
    (unet / f"{WEIGHTS}.safetensors").unlink()
    save_file({k: v.half() for k, v in state_of(HO_2020).items()}, unet / f"{WEIGHTS}.fp16.safetensors")
    check_output(read_folder(tmp_path), tolerance=2e-2)


def test_the_cache_of_the_hub(tmp_path):
    """Its files are links to where their contents are; both its pipeline and the network in it load."""
    source = write(tmp_path / "source")
    snapshot = tmp_path / "hub" / "models--google--tiny" / "snapshots" / "0123"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in source.rglob("*") if p.is_file()):
        path.rename(blobs / str(number))
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    check_output(read_folder(snapshot))
    check_output(read_folder(snapshot / "unet", "--beta_schedule linear"))


def test_a_network_of_classes_whose_last_row_was_trained_as_none(tmp_path):
    """Our own pipeline's index says so, or a flag."""
    write(tmp_path, "classes")
    flagged = read_folder(tmp_path, "--null_class True").unet
    (tmp_path / "model_index.json").write_text(json.dumps({"null_class": True}))
    for config in (flagged, read_folder(tmp_path).unet):
        assert (config.num_classes, config.null_class) == (4, True)
    with pytest.raises(InputError, match=r"--null_class is False, but .*model_index.json says True"):
        read_folder(tmp_path, "--null_class no")


def test_the_parts_of_a_pipeline_that_are_not_read_are_named(tmp_path):
    write(tmp_path)
    parts = {"unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"], "bert": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    with pytest.warns(UserWarning, match="not its vqvae: samples are what the unet makes"):
        read_folder(tmp_path)


def test_our_own_scheduler_is_read():
    assert read_diffusion({"_class_name": "DDPMFastScheduler"}).schedule.name == "linear-1000"


def test_averages_of_a_network_are_networks(tmp_path):
    averaging = {"decay": 0.9999, "optimization_step": 10, "power": 0.75, "use_ema_warmup": True, "min_decay": 0.0}
    check_output(read_folder(write(tmp_path, **averaging)))


def test_an_old_network_keeps_the_norm_that_its_weights_have(tmp_path):
    """Scale-shift did not always take the norm out of the middle's attention."""
    kind = "scale-shift, plain middle attention"
    write(tmp_path, kind)
    state = state_of(kind) | {
        f"mid_block.attentions.0.group_norm.{name}": torch.ones(16) for name in ("weight", "bias")
    }
    save_file(state, tmp_path / "unet" / f"{WEIGHTS}.safetensors")
    imported = read_folder(tmp_path)
    assert imported.unet.middle_attention == "normed"
    UNet(imported.unet).load_state_dict(imported.state)


# What is not known is asked for


def test_a_network_without_a_scheduler_asks_for_its_diffusion(tmp_path):
    unet = write(tmp_path) / "unet"
    with pytest.raises(InputError, match=r"no scheduler_config.json, so its diffusion is not known.*--beta_schedule"):
        read_folder(unet)
    flags = "--beta_schedule squaredcos_cap_v2 --num_train_timesteps 500 --prediction_type v_prediction"
    imported = read_folder(unet, flags)
    assert imported.diffusion.to_dict() == df.GaussianDiffusion(df.Schedule.cosine(500), "v", "fixed_small").to_dict()
    assert imported.origin["flags"] == flags


@pytest.mark.parametrize(("text", "size"), [("16", 16), ("16x32", (16, 32))])
def test_a_network_without_a_size_asks_for_it(text, size, tmp_path):
    write(tmp_path, sample_size=None)
    with pytest.raises(InputError, match=r"sample_size is null.*--sample_size 64"):
        read_folder(tmp_path)
    imported = read_folder(tmp_path, f"--sample_size {text}")
    assert imported.unet.image_size == size
    check_output(imported)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sample_size 16", "--sample_size is 16, but .*config.json says 8"),
        ("--sample_size wide", "--sample_size is 'wide'; expected a side"),
        ("--beta_end 0.03", "--beta_end is 0.03, but .* says 0.02"),
        ("--image_size 8", "--image_size is no flag of diffusers' folders"),
    ],
)
def test_a_flag_that_contradicts_is_refused(flags, message, tmp_path):
    write(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta_end": 0.02}))
    with pytest.raises(InputError, match=message):
        read_folder(tmp_path, flags)
