"""`convert` keeps another library's model as a file of ours, whose check `info` repeats."""

import pytest
import torch
from support.commands import run, save_small_model
from support.made_weights import made_state

import ddpm_fast as df
from ddpm_fast.commands.precision import DTYPE_NAMES
from ddpm_fast.files import checkpoint
from ddpm_fast.formats import load
from ddpm_fast.formats.imported import Imported, Wrapped
from ddpm_fast.formats.load import Format
from ddpm_fast.nn import UNet, UNetConfig

CONFIG = UNetConfig(image_size=(128, 8), model_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_classes=2,
                    attention_resolutions=(), norm_groups=4, null_class=False, learned_variance=True)  # fmt: skip


def read_plain(content, path, flags):
    diffusion = df.GaussianDiffusion(df.Schedule.cosine(20), prediction="x0", variance="learned_range", loss="hybrid")
    return Imported(content["net"], CONFIG, diffusion, ["cat", "dog"], {"format": "plain", "flags": flags})


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file of another library, a stand-in."""
    monkeypatch.setattr(load, "FORMATS", (Format("plain", lambda content: "net" in content, read_plain),))
    path = tmp_path / "other.pt"
    shapes = {name: tensor.shape for name, tensor in UNet(CONFIG).state_dict().items()}
    torch.save({"net": made_state(shapes)}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_is_the_network_with_its_diffusion_and_where_it_is_from(source, tmp_path, dtype):
    out = tmp_path / "kept.safetensors"
    done = run("convert", source, "--out", out, "--flags", "--a 1", "--dtype", DTYPE_NAMES[dtype])
    assert done.exit_code == 0, done.stderr
    before, after = df.load_model(source, flags="--a 1"), df.load_model(out)
    assert after.diffusion.to_dict() == before.diffusion.to_dict() and after.label_names == ["cat", "dog"]
    assert after.origin == {"format": "plain", "flags": "--a 1", "file": "other.pt", "sha256": before.digest}
    assert after.model.config == CONFIG
    for name, weight in torch.load(source)["net"].items():
        assert torch.equal(after.model.state_dict()[name], weight.to(dtype).float())


def test_info_tells_of_a_model_and_repeats_its_check(source, tmp_path):
    out = tmp_path / "kept.safetensors"
    assert run("convert", source, "--out", out).exit_code == 0
    told = run("info", out)
    assert told.exit_code == 0, told.stderr
    for words in ("parameters", "3x128x8", "2 (cat, dog), no null class", "predicts x0", "plain", "Check: passed"):
        assert words in told.stdout


def test_info_fails_for_a_network_that_is_not_what_was_converted(source, tmp_path):
    out = tmp_path / "kept.safetensors"
    assert run("convert", source, "--out", out).exit_code == 0
    state, config = checkpoint.read_model(out)
    state["middle.0.conv1.weight"][0, 0, 0, 0] += 1
    checkpoint.save_model(out, state, config, torch.float32)
    told = run("info", out)
    assert told.exit_code == 1 and "Check: failed" in told.stdout


@pytest.mark.parametrize("record", [{}, 3, {"rms": [1, 2, "3"], "values": []}, {"rms": [1, 2, 3], "values": [[1]] * 3}])
def test_a_damaged_check_is_an_error(source, tmp_path, record):
    out = tmp_path / "kept.safetensors"
    assert run("convert", source, "--out", out).exit_code == 0
    state, config = checkpoint.read_model(out)
    checkpoint.save_model(out, state, config | {"check": record}, torch.float32)
    told = run("info", out)
    assert told.exit_code == 2 and "the check of this file has no" in told.stderr


def test_info_says_of_a_model_without_a_check_that_it_has_none(tmp_path):
    told = run("info", save_small_model(tmp_path / "m.safetensors"))
    assert told.exit_code == 0 and "Check: none" in told.stdout


def test_another_librarys_network_is_refused_by_name(source, tmp_path, monkeypatch):
    class Others(torch.nn.Module):
        shape = (3, 8, 8)

    read = lambda content, path, flags: Wrapped(Others(), df.GaussianDiffusion(df.Schedule.cosine(20)))  # noqa: E731
    monkeypatch.setattr(load, "FORMATS", (Format("others", lambda content: True, read),))
    done = run("convert", source, "--out", tmp_path / "kept.safetensors")
    assert done.exit_code == 2 and "is Others, another library's network" in done.stderr
    assert not (tmp_path / "kept.safetensors").exists()


@pytest.mark.parametrize("option, words", [("--out=x.pt", "ending in .safetensors"), ("--dtype=int8", "fp32 or bf16")])
def test_wrong_options_are_refused(source, option, words):
    done = run("convert", source, option)
    assert done.exit_code == 2 and words in done.stderr
