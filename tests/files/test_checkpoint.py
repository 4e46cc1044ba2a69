"""Checkpoints: files are read back by safetensors itself, resumed runs are compared with uninterrupted ones, and
damaged files are refused."""

import json
import os
import re
import resource
import socket
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint, tensorfile
from ddpm_fast.files.optimizer import load_optimizer_tensors, optimizer_to_tensors
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.unet_config import UNetConfig
from ddpm_fast.schedule import Schedule

CONFIG = UNetConfig(
    image_size=8, in_channels=1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4,
    attention_resolutions=(), num_classes=3,
)  # fmt: skip
DIFFUSION = GaussianDiffusion(Schedule.cosine(50), prediction="v", variance="fixed_small")


@pytest.fixture
def unet():
    torch.manual_seed(0)
    model = UNet(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # the last layer starts at 0
    return model


@pytest.fixture
def config():
    return {
        "unet": CONFIG.to_dict(),
        "diffusion": DIFFUSION.to_dict(),
        "label_names": ["nought", "one", "zwei é"],
        "training": {"steps": 10, "lr": 1e-4},
    }


@pytest.fixture
def small(tmp_path):
    """A model file of some hundred bytes, its state and its config."""
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "c": torch.zeros(0, 4)}
    checkpoint.save_model(tmp_path / "small.safetensors", state, {"k": 1})
    return tmp_path / "small.safetensors"


class Broken(Exception):
    """What a simulated disk raises."""


def broken(*args, **kwargs):
    raise Broken


def same_bits(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))


# Models


def test_a_saved_model_predicts_what_the_bfloat16_weights_predict(tmp_path, unet, config):
    path = tmp_path / "runs" / "new" / "model.safetensors"
    checkpoint.save_model(path, unet.state_dict(), config)
    loaded = checkpoint.load_model(path)
    for parameter in unet.parameters():
        parameter.data = parameter.data.bfloat16().float()
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 40]), torch.tensor([0, 2])
    assert torch.equal(loaded.model(x, t, labels), unet.eval()(x, t, labels))
    assert not loaded.model.training and next(loaded.model.parameters()).dtype == torch.float32
    assert loaded.model.config == CONFIG and loaded.config == config and loaded.path == path
    assert loaded.label_names == ["nought", "one", "zwei é"]
    assert loaded.diffusion.to_dict() == DIFFUSION.to_dict()
    np.testing.assert_array_equal(loaded.diffusion.schedule.betas, DIFFUSION.schedule.betas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_file_is_plain_safetensors(tmp_path, unet, config, dtype):
    state = {**unet.state_dict(), "count": torch.tensor([2**40 + 1])}
    checkpoint.save_model(tmp_path / "a", state, config, dtype)
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata()["format"] == "ddpm_fast model" and file.metadata()["version"] == "1"
        assert json.loads(file.metadata()["config"]) == config
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert stored.keys() == state.keys()
    for name, tensor in state.items():
        assert same_bits(stored[name], tensor if name == "count" else tensor.to(dtype)), name
    read, read_config = checkpoint.read_model(tmp_path / "a")
    assert read_config == config and all(same_bits(read[name], stored[name]) for name in stored)


def test_float32_survives_bit_for_bit_and_keeps_the_memory_format_of_the_model(tmp_path, unet, config):
    checkpoint.save_model(tmp_path / "a", unet.state_dict(), config, torch.float32)
    loaded = checkpoint.load_model(str(tmp_path / "a")).model
    assert all(same_bits(a, b) for a, b in zip(loaded.parameters(), unet.parameters(), strict=True))
    assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in unet.parameters()]


def test_load_model_in_another_dtype(tmp_path, unet, config):
    checkpoint.save_model(tmp_path / "a", unet.state_dict(), config)
    loaded = checkpoint.load_model(tmp_path / "a", dtype=torch.bfloat16).model
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    state = unet.state_dict()
    assert all(same_bits(t, state[name].bfloat16()) for name, t in loaded.state_dict().items())


def test_weights_that_share_memory_are_saved_whole(tmp_path):
    buffer = torch.arange(10.0)
    state = {"whole": buffer, "part": buffer[2:5], "again": buffer, "strided": buffer[::3]}
    checkpoint.save_model(tmp_path / "a", state, {}, torch.float32)
    read, _ = checkpoint.read_model(tmp_path / "a")
    assert all(same_bits(read[name], tensor) for name, tensor in state.items())


def test_large_finite_weights_are_saved(tmp_path):
    state = {"w": torch.full((4,), 3e38)}  # their sum is not finite
    checkpoint.save_model(tmp_path / "a", state, {}, torch.float32)
    assert same_bits(checkpoint.read_model(tmp_path / "a")[0]["w"], state["w"])


def test_a_saved_model_is_as_readable_as_other_files(small):
    (small.parent / "other").touch()
    assert stat.S_IMODE(small.stat().st_mode) == stat.S_IMODE((small.parent / "other").stat().st_mode)


def test_the_same_contents_are_the_same_bytes(tmp_path):
    """safetensors' save_file keeps the metadata in a hash map, which is ordered anew each time."""
    state = {"w": torch.arange(6.0), "b": torch.arange(3), "c": torch.zeros(5, dtype=torch.bool)}
    written = set()
    for attempt in range(20):
        names = sorted(state, reverse=attempt % 2 == 0)
        checkpoint.save_model(tmp_path / "a", {name: state[name] for name in names}, {"k": 1, "é": "x"})
        written.add((tmp_path / "a").read_bytes())
    assert len(written) == 1


def test_the_file_is_that_of_safetensors_itself_but_for_the_order_of_the_metadata(tmp_path):
    state = {
        "w": torch.randn(3, 5),
        "half": torch.ones(3).half(),
        "odd": torch.ones(3, dtype=torch.uint8),
        "é": torch.tensor(2.0),
    }
    checkpoint.save_training(tmp_path / "ours", state, {"k": "\u00e9\n"})
    with safe_open(tmp_path / "ours", framework="pt") as file:
        save_file(state, tmp_path / "theirs", file.metadata())
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    length = 8 + int.from_bytes(ours[:8], "little")
    assert json.loads(ours[8:length]) == json.loads(theirs[8:length])
    assert len(ours) == len(theirs) and ours[length:] == theirs[length:]


def test_a_tensor_of_another_type_is_refused_before_anything_is_written(tmp_path):
    for save in (checkpoint.save_model, checkpoint.save_training):
        with pytest.raises(InputError, match=r"w \(complex64 \[2\]\) cannot be stored; expected one of float64, "):
            save(tmp_path / "a", {"w": torch.zeros(2, dtype=torch.complex64)}, {})
    assert list(tmp_path.iterdir()) == []


def test_names_find_the_models_of_the_package(tmp_path, monkeypatch, unet, config):
    monkeypatch.setattr(checkpoint, "MODELS", tmp_path / "models")
    assert checkpoint.available_models() == []
    for name in ("mnist", "emoji"):
        checkpoint.save_model(tmp_path / "models" / f"{name}.safetensors", unet.state_dict(), config)
    assert checkpoint.available_models() == ["emoji", "mnist"]
    assert checkpoint.load_model("mnist").path == tmp_path / "models" / "mnist.safetensors"
    with pytest.raises(InputError, match=r"no model is called 'mnits'.* \(emoji, mnist\) or a file's path"):
        checkpoint.load_model("mnits")


def test_a_file_without_a_suffix_is_a_path(small, monkeypatch):
    small.rename(small.parent / "plain")
    monkeypatch.chdir(small.parent)
    assert checkpoint.read_model("plain")[1] == {"k": 1}


@pytest.mark.parametrize("failing", ["writer", "rename"])
@pytest.mark.parametrize("save", [checkpoint.save_model, checkpoint.save_training], ids=["model", "training"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, save, failing):
    (tmp_path / "a").write_bytes(b"old")
    module, function = (tensorfile, "_write_safetensors") if failing == "writer" else (os, "replace")
    monkeypatch.setattr(module, function, broken)
    with pytest.raises(Broken):
        save(tmp_path / "a", {"w": torch.zeros(3)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("state", "config", "message"),
    [
        pytest.param(
            {"good": torch.ones(2), "w": torch.tensor([1.0, torch.nan, torch.inf])}, {},
            r"weights that are not finite: w \(2 of 3 values\)", id="not finite",
        ),
        pytest.param({"w": torch.tensor([7e4])}, {}, r"w \(1 of 1 values.*overflow torch.float16", id="huge"),
        pytest.param({}, {"k": torch.zeros(1)}, "config cannot be written as JSON.*Tensor", id="not JSON"),
    ],
)  # fmt: skip
def test_what_must_not_be_saved_leaves_the_old_file(tmp_path, state, config, message):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(InputError, match=message):
        checkpoint.save_model(tmp_path / "a", state, config, torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


# Files that are not models


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        pytest.param(None, "that ddpm_fast did not write; expected a ddpm_fast model", id="no metadata"),
        pytest.param({"format": "pt"}, "that ddpm_fast did not write; expected a ddpm_fast model", id="foreign"),
        pytest.param({"format": "ddpm_fast training"}, "its meta is not JSON", id="training state without its meta"),
        pytest.param({"version": "2"}, "version 2, but this ddpm_fast reads versions up to 1: update", id="newer"),
        pytest.param({"version": "one"}, "version is 'one'; expected a number", id="version is a word"),
        pytest.param({"version": "0"}, "version is '0'; expected a number", id="version 0"),
        pytest.param({"config": '{"k": '}, "its config is not JSON", id="JSON cut short"),
        pytest.param({"config": "[1]"}, "its config is JSON but not an object", id="JSON list"),
        pytest.param({}, "is damaged: its contents do not match its checksum", id="no checksum"),
    ],
)
def test_other_safetensors_files_are_named_for_what_they_are(tmp_path, metadata, message):
    ours = {"format": "ddpm_fast model", "version": "1", "config": "{}"}
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(2)}, path, metadata=None if metadata is None else {**ours, **metadata})
    for read in (checkpoint.read_model, checkpoint.load_model):
        with pytest.raises(InputError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "cannot be read as safetensors", id="empty"),
        pytest.param(b"PK\x03\x04 a zip, as torch.save writes", "cannot be read as safetensors", id="pickle"),
        pytest.param(b"\x00" * 100, "cannot be read as safetensors", id="zeros"),
        pytest.param(b"\xff" * 100, "cannot be read as safetensors", id="huge header"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message):
        checkpoint.load_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize("read", [checkpoint.read_model, checkpoint.load_model, checkpoint.read_training])
def test_what_is_not_a_file_is_refused(tmp_path, small, read):
    with pytest.raises(InputError, match=r"none\.safetensors does not exist; expected a \.safetensors file"):
        read(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"is a folder; expected .* it holds small\.safetensors: give one"):
        read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is a folder; .* there is no \.safetensors file in it"):
        read(tmp_path / "empty")
    with pytest.raises(InputError, match=r"File name too long|no model is called"):
        read("x" * 300)


@pytest.mark.parametrize("read", [checkpoint.read_model, checkpoint.load_model, checkpoint.read_training])
def test_what_would_be_waited_for_is_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe.safetensors", tmp_path / "socket", "/dev/zero"):
            with pytest.raises(InputError, match=f"{path} is a device, pipe or socket; expected a .safetensors file"):
                read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[" * 100_000, "its config is not JSON", id="nested"),
        pytest.param('{"a": ' * 100_000, "its config is not JSON", id="nested objects"),
        pytest.param('{"k": 1, "k": 2}', "its config is not JSON .the key 'k' is repeated", id="repeated key"),
        pytest.param('{"k": ' + "9" * 5000 + "}", "its config is not JSON", id="a number of 5000 digits"),
    ],
)
def test_hostile_json_is_refused(tmp_path, text, message):
    metadata = {"format": "ddpm_fast model", "version": "1", "config": text}
    save_file({"w": torch.zeros(2)}, tmp_path / "a", metadata)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load_model(tmp_path / "a")
    assert len(str(caught.value)) < 1000


def out_of_memory(kind):
    """What is raised where memory cannot be had, by those who raise it."""
    if kind == "torch":
        torch.empty(2**60, dtype=torch.uint8)
    raise {
        "python": MemoryError(),
        "mmap": OSError(12, "Cannot allocate memory"),
        "rust": SafetensorError("x: out of memory"),
    }[kind]


@pytest.mark.parametrize("kind", ["torch", "python", "mmap", "rust"])
def test_a_lack_of_memory_is_not_called_damage(tmp_path, monkeypatch, unet, config, kind):
    path = checkpoint.checkpoint_path(tmp_path, 1)
    checkpoint.save_training(path, checkpoint.add_prefix("ema.", unet.state_dict()), config)
    message = r"step-00000001\.safetensors needs about 0 MiB of memory, and there is not so much \(.+\): close other"
    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "safe_open", lambda *_, **__: out_of_memory(kind))
        for read in (checkpoint.load_model, checkpoint.read_training):
            with pytest.raises(InputError, match=message):
                read(path)
        with pytest.raises(InputError, match=message):  # and nobody goes back to an older state for it
            checkpoint.newest_readable(tmp_path)
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_: out_of_memory(kind))
    with pytest.raises(InputError, match=message):
        checkpoint.load_model(path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_a_file_larger_than_the_memory_is_told_so(tmp_path):
    checkpoint.save_training(tmp_path / "a", {"w": torch.zeros(2**26)}, {})
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
            checkpoint.read_training(tmp_path / "a")
        except BaseException as error:
            os.write(tell, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(tell)
    os.waitpid(child, 0)
    with open(told) as pipe:
        assert re.match(r"InputError: .*a needs about 256 MiB of memory, and there is not so much", pipe.read())


def test_every_truncation_is_refused(small):
    content = small.read_bytes()
    for length in range(len(content)):
        small.write_bytes(content[:length])
        with pytest.raises(InputError):
            checkpoint.read_model(small)


@pytest.mark.parametrize("flip", [0x01, 0x02, 0x10, 0x20, 0x80, 0xFF], ids=hex)
def test_every_flipped_byte_is_refused_or_does_no_harm(small, flip):
    """The CRC catches what still parses: another dtype of the same size, a digit in the config, a weight."""
    content = small.read_bytes()
    state, config = checkpoint.read_model(small)
    state = {name: tensor.clone() for name, tensor in state.items()}
    refused = 0
    for position in range(len(content)):
        small.write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
        try:
            read, read_config = checkpoint.read_model(small)
        except InputError:
            refused += 1
            continue
        assert read_config == config and read.keys() == state.keys(), position
        assert all(same_bits(read[name], state[name]) for name in state), position
    assert refused >= len(content) - 8  # what may pass: the spaces that pad the header


def test_random_damage_is_refused(small):
    content = np.frombuffer(small.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = content.copy()
        where = rng.integers(0, len(content), size=rng.integers(2, 9))
        damaged[where] = rng.integers(0, 256, size=len(where))
        if np.array_equal(damaged, content):
            continue
        small.write_bytes(damaged.tobytes())
        with pytest.raises(InputError):
            checkpoint.read_model(small)


def test_weights_that_do_not_fit_are_named_with_both_shapes(tmp_path, unet, config):
    state = unet.state_dict()
    state["conv_in.weight"] = torch.zeros(8, 3, 3, 3)
    del state["conv_out.bias"]
    state.update({f"extra.{i}": torch.zeros(i) for i in range(5)})
    checkpoint.save_model(tmp_path / "a", state, config)
    with pytest.raises(InputError) as caught:
        checkpoint.load_model(tmp_path / "a")
    assert "missing conv_out.bias [1];" in str(caught.value)
    assert "unexpected extra.0 [0], extra.1 [1], extra.2 [2] and 2 more;" in str(caught.value)
    assert "of another shape conv_in.weight [8, 3, 3, 3] instead of [8, 1, 3, 3]." in str(caught.value)


def test_weights_that_are_not_finite_are_refused(tmp_path, unet, config, monkeypatch):
    state = unet.state_dict()
    state["conv_out.bias"] = torch.tensor([torch.nan])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "check_finite", lambda *_: None)  # a writer that does not look
        checkpoint.save_model(tmp_path / "a", state, config)
    with pytest.raises(InputError, match=r"/a has weights that are not finite: conv_out.bias \(1 of 1 values\)"):
        checkpoint.load_model(tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_no_floats_are_refused(tmp_path, unet, config, dtype):
    state = {name: tensor.contiguous() for name, tensor in unet.state_dict().items()}
    state["conv_out.bias"] = torch.zeros(1).to(dtype)
    text = json.dumps(config)
    metadata = {"format": "ddpm_fast model", "version": "1", "config": text, "crc32": tensorfile._crc(state, text)}
    save_file(state, tmp_path / "a", metadata)
    with pytest.raises(InputError, match=r"of another type than float32, bfloat16, float16, float64: conv_out.bias"):
        checkpoint.load_model(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"unet": None}, "its config lacks unet", id="no U-Net"),
        pytest.param({"unet": None, "diffusion": None}, "its config lacks unet and diffusion", id="neither"),
        pytest.param({"unet": {**CONFIG.to_dict(), "depth": 3}}, "unknown U-Net config field", id="unknown field"),
        pytest.param({"unet": {**CONFIG.to_dict(), "norm_groups": 5}}, "norm_groups", id="impossible U-Net"),
        pytest.param({"unet": [1]}, "expected a dict", id="U-Net is a list"),
        pytest.param({"diffusion": {}}, "a diffusion is described by a dict with the keys", id="empty diffusion"),
        pytest.param(
            {"diffusion": {**DIFFUSION.to_dict(), "prediction": "noise"}},
            "prediction",
            id="unknown prediction",
        ),
        pytest.param({"diffusion": {**DIFFUSION.to_dict(), "schedule": 7}}, "schedule", id="schedule is a number"),
    ],
)
def test_a_config_that_builds_nothing_is_refused(tmp_path, unet, config, change, message):
    config = {key: value for key, value in {**config, **change}.items() if value is not None}
    checkpoint.save_model(tmp_path / "a.safetensors", unet.state_dict(), config)
    with pytest.raises(InputError, match=rf"a\.safetensors: .*{message}"):
        checkpoint.load_model(tmp_path / "a.safetensors")


# Training states


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    ],
    ids=str,
)
def test_training_tensors_are_kept_bit_for_bit(tmp_path, dtype):
    rows = torch.randint(0, 256, (5, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    any_bits = rows % 2 == 0 if dtype == torch.bool else rows.view(dtype)  # NaN payloads and subnormals included
    tensors = {
        "model.w": any_bits,
        "model.t": any_bits.t(),
        "optim.scalar": any_bits[0, 0],
        "ema.none": any_bits[:0],
    }
    meta = {"step": 2**53 + 1, "config": {"unet": CONFIG.to_dict()}, "args": {"lr": 1e-4, "data": "é"}}
    checkpoint.save_training(tmp_path / "a", tensors, meta)
    read, read_meta = checkpoint.read_training(tmp_path / "a")
    assert read_meta == meta and read.keys() == tensors.keys()
    assert all(same_bits(read[name], tensor) for name, tensor in tensors.items())


def test_a_folder_that_cannot_be_looked_into_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert checkpoint.latest_checkpoint(tmp_path / "file") is None
    for look in (checkpoint.latest_checkpoint, checkpoint.newest_readable, checkpoint.prune_checkpoints):
        with pytest.raises(InputError, match=r"x cannot be looked into \(File name too long\); choose another folder"):
            look("x" * 256)
    monkeypatch.setattr(os, "listdir", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(InputError, match=r"cannot be looked into \(Permission denied\)"):
        checkpoint.latest_checkpoint(tmp_path)


def save_states(folder, unet, config, steps):
    """Training states that differ in their weights, oldest first."""
    paths = [checkpoint.checkpoint_path(folder, step) for step in steps]
    for step, path in zip(steps, paths, strict=True):
        ema = {name: tensor + step for name, tensor in unet.state_dict().items()}
        tensors = checkpoint.add_prefix("ema.", ema) | checkpoint.add_prefix("model.", unet.state_dict())
        checkpoint.save_training(path, tensors, {**config, "step": step, "arguments": {}})
    return paths


def test_the_newest_whole_state_is_found_and_the_damaged_ones_are_named(tmp_path, unet, config):
    assert checkpoint.newest_readable(tmp_path) == (None, [])
    paths = save_states(tmp_path, unet, config, range(1, 6))
    assert checkpoint.newest_readable(tmp_path) == (paths[4], [])
    paths[4].write_bytes(b"")
    paths[3].write_bytes(paths[3].read_bytes()[:-1])
    save_file({"w": torch.zeros(2)}, paths[2])
    newest, damaged = checkpoint.newest_readable(tmp_path)
    assert newest == paths[1] and [path for path, _ in damaged] == [paths[4], paths[3], paths[2]]
    for (path, reason), what in zip(damaged, ("cannot be read", "cannot be read", "did not write"), strict=True):
        assert str(path) in reason and what in reason
    for path in paths[:2]:
        path.write_bytes(b"")
    newest, damaged = checkpoint.newest_readable(tmp_path)
    assert newest is None and len(damaged) == 5


def test_a_state_of_a_newer_format_is_not_passed_over(tmp_path, unet, config, monkeypatch):
    save_states(tmp_path, unet, config, [1])
    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "VERSION", 2)
        save_states(tmp_path, unet, config, [2])
    with pytest.raises(InputError, match=r"has format version 2.*update ddpm_fast"):
        checkpoint.newest_readable(tmp_path)


def test_a_training_state_and_the_folder_of_a_run_are_models(tmp_path, unet, config, monkeypatch):
    paths = save_states(tmp_path, unet, config, [1, 2])

    def shift(path_or_name):
        """By how much the weights of a loaded model differ from unet's, and the file that they are from."""
        loaded = checkpoint.load_model(path_or_name)
        assert loaded.config == config and loaded.label_names == config["label_names"]
        return round((loaded.model.conv_out.bias - unet.conv_out.bias).item(), 2), loaded.path

    assert shift(paths[0]) == (1, paths[0])
    assert shift(tmp_path) == (2, paths[1])
    paths[1].write_bytes(b"")
    with pytest.warns(UserWarning, match=rf"taken from {paths[0]}, the newest .* whole; {paths[1]} cannot be read"):
        assert shift(tmp_path) == (1, paths[0])
    checkpoint.save_model(tmp_path / "model.safetensors", unet.state_dict(), config)
    assert shift(tmp_path) == (0, tmp_path / "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert shift(f"~/{tmp_path.name}") == (0, tmp_path / "model.safetensors")
    assert shift(f"~/{tmp_path.name}/{paths[0].name}") == (1, paths[0])
    assert checkpoint.read_model(tmp_path)[1] == config


def test_a_folder_without_a_model_says_what_it_holds(tmp_path, unet, config):
    (path,) = save_states(tmp_path, unet, config, [1])
    path.write_bytes(b"")
    with pytest.raises(InputError, match=rf"is a folder; expected a model, .*holds {path.name}.*{path} cannot be read"):
        checkpoint.load_model(tmp_path)


def test_a_model_is_no_training_state(small):
    with pytest.raises(InputError, match="is a ddpm_fast model file; expected a ddpm_fast training file"):
        checkpoint.read_training(small)


def test_prefixes_tell_the_parts_apart():
    a, b = torch.zeros(1), torch.ones(1)
    flat = {
        **checkpoint.add_prefix("model.", {"w": a, "model.w": b}),
        **checkpoint.add_prefix("ema.", {"w": b}),
    }
    assert list(flat) == ["model.w", "model.model.w", "ema.w"]
    assert checkpoint.take_prefix("model.", flat) == {"w": a, "model.w": b}
    assert checkpoint.take_prefix("ema.", flat) == {"w": b}
    assert checkpoint.take_prefix("optim.", flat) == {}


def test_the_latest_is_the_highest_step_and_pruning_keeps_it(tmp_path):
    assert checkpoint.latest_checkpoint(tmp_path) is None
    assert checkpoint.latest_checkpoint(tmp_path / "nowhere") is None
    assert checkpoint.prune_checkpoints(tmp_path) == []
    paths = {step: checkpoint.checkpoint_path(tmp_path, step) for step in (0, 999, 1000, 99999999, 100000000)}
    assert paths[1000].name == "step-00001000.safetensors"
    for path in paths.values():
        path.touch()
    others = ["step-last.safetensors", "step-00002000.safetensors.part", "model.safetensors", ".ddpm_fast-x"]
    for name in (*others, ".ddpm_fast-0123456789abcdef.tmp"):
        (tmp_path / name).touch()
    checkpoint.checkpoint_path(tmp_path, 10**9).mkdir()
    assert checkpoint.latest_checkpoint(tmp_path) == paths[100000000]
    assert checkpoint.prune_checkpoints(tmp_path) == [paths[0], paths[999], paths[1000]]
    left = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert left == {*others, paths[99999999].name, paths[100000000].name}
    with pytest.raises(InputError, match="keep is 0; expected at least 1"):
        checkpoint.prune_checkpoints(tmp_path, keep=0)
    assert checkpoint.prune_checkpoints(tmp_path, keep=1) == [paths[99999999]]


# The optimizer


class Net(nn.Module):
    """A convolution in channels_last, a layer, and a parameter that no gradient reaches."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(4, 2)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.linear(self.conv(x).mean(dim=(2, 3)))


def adamw(net, **options):
    """Two groups, the second in another order than the model's."""
    decayed, rest = [net.linear.weight, net.conv.weight], [net.idle, net.linear.bias, net.conv.bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, **options)


def train(net, opt, steps):
    for step in steps:
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"capturable": False}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options):
    straight = Net(0)
    opt = adamw(straight, **options)
    train(straight, opt, range(3))
    optim = optimizer_to_tensors(opt, straight.named_parameters())
    tensors = checkpoint.add_prefix("model.", straight.state_dict()) | checkpoint.add_prefix("optim.", optim)
    checkpoint.save_training(tmp_path / "a", tensors, {})
    train(straight, opt, range(3, 6))

    resumed = Net(1)
    opt_resumed = adamw(resumed, **options)
    train(resumed, opt_resumed, range(1))  # state to be replaced
    read, _ = checkpoint.read_training(tmp_path / "a")
    resumed.load_state_dict(checkpoint.take_prefix("model.", read))
    optim = checkpoint.take_prefix("optim.", read)
    load_optimizer_tensors(opt_resumed, dict(resumed.named_parameters()), optim)
    for name, tensor in optimizer_to_tensors(opt_resumed, resumed.named_parameters()).items():
        assert same_bits(tensor, optim[name]), name
    moment = opt_resumed.state[resumed.conv.weight]["exp_avg"]
    assert moment.stride() == resumed.conv.weight.stride() and not moment.requires_grad
    train(resumed, opt_resumed, range(3, 6))
    assert all(same_bits(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert same_bits(optim["conv.bias.step"], torch.tensor(3.0))  # the file's tensors are not the optimizer's


def test_a_parameter_that_was_never_stepped_has_only_a_step_of_0():
    net = Net(0)
    opt = adamw(net)
    fresh = optimizer_to_tensors(opt, net.named_parameters())
    assert set(fresh) == {f"{name}.step" for name, _ in net.named_parameters()}
    assert all(same_bits(step, torch.zeros(())) for step in fresh.values())
    train(net, opt, range(1))
    after = set(optimizer_to_tensors(opt, net.named_parameters()))
    assert {key for key in after if key.startswith("idle")} == {"idle.step"}
    assert {key for key in after if key.startswith("conv.bias")} == {
        "conv.bias.step", "conv.bias.exp_avg", "conv.bias.exp_avg_sq",
    }  # fmt: skip
    load_optimizer_tensors(opt, net.named_parameters(), fresh)
    assert not opt.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"conv.bias.step": None}, r"missing conv\.bias\.step", id="no step"),
        pytest.param({"conv.bias.exp_avg": None}, r"missing conv\.bias\.exp_avg\.", id="one of the moments"),
        pytest.param({"old.exp_avg": torch.zeros(1)}, r"unexpected old\.exp_avg", id="another model"),
        pytest.param(
            {"conv.bias.exp_avg": torch.zeros(5)},
            r"conv\.bias\.exp_avg float32 \[5\] instead of float32 \[4\]", id="another shape",
        ),
        pytest.param(
            {"conv.bias.exp_avg_sq": torch.zeros(4, dtype=torch.bfloat16)},
            r"conv\.bias\.exp_avg_sq bfloat16 \[4\] instead of float32 \[4\]", id="another dtype",
        ),
        pytest.param({"idle.step": torch.tensor(3)}, r"idle\.step int64 \[\] instead", id="integer step"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    net = Net(0)
    opt = adamw(net)
    train(net, opt, range(2))
    before = optimizer_to_tensors(opt, net.named_parameters())
    copies = {name: tensor.clone() for name, tensor in before.items()}
    changed = {name: tensor for name, tensor in {**copies, **change}.items() if tensor is not None}
    with pytest.raises(InputError, match=f"does not fit the model: .*{message}"):
        load_optimizer_tensors(opt, net.named_parameters(), changed)
    after = optimizer_to_tensors(opt, net.named_parameters())
    assert all(after[name] is not None and same_bits(after[name], copies[name]) for name in copies)


def test_optimizers_that_cannot_be_kept_are_refused():
    net = Net(0)
    with pytest.raises(InputError, match=r"1 of the optimizer's 5 parameters have no name, the first of shape \[2\]"):
        optimizer_to_tensors(adamw(net), [(n, p) for n, p in net.named_parameters() if n != "idle"])
    opt = adamw(net, amsgrad=True)
    train(net, opt, range(1))
    with pytest.raises(InputError, match=r"keeps max_exp_avg_sq for .*; expected AdamW without amsgrad"):
        optimizer_to_tensors(opt, net.named_parameters())
