"""Models of ours as files of improved- and guided-diffusion. tests/golden/make_openai.py loads the same ones into their
code and compares the outputs; here they are read back."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ddpm_fast as df
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files.pickles import read_pickle
from ddpm_fast.formats.openai.export import export_flags, export_notes, export_openai
from ddpm_fast.formats.openai.names import to_theirs
from ddpm_fast.formats.openai.network import read
from ddpm_fast.formats.openai.weights import unfilled
from ddpm_fast.nn.unet import UNet
from ddpm_fast.schedule import Schedule
from tests.support.made_weights import made_state
from tests.support.openai_cases import EXPORTS, Export, export_inputs

SMALL = EXPORTS["null class"].config
LEARNED = EXPORTS["null class"].diffusion


def network(export: Export) -> UNet:
    model = UNet(export.config).eval()
    model.load_state_dict(made_state({name: value.shape for name, value in model.state_dict().items()}))
    return model


@pytest.mark.parametrize("name", EXPORTS)
def test_the_flags_say_what_was_exported(name):
    config, diffusion = EXPORTS[name].config, EXPORTS[name].diffusion
    file = to_theirs(unfilled(lambda: UNet(config)), config.heads, legacy=True)
    found = read(file, Path("model.pt"), export_flags(config, diffusion))
    assert found.unet == replace(config, num_classes=config.label_rows, null_class=not config.label_rows)
    assert found.diffusion.to_dict() == diffusion.to_dict()


@pytest.mark.parametrize("name", ["added", "upsampler"])
def test_weights_are_read_back_as_they_were(name, tmp_path):
    export, path = EXPORTS[name], tmp_path / "model.pt"
    model = network(export)
    flags = export_openai(model, export.diffusion, path)
    state = read(read_pickle(path), path, flags).state
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_the_null_class_becomes_a_class(tmp_path):
    export, path = EXPORTS["null class"], tmp_path / "model.pt"
    model = network(export)
    flags = export_openai(model, export.diffusion, path)
    found = read(read_pickle(path), path, flags)
    again = UNet(found.unet).eval()
    again.load_state_dict(found.state)
    x, t, _, _ = export_inputs(export)
    with torch.no_grad():
        assert torch.equal(again(x, t, torch.tensor([10, 10])), model(x, t))


def test_what_a_network_was_told_of_augmentation_is_left_out(tmp_path):
    export, path = EXPORTS["null class"], tmp_path / "model.pt"
    model = network(export)
    told = UNet(replace(export.config, augment_channels=9)).eval()
    told.load_state_dict(model.state_dict(), strict=False)
    torch.nn.init.ones_(told.augment_embedding.weight)
    flags = export_openai(told, export.diffusion, path)
    assert flags == export_flags(export.config, export.diffusion)
    again = to_theirs(model.state_dict(), export.config.heads, legacy=True)
    found = read_pickle(path)
    assert found.keys() == again.keys() and all(torch.equal(found[name], again[name]) for name in again)
    assert "told how images were augmented" in path.with_suffix(".flags.txt").read_text()


def test_a_file_has_its_flags_and_notes_beside_it(tmp_path):
    export = EXPORTS["null class"]
    flags = export_openai(network(export), export.diffusion, tmp_path / "new" / "model.pt")
    lines = (tmp_path / "new" / "model.flags.txt").read_text().splitlines()
    assert lines == [flags, *export_notes(export.config, export.diffusion)]
    assert "--image_size 16" in flags
    assert any("NUM_CLASSES = 11" in line for line in lines)
    assert sorted(entry.name for entry in (tmp_path / "new").iterdir()) == ["model.flags.txt", "model.pt"]


@pytest.mark.parametrize(
    ("fields", "diffusion", "named"),
    [
        ({"norm_groups": 16}, LEARNED, "norm_groups is 16"),
        ({"norm_eps": 1e-6}, LEARNED, "norm_eps is 1e-06"),
        ({"time_denominator": "half-1"}, LEARNED, "time_denominator is 'half-1'"),
        ({"time_order": "sin|cos"}, LEARNED, "time_order is 'sin|cos'"),
        ({"downsample_padding": "asymmetric"}, LEARNED, "downsample_padding is 'asymmetric'"),
        ({"middle_attention": "none"}, LEARNED, "middle_attention is 'none'"),
        ({"decoder_attention": (16,)}, LEARNED, r"decoder_attention is \(16,\)"),
        ({"timestep_scale": 3.0}, LEARNED, "timestep_scale is 3"),
        ({"stem_channels": 64}, LEARNED, "stem_channels"),
        ({"channel_mult": (1, 1.5), "model_channels": 64}, LEARNED, r"channel_mult is \(1, 1.5\)"),
        ({"condition_channels": 1}, LEARNED, "condition_channels is 1"),
        ({"condition_channels": 3}, LEARNED, "their upsamplers have"),
        ({"learned_variance": False}, LEARNED, "learned_variance is False"),
        ({}, GaussianDiffusion(Schedule.sigmoid(400), variance="learned_range", loss="vlb"), "the schedule is sigmoid"),
        ({}, LEARNED.respace(10), "the schedule is"),
        ({}, GaussianDiffusion(Schedule.linear(400), variance="learned", loss="vlb"), "variance is 'learned'"),
        (
            {},
            GaussianDiffusion(Schedule.linear(400), "v", variance="learned_range", loss="vlb"),
            "prediction is 'v'",
        ),
    ],
)
def test_what_their_code_cannot_be_is_named(fields, diffusion, named):
    with pytest.raises(InputError, match=named):
        export_flags(replace(SMALL, **fields), diffusion)


@pytest.mark.parametrize(
    ("fields", "options", "noted"),
    [
        ({"in_channels": 1}, {}, "in_channels=1 and out_channels=1"),
        ({"image_size": (16, 32)}, {}, "16x32"),
        ({}, {"variance": "fixed_small"}, "sigma_small=True"),
        ({}, {"loss": "vlb"}, "use_kl"),
        ({}, {"loss_weighting": "min_snr"}, "min_snr"),
        ({}, {"loss": "hybrid", "vlb_weight": 0.5}, "0.5"),
    ],
)
def test_what_flags_cannot_say_is_noted(fields, options, noted):
    config, diffusion = (
        replace(SMALL, learned_variance=False, **fields),
        GaussianDiffusion(Schedule.linear(400), **options),
    )
    before = export_notes(replace(SMALL, learned_variance=False), GaussianDiffusion(Schedule.linear(400)))
    new = [note for note in export_notes(config, diffusion) if note not in before]
    assert len(new) == 1
    assert noted in new[0]
    export_flags(config, diffusion)


def test_all_that_stands_against_a_model_is_named_at_once_and_nothing_is_written(tmp_path):
    loaded = df.load_model("mnist")
    with pytest.raises(InputError, match=r"norm_groups is 8.*prediction is 'v'"):
        export_openai(loaded.model, loaded.diffusion, tmp_path / "mnist.pt")
    assert not list(tmp_path.iterdir())


def test_another_network_is_refused(tmp_path):
    with pytest.raises(InputError, match="the model is a Linear; expected a UNet"):
        export_openai(torch.nn.Linear(1, 1), LEARNED, Path(tmp_path) / "model.pt")
