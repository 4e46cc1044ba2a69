"""Folders of diffusers that are not read: of other networks and diffusions, each refused by the name of its field, and
those that are damaged or hostile."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from support.diffusers_configs import SCHEDULERS
from support.diffusers_folders import HO_2020, WEIGHTS, state_of, write

from ddpm_fast.errors import InputError
from ddpm_fast.formats import folder as folders
from ddpm_fast.formats.diffusers.diffusion import read_diffusion
from ddpm_fast.formats.diffusers.folder import is_folder, read_folder
from ddpm_fast.formats.load import load_model

# What our network is not, is refused by the name of the field


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "UNet2DConditionModel"},
        {"time_embedding_type": "fourier"},
        {"time_embedding_dim": 17},
        {"center_input_sample": True},
        {"mid_block_type": None},
        {"mid_block_scale_factor": 1.41},
        {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]},
        {"up_block_types": ["AttnUpBlock2D", "SkipUpBlock2D"]},
        {"downsample_type": "fir"},
        {"downsample_padding": 2},
        {"upsample_type": 1},
        {"act_fn": "mish"},
        {"class_embed_type": "timestep"},
        {"freq_shift": 0.5},
        {"flip_sin_to_cos": 1},
        {"resnet_time_scale_shift": "spatial"},
        {"attn_norm_num_groups": 2},
        {"attention_head_dim": 3},
        {"attention_head_dim": "8"},
        {"norm_num_groups": None},
        {"norm_eps": "small"},
        {"dropout": 2},
        {"in_channels": 2},
        {"out_channels": 6},
        {"num_class_embeds": 10**9},
        {"layers_per_block": 10**6},
        {"block_out_channels": [8, 2**40]},
        {"block_out_channels": [8] * 100},
        {"block_out_channels": 8},
        {"block_out_channels": [8, -8]},
        {"sample_size": [8, 8, 8]},
        {"sample_size": 2**40},
        {"add_attention": None},
        {"only_cross_attention": True},
        {"quantization_config": {"bits": 4}},
    ],
    ids=str,
)
def test_a_field_of_another_network_is_named(changes, tmp_path):
    write(tmp_path, **changes)
    (name,) = changes
    with pytest.raises(InputError, match=rf"unet: .*{name}"):
        read_folder(tmp_path)


def test_levels_that_resample_in_two_ways_are_refused(tmp_path):
    write(tmp_path, downsample_type="resnet", down_block_types=["AttnDownBlock2D", "DownBlock2D"])
    with pytest.raises(InputError, match="downsample_type and upsample_type let some levels"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": ["DDPMScheduler"]},
        {"beta_schedule": "exp"},
        {"beta_schedule": ["linear"]},
        {"beta_start": -1},
        {"beta_end": "0.02"},
        {"num_train_timesteps": 10**9},
        {"num_train_timesteps": 1000.0},
        {"trained_betas": [0.1]},
        {"trained_betas": 0.1},
        {"prediction_type": "flow_prediction"},
        {"prediction_type": {}},
        {"variance_type": "learned"},
        {"variance_type": 1},
        {"rescale_betas_zero_snr": "yes"},
        {"use_flow_sigmas": True},
    ],
    ids=str,
)
def test_a_field_of_another_diffusion_is_named(changes):
    (name,) = changes
    with pytest.raises(InputError, match=name):
        read_diffusion(SCHEDULERS["DDPM by default"] | changes)


@pytest.mark.parametrize("betas", [["a"], [[0.1]], [2.0], [-0.1], [None], [1e400]], ids=str)
def test_betas_that_are_none_are_refused(betas):
    with pytest.raises(InputError, match="betas"):
        read_diffusion({"trained_betas": betas, "num_train_timesteps": 1})


# Damage and harm


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"[1]", "holds a list; expected a JSON object"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"norm_eps": NaN}', "NaN is no number of JSON's"),
        (b'{"a": 1, "a": 2}', "a name is given twice"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"sample_size": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
    ids=["empty", "a list", "no text", "NaN", "twice", "deep", "a long number"],
)
def test_a_config_that_is_none_is_refused(content, message, tmp_path):
    write(tmp_path)
    (tmp_path / "unet" / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_folder(tmp_path)


def test_a_config_of_absurd_length_is_not_read(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(folders, "_MOST_JSON_BYTES", 100)
    with pytest.raises(InputError, match="expected a small JSON file"):
        read_folder(tmp_path)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", f"unet/{WEIGHTS}.safetensors", "unet"])
def test_a_link_out_of_the_folder_is_refused(name, tmp_path):
    folder, outside = write(tmp_path / "folder"), tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(InputError, match="a link that leads out of the folder"):
        read_folder(folder)


def test_a_link_that_looks_like_the_cache_but_leads_elsewhere_is_refused(tmp_path):
    folder = write(tmp_path / "snapshots" / "0123")
    (tmp_path / "blobs").mkdir()
    (folder / "model_index.json").rename(tmp_path / "blobs.json")
    (folder / "model_index.json").symlink_to("../../blobs.json")
    with pytest.raises(InputError, match="a link that leads out of the folder"):
        read_folder(folder)


def test_a_pipe_is_not_waited_for(tmp_path):
    write(tmp_path)
    (tmp_path / "model_index.json").unlink()
    os.mkfifo(tmp_path / "model_index.json")
    with pytest.raises(InputError, match="is no file; expected one"):
        read_folder(tmp_path)


class _Code:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    write(tmp_path)
    (tmp_path / "unet" / f"{WEIGHTS}.safetensors").unlink()
    torch.save({"conv_in.weight": _Code(tmp_path / "ran")}, tmp_path / "unet" / f"{WEIGHTS}.bin")
    with pytest.raises(InputError):
        read_folder(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"conv_in.weight": 3}, {1: torch.ones(1)}], ids=str)
def test_a_bin_of_something_else_is_refused(content, tmp_path):
    write(tmp_path)
    (tmp_path / "unet" / f"{WEIGHTS}.safetensors").unlink()
    torch.save(content, tmp_path / "unet" / f"{WEIGHTS}.bin")
    with pytest.raises(InputError, match="expected the tensors of a network"):
        read_folder(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    path = write(tmp_path) / "unet" / f"{WEIGHTS}.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        read_folder(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=f"has no {WEIGHTS}.safetensors, nor any of"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map of file names"),
        ({"weight_map": {"conv_in.weight": 1}}, "no weight_map of file names"),
        ({"weight_map": {"conv_in.weight": "../config.safetensors"}}, "has no '../config.safetensors'"),
        ({"weight_map": {"conv_in.weight": "absent.safetensors"}}, "has no 'absent.safetensors'"),
        ({"weight_map": {str(i): f"{i}.safetensors" for i in range(1001)}}, "in 1001 files"),
    ],
    ids=["empty", "no names", "a path", "absent", "many"],
)
def test_an_index_of_shards_that_is_none_is_refused(index, message, tmp_path):
    write(tmp_path)
    (tmp_path / "unet" / f"{WEIGHTS}.safetensors").unlink()
    (tmp_path / "unet" / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        read_folder(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    write(tmp_path, layers_per_block=2)
    with pytest.raises(InputError, match=r"describes a larger network than the file holds|do not fit"):
        load_model(tmp_path)


def test_queries_and_keys_of_several_shapes_are_refused(tmp_path):
    write(tmp_path)
    changed = state_of(HO_2020) | {"mid_block.attentions.0.to_k.weight": torch.ones(3)}
    save_file(changed, tmp_path / "unet" / f"{WEIGHTS}.safetensors")
    with pytest.raises(InputError, match=r"the parts of middle.1.qkv.weight are .*; expected one type and shape"):
        read_folder(tmp_path)


def test_a_config_larger_than_its_weights_makes_no_network(tmp_path):
    write(tmp_path, layers_per_block=1000)
    with pytest.raises(InputError):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["absent", "file"])
def test_what_is_no_folder_is_not_claimed(name, tmp_path):
    (tmp_path / "file").write_text("{}")
    assert not is_folder(tmp_path / name)
    assert not is_folder(tmp_path)
