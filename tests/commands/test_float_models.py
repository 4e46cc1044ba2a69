"""A model of float data, from the array to samples in its units."""

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_fast as df
from ddpm_fast.data import load_dataset
from ddpm_fast.files import checkpoint
from ddpm_fast.loops.training import TrainConfig, Trainer
from ddpm_fast.nn import UNetConfig
from ddpm_fast.values import ValueRange
from tests.support.commands import run, save_small_model
from tests.support.train_command import command, meta, start


def fields(channels, side=8, count=6):
    """Float32 whose channels lie around 0, 1000, 2000 ... with a spread of 1, 10, 100 ..."""
    rng = np.random.default_rng(channels)
    spread = 10.0 ** np.arange(channels).reshape(1, channels, 1, 1)
    return (rng.normal(0, 1, (count, channels, side, side)) * spread + 1000 * np.log10(spread)).astype(np.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on four channels, laid out NHWC."""
    folder = tmp_path_factory.mktemp("floats")
    np.savez(folder / "data.npz", images=fields(4).transpose(0, 2, 3, 1))
    said = start(folder / "data.npz", folder / "run", "--steps=3", "--sample-every=3").stdout
    assert "6 images 4x8x8 from data.npz (floats NHWC, " in said
    return folder / "run"


def test_training_on_floats_is_training_on_them_scaled(tmp_path):
    """Two steps give the weights that they give on an array which numpy has scaled to [-1, 1]."""
    values = fields(2)
    low, high = values.min((0, 2, 3), keepdims=True), values.max((0, 2, 3), keepdims=True)
    scaled = (values.astype(np.float64) - low) / (high.astype(np.float64) - low) * 2 - 1
    np.save(tmp_path / "values.npy", values)
    np.save(tmp_path / "scaled.npy", scaled)  # float64, so that nothing is rounded before the package rounds it
    states = []
    for name in ("values", "scaled"):
        network = UNetConfig(8, 2, 4, (1,), 1, (), norm_groups=1)
        diffusion = df.GaussianDiffusion(df.Schedule.cosine(20), prediction="v", variance="fixed_small")
        dataset = load_dataset(tmp_path / f"{name}.npy")
        trainer = Trainer(network, diffusion, TrainConfig(batch_size=4, warmup=1), dataset, torch.device("cpu"))
        for _ in range(2):
            trainer.train_step()
        states.append(trainer.model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-6, atol=1e-7)
    assert states[0]["conv_out.weight"].abs().max() > 0  # which a new network has not: something was learned


def test_the_model_and_the_states_keep_the_range(trained):
    values = fields(4)
    loaded = df.load_model(trained)
    expected = ValueRange(tuple(values.min((0, 2, 3)).tolist()), tuple(values.max((0, 2, 3)).tolist()), "NHWC")
    assert loaded.value_range == expected
    assert ValueRange.from_dict(meta(trained)["value_range"]) == expected
    assert df.load_model(checkpoint.latest_checkpoint(trained)).value_range == expected
    x = torch.rand(3, 4, 8, 8) * 2 - 1
    low, high = (np.asarray(ends)[:, None, None] for ends in (expected.low, expected.high))
    np.testing.assert_allclose(loaded.to_values(x), low + (x.numpy() + 1) / 2 * (high - low), rtol=1e-6)
    torch.testing.assert_close(loaded.to_model(loaded.to_values(x)), x, rtol=0, atol=1e-4)
    with Image.open(trained / "samples-00000003.png") as grid:
        assert grid.mode == "RGB"  # the first three channels


def test_samples_come_out_in_units_and_layout(trained, tmp_path):
    done = run("sample", f"--model={trained}", "--n=3", "--steps=2", f"--out={tmp_path / 'x.npz'}", "--device=cpu")
    assert done.exit_code == 0, done.stderr
    images = np.load(tmp_path / "x.npz")["images"]
    loaded = df.load_model(trained)
    x = df.sample(loaded.model, loaded.diffusion, 3, steps=2, seed=0)
    low, high = np.asarray(loaded.value_range.low), np.asarray(loaded.value_range.high)
    assert images.dtype == np.float32 and images.shape == (3, 8, 8, 4)
    np.testing.assert_allclose(images, low + (x.permute(0, 2, 3, 1).double().numpy() + 1) / 2 * (high - low), rtol=1e-6)


def test_a_folder_of_parts_is_in_units_too(trained, tmp_path):
    options = [f"--model={trained}", "--n=3", "--steps=2", "--device=cpu"]
    done = run("sample", *options, f"--out={tmp_path / 'parts'}", "--format=npz", "--batch-size=2")
    assert done.exit_code == 0, done.stderr
    run("sample", *options, f"--out={tmp_path / 'x.npz'}", "--batch-size=2")
    parts = [np.load(tmp_path / "parts" / name)["images"] for name in ("000000-000001.npz", "000002-000002.npz")]
    assert parts[0].dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(parts), np.load(tmp_path / "x.npz")["images"])


@pytest.mark.parametrize("out", ["grid.png", "folder"])
def test_what_pictures_cannot_keep_is_refused(trained, tmp_path, out):
    done = run("sample", f"--model={trained}", "--n=1", "--steps=2", f"--out={tmp_path / out}")
    assert done.exit_code == 2 and "floats of 4 channels" in done.stderr and ".npz" in done.stderr
    done = run("sample", f"--model={trained}", "--n=1", f"--out={tmp_path / 'x.npz'}", f"--gif={tmp_path / 'x.gif'}")
    assert done.exit_code == 2 and "--gif shows 1 or 3 channels" in done.stderr
    assert not list(tmp_path.iterdir())


def test_one_channel_is_shown_and_edited(tmp_path, monkeypatch):
    """An .npz of floats is edited in its units: where the mask is white it keeps its values."""
    monkeypatch.chdir(tmp_path)
    field = fields(1) * 3 + 50
    np.save("data.npy", field[:, 0])
    start(tmp_path / "data.npy", tmp_path / "run", "--steps=2")
    assert df.load_model("run").value_range.layout == "NHW"
    done = run("sample", "--model=run", "--n=2", "--steps=2", "--out=grid.png")
    assert done.exit_code == 0 and Image.open("grid.png").mode == "L"
    done = run("sample", "--model=run", "--n=2", "--steps=2")
    assert done.exit_code == 0 and np.load("samples.npz")["images"].shape == (2, 8, 8)

    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save("mask.png")
    np.savez("first.npz", images=field[:1, 0])
    options = ["--model=run", "--n=2", "--steps=3", "--resamplings=1", "--out=edited.npz"]
    done = run("sample", *options, "--init-image=first.npz", "--mask=mask.png")
    assert done.exit_code == 0, done.stderr
    edited = np.load("edited.npz")["images"]
    np.testing.assert_allclose(edited[:, :, :4], np.repeat(field[:1, 0, :, :4], 2, 0), rtol=1e-6)
    assert np.abs(edited[0, :, 4:] - field[0, 0, :, 4:]).max() > 0.1
    done = run("sample", "--model=run", "--steps=4", "--init-image=first.npz", "--round-trip", "--out=back.npz")
    assert done.exit_code == 0 and "Round trip: mean squared error" in done.stdout

    done = run("sample", "--model=run", "--init-image=mask.png")
    assert done.exit_code == 2 and "give an .npz or .npy" in done.stderr
    save_small_model("bytes.safetensors", classes=0, channels=1)
    done = run("sample", "--model=bytes.safetensors", "--init-image=first.npz")
    assert done.exit_code == 2 and "has floats; expected 8-bit images" in done.stderr


def test_a_run_keeps_its_range(trained, tmp_path):
    """Resumed on other values, with --new-data, a run goes on in the units that it began with."""
    before = meta(trained)["value_range"]
    folder = tmp_path / "run"
    folder.mkdir()
    state = checkpoint.latest_checkpoint(trained)
    (folder / state.name).write_bytes(state.read_bytes())
    command(f"--out={folder}", "--resume", "--steps=4")
    assert meta(folder)["value_range"] == before
    np.save(tmp_path / "wider.npy", fields(4).transpose(0, 2, 3, 1) * 3)
    done = command(f"--out={folder}", "--resume", "--steps=5", f"--data={tmp_path / 'wider.npy'}", status=2)
    assert "is not what this run was trained on" in done.stderr
    done = command(f"--out={folder}", "--resume", "--steps=5", f"--data={tmp_path / 'wider.npy'}", "--new-data")
    assert meta(folder)["step"] == 5 and meta(folder)["value_range"] == before
    assert "are clipped to it" in done.stdout
    done = command(f"--out={folder}", "--resume", "--steps=6", "--value-range=0,1", status=2)
    assert "--value-range 0,1 differs from the None" in done.stderr


def test_the_options_of_floats(tmp_path):
    np.save(tmp_path / "a.npy", fields(8))
    done = start(tmp_path / "a.npy", tmp_path / "run", "--steps=1", status=2)
    assert "both would have squares" in done.stderr and "--layout" in done.stderr
    start(tmp_path / "a.npy", tmp_path / "run", "--steps=1", "--layout=NCHW", "--value-range=-4,8000")
    assert meta(tmp_path / "run")["value_range"] == {"low": [-4.0] * 8, "high": [8000.0] * 8, "layout": "NCHW"}
    command(f"--out={tmp_path / 'run'}", "--resume", "--steps=2")
    assert meta(tmp_path / "run")["step"] == 2


def test_likelihoods_of_floats_are_refused(trained, tmp_path):
    for what in (["nll"], ["samplers", "--steps=2"]):
        done = run("evaluate", *what[:1], f"--model={trained}", "--data=mnist5k", f"--out={tmp_path / 'x.json'}")
        assert done.exit_code == 2 and "was trained on floats" in done.stderr, done.stderr
    np.save(tmp_path / "a.npy", fields(3))
    save_small_model(tmp_path / "bytes.safetensors")
    done = run("evaluate", "nll", f"--model={tmp_path / 'bytes.safetensors'}", f"--data={tmp_path / 'a.npy'}")
    assert done.exit_code == 2 and "has floats, but the model was trained on 8-bit images" in done.stderr
    done = run("prepare", f"--data={tmp_path / 'a.npy'}", f"--out={tmp_path / 'cache'}")
    assert done.exit_code == 2 and "no decoding; train from it as it is" in done.stderr
    with pytest.raises(df.InputError, match="trained on 8-bit images, which have no units"):
        df.load_model(tmp_path / "bytes.safetensors").to_values(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"low": [0], "high": [1], "layout": "NCHW"}, "value_range has 1 channels, the network 3"),
        ({"low": [0] * 3, "high": ["1"] * 3, "layout": "NCHW"}, "expected one number for each"),
        ("NCHW", "expected an object of low, high and layout"),
    ],
)
def test_a_model_whose_range_is_none_is_refused(tmp_path, entry, words):
    path = save_small_model(tmp_path / "m.safetensors")
    state, config = checkpoint.read_model(path)
    checkpoint.save_model(path, state, config | {"value_range": entry})
    with pytest.raises(df.InputError, match=words):
        df.load_model(path)
