"""`export` writes what other libraries read, and refuses what does not belong together before anything is written."""

import json

import pytest
import torch
from support.commands import run, save_small_model
from torch.utils.tensorboard import SummaryWriter

import ddpm_fast as df
from ddpm_fast.commands import export
from ddpm_fast.commands.publishing import Publication
from ddpm_fast.files import checkpoint
from ddpm_fast.formats import hub
from ddpm_fast.formats.diffusers.export import ChainDifference
from ddpm_fast.formats.repository import target
from ddpm_fast.nn import UNet, UNetConfig


@pytest.fixture
def model(tmp_path):
    """The model of a training run, in the run's folder."""
    (tmp_path / "run").mkdir()
    return save_small_model(tmp_path / "run" / "model.safetensors", training={"data": "pets"})


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("apart", "said"),
    [(None, "not compared: install diffusers"), (ChainDifference(20, 2e-5, 1e-6), "ends at most 2.0e-05 from ours")],
    ids=["absent", "installed"],
)
def test_a_diffusers_folder_holds_the_model_and_is_compared(apart, said, model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "chain_difference", lambda *_: apart)
    done = run("export", model, "--to", "diffusers", "--out", tmp_path / "folder")
    assert done.exit_code == 0, done.stderr
    assert said in " ".join(done.stdout.split())
    assert (tmp_path / "folder" / "model_index.json").is_file()
    assert same_weights(df.load_model(tmp_path / "folder"), df.load_model(model))


def test_a_file_of_openais_names_is_read_with_the_flags_that_were_printed(tmp_path):
    config = UNetConfig(
        image_size=64, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(32,)
    )
    diffusion = df.GaussianDiffusion(df.Schedule.cosine(100))
    described = {"unet": config.to_dict(), "diffusion": diffusion.to_dict()}
    checkpoint.save_model(tmp_path / "m.safetensors", UNet(config).state_dict(), described)
    done = run("export", tmp_path / "m.safetensors", "--to", "openai", "--out", tmp_path / "m.pt")
    assert done.exit_code == 0, done.stderr
    (flags,) = [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("Flags")]
    loaded = df.load_model(tmp_path / "m.pt", flags=flags)
    assert same_weights(loaded, df.load_model(tmp_path / "m.safetensors")) and loaded.diffusion.num_timesteps == 100


def test_what_a_format_lacks_is_named_and_nothing_is_written(model, tmp_path):
    done = run("export", model, "--to", "openai", "--out", tmp_path / "m.pt")
    assert done.exit_code == 2 and "norm_groups" in done.stderr, done.stderr
    assert not (tmp_path / "m.pt").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--to=gguf", "--out=x"], "expected one of diffusers, openai, onnx, ddpm_fast"),
        (["--to=onnx"], "--out is missing"),
        (["--to=onnx", "--out=x", "--license=mit"], "--license and --public are for --push"),
        (["--to=onnx", "--push=hf:me/m"], "--license is missing"),
        (["--to=onnx", "--push=hf:me/m", "--license=my own: x"], "--license is 'my own: x'"),
        (["--to=onnx", "--push=me/m", "--license=mit"], "names no model of the Hugging Face Hub"),
        (["--to=onnx", "--push=hf:me/m@main", "--license=mit"], "expected hf:OWNER/NAME alone"),
        (["--to=onnx", "--push=hf:me/m", "--license=mit", "--samples=-1"], "expected 0..256"),
    ],
)
def test_wrong_options_are_refused(model, options, words):
    done = run("export", model, *options)
    assert done.exit_code == 2 and words in done.stderr, done.stderr


def test_the_page_of_a_run_shows_its_curve_its_samples_and_what_was_measured(model, tmp_path, monkeypatch):
    with SummaryWriter(model.parent / "curves") as writer:
        for step in (50, 100):
            writer.add_scalar("loss", 1 / step, step)
    names = ("timesteps", "counts", "terms_bits_per_dim", "terms_stderr", "mse_x0", "mse_eps")
    report = {"model": "m", "data": "pets", "images": 9, "estimate": True, "prior_bits_per_dim": 0.0,
              "total_bits_per_dim": 3.25, "total_stderr": 0.5} | {name: [1] for name in names}  # fmt: skip
    (model.parent / "nll.json").write_text(json.dumps(report))
    sent = {}

    def upload(folder, address, private):
        sent.update({path.name: path.read_bytes() for path in folder.iterdir()}, to=str(address), private=private)
        return "somewhere"

    monkeypatch.setattr(hub, "upload", upload)
    publication = Publication(target("hf:me/m"), "ddpm_fast", "mit", True, samples=3)
    (tmp_path / "sent").mkdir()
    publication.send(df.load_model(model.parent), tmp_path / "sent", torch.device("cpu"))
    page = sent["README.md"].decode()
    assert sent["to"] == "hf:me/m" and sent["private"]
    for name in ("samples.png", "loss.png"):
        assert f"]({name})" in page and sent[name].startswith(b"\x89PNG")
    assert "3.2500 bits/dim (standard error 0.5000, estimated), on 9 images" in page
    assert '"hf:me/m"' in page and "`on pets`" in page
