"""load_model takes models of every kind, told apart by what they hold, and refuses the others by name."""

import json
from pathlib import Path

import pytest
import torch
from support.commands import save_small_model
from support.made_weights import made_input, made_state

import ddpm_fast as df
from ddpm_fast.files import checkpoint
from ddpm_fast.formats import load
from ddpm_fast.formats.imported import Imported, Wrapped
from ddpm_fast.formats.load import Folder, Format, load_model
from ddpm_fast.nn import UNet, UNetConfig

SMALL = UNetConfig(image_size=(8, 16), model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
                   attention_resolutions=(), norm_groups=4)  # fmt: skip


def diffusion() -> df.GaussianDiffusion:
    return df.GaussianDiffusion(df.Schedule.cosine(20))


def made_unet() -> UNet:
    model = UNet(SMALL)
    model.load_state_dict(made_state({name: t.shape for name, t in model.state_dict().items()}))
    return model.eval()


def read_plain(content, path, flags):
    """A stand-in for another library's format: our own names below "net"."""
    assert isinstance(path, Path)
    return Imported(content["net"], SMALL, diffusion(), origin={"format": "plain", "flags": flags})


PLAIN = Format("plain", lambda content: isinstance(content, dict) and "net" in content, read_plain)


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """A file of the stand-in format, which load_model knows inside."""
    monkeypatch.setattr(load, "FORMATS", (PLAIN,))
    path = tmp_path / "weights.anything"
    torch.save({"net": made_unet().state_dict()}, path)
    return path


def test_a_file_is_loaded_by_the_format_that_claims_what_it_holds(plain):
    loaded = load_model(plain, flags="--a 1")
    x, t = made_input("x", (2, 3, 8, 16)), torch.tensor([0, 19])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(x, t), made_unet()(x, t))
    assert loaded.shape == (3, 8, 16) and loaded.classes == 0 and loaded.has_null_class
    assert loaded.origin == {"format": "plain", "flags": "--a 1"} and loaded.diffusion.num_timesteps == 20


def test_what_was_loaded_can_be_saved_as_a_model_of_ours(plain, tmp_path):
    loaded = load_model(plain)
    checkpoint.save_model(tmp_path / "own.safetensors", loaded.model.state_dict(), loaded.config, torch.float32)
    again = load_model(tmp_path / "own.safetensors")
    assert again.origin == loaded.origin
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), loaded.model.parameters(), strict=True))


def test_the_digest_tells_the_weights_and_the_flags_apart(plain):
    one, other = load_model(plain).digest, load_model(plain, flags="--a 1").digest
    assert one == load_model(plain, dtype=torch.bfloat16).digest != other
    torch.save({"net": {name: t + 1 for name, t in made_unet().state_dict().items()}}, plain)
    assert load_model(plain).digest != one


def test_a_file_of_no_format_is_described_and_the_formats_are_named(plain):
    torch.save({"weights\x1b": torch.zeros(2, 3), "epoch": 4}, plain)
    with pytest.raises(
        df.InputError, match=r"no known format.*weights\\x1b \(float32 \[2, 3\]\), epoch \(int\).*plain"
    ):
        load_model(plain)


def test_a_file_of_two_formats_is_refused(plain, monkeypatch):
    monkeypatch.setattr(load, "FORMATS", (PLAIN, Format("second", PLAIN.claims, read_plain)))
    with pytest.raises(df.InputError, match="plain or of second"):
        load_model(plain)


def test_weights_that_do_not_fit_the_config_are_refused(plain):
    torch.save({"net": {"conv_in.weight": torch.zeros(3)}}, plain)
    with pytest.raises(df.InputError, match="larger network than the file holds"):
        load_model(plain)


def test_code_in_a_file_is_not_run(plain, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was-run",))

    torch.save({"net": Evil()}, plain)
    with pytest.raises(df.InputError):
        load_model(plain)
    assert not (tmp_path / "was-run").exists()


class Other(torch.nn.Module):
    """Another library's network."""

    shape, classes = (3, 8, 8), None

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x, t):
        return self.layer(x)


@pytest.fixture
def wrapped(plain, monkeypatch):
    """A file whose network is none of ours."""
    read = lambda content, path, flags: Wrapped(Other(), diffusion(), {"format": "others"})  # noqa: E731
    monkeypatch.setattr(load, "FORMATS", (Format("others", PLAIN.claims, read),))
    return plain


def test_another_librarys_network_is_not_taken_for_ours(wrapped):
    loaded = load_model(wrapped, dtype=torch.float64)
    assert loaded.shape == (3, 8, 8) and next(loaded.model.parameters()).dtype == torch.float64
    with pytest.raises(df.InputError, match="others's Other, another library's network"):
        loaded.unet  # noqa: B018


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of a stand-in format."""
    path = tmp_path / "pipeline"
    (path / "unet").mkdir(parents=True)
    (path / "unet" / "config.json").write_text("{}")
    torch.save(made_unet().state_dict(), path / "unet" / "weights.bin")
    found = Folder(
        "pipelines",
        lambda path: (path / "unet" / "config.json").exists(),
        lambda path, flags: Imported(
            torch.load(path / "unet" / "weights.bin"), SMALL, diffusion(), origin={"format": "p"}
        ),
    )
    monkeypatch.setattr(load, "FOLDERS", (found,))
    return path


def test_a_folder_is_loaded_and_its_digest_is_of_weights_and_config(folder):
    loaded = load_model(folder)
    assert loaded.origin == {"format": "p"}
    (folder / "README.md").write_text("another text")
    assert load_model(folder).digest == loaded.digest
    (folder / "unet" / "config.json").write_text("{} ")
    assert load_model(folder).digest != loaded.digest


def test_the_folder_of_a_training_run_is_still_ours(folder, tmp_path):
    (tmp_path / "run").mkdir()
    save_small_model(tmp_path / "run" / "model.safetensors")
    assert load_model(tmp_path / "run").classes == 3


def test_flags_are_refused_where_the_source_says_all_itself():
    with pytest.raises(df.InputError, match="flags are for files that do not"):
        load_model("mnist", flags="--image_size 8")


def test_a_name_that_looks_like_one_of_the_hub_is_told_how(tmp_path):
    with pytest.raises(df.InputError, match="hf:google/ddpm-cifar10-32"):
        load_model("google/ddpm-cifar10-32")


def test_weights_of_others_are_refused_with_their_folder(folder):
    torch.save({"w": torch.zeros(1)}, folder / "weights.bin")
    with pytest.raises(df.InputError, match="belongs to a folder of pipelines: give that"):
        load_model(folder / "weights.bin")
    (folder / "unet" / "weights.safetensors").write_bytes(_safetensors())
    (folder / "weights.safetensors").write_bytes(_safetensors())
    with pytest.raises(df.InputError, match=r"did not write.*belongs to a folder of pipelines: give that"):
        load_model(folder / "weights.safetensors")


def _safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0"
