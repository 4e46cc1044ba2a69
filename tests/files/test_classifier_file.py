"""A classifier's file gives back the classifier, and neither takes a model's place nor the other way round."""

import json

import pytest
import torch
from support.networks import random_classifier, random_unet

import ddpm_fast as df
from ddpm_fast.files import tensorfile
from ddpm_fast.files.classifier import digest_of

FIELDS = {"image_size": 8, "in_channels": 1, "model_channels": 8, "channel_mult": (1, 2), "norm_groups": 4}


@pytest.mark.parametrize("pool", ["attention", "spatial_v2"])
def test_it_comes_back_bit_for_bit(pool, tmp_path):
    made = random_classifier(pool, **FIELDS)
    df.save_classifier(tmp_path / "judge.safetensors", made)
    found = df.load_classifier(tmp_path / "judge.safetensors")
    assert found.config == made.config and not found.training
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 7])
    assert torch.equal(found(x, t), made(x, t))
    assert digest_of(found) == digest_of(made) != digest_of(random_classifier(pool, num_classes=4, **FIELDS))
    df.save_classifier(tmp_path / "half.safetensors", made, torch.bfloat16)
    assert df.load_classifier(tmp_path / "half.safetensors", dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_models_and_classifiers_are_told_apart(tmp_path):
    judge, model = tmp_path / "judge.safetensors", tmp_path / "model.safetensors"
    df.save_classifier(judge, random_classifier(**FIELDS))
    unet = random_unet(**FIELDS)
    config = {"unet": unet.config.to_dict(), "diffusion": df.GaussianDiffusion(df.Schedule.cosine(9)).to_dict()}
    df.save_model(model, unet.state_dict(), config)
    with pytest.raises(df.InputError, match=r"judge\.safetensors is a classifier of noised images, .*--classifier"):
        df.load_model(judge)
    with pytest.raises(df.InputError, match=r"model\.safetensors is a model that draws; expected a classifier"):
        df.load_classifier(model)
    with pytest.raises(df.InputError, match="says itself how its classifier is made"):
        df.load_classifier(judge, flags="--image_size 64")
    with pytest.raises(df.InputError, match="the classifier is a UNet; expected"):
        df.save_classifier(judge, unet)
    torch.save(unet.state_dict(), tmp_path / "other.pt")
    with pytest.raises(df.InputError, match="holds no classifier of guided-diffusion"):
        df.load_classifier(tmp_path / "other.pt")
    with pytest.raises(df.InputError, match="does not exist"):
        df.load_classifier(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(num_classes=2**24), "num_classes is 16777216, more than the file has weights"),
        (lambda fields: fields.update(num_classes=4), r"of another shape .*head\.bias \[3\] instead of \[4\]"),
        (lambda fields: fields.update(pool="max"), "pool is 'max'; expected one of adaptive"),
        (lambda fields: fields.pop("pool"), "missing classifier config field"),
        (lambda fields: fields.update(depth=3), "unknown classifier config field"),
        (lambda fields: fields.update(unet=[]), "a U-Net's config is a list"),
        (lambda fields: fields["unet"].update(num_res_blocks=1000), "a larger network than the file holds"),
        (lambda fields: fields["unet"].update(model_channels=2**14), "a larger network than the file holds"),
        (lambda fields: fields["unet"].update(num_classes=2), "the classifier's U-Net has num_classes 2; expected 0"),
    ],
)
def test_a_file_that_lies_is_refused(change, message, tmp_path):
    made = random_classifier(**FIELDS)
    config = {"classifier": json.loads(json.dumps(made.config.to_dict()))}
    change(config["classifier"])
    tensorfile.write(tmp_path / "judge.safetensors", tensorfile.MODEL, made.state_dict(), config)
    with pytest.raises(df.InputError, match=rf"judge\.safetensors: .*{message}"):
        df.load_classifier(tmp_path / "judge.safetensors")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    made = random_classifier(**FIELDS)
    with torch.no_grad():
        made.head.bias.fill_(torch.inf)
    with pytest.raises(df.InputError, match="not finite"):
        df.save_classifier(tmp_path / "judge.safetensors", made)
    config = {"classifier": made.config.to_dict()}
    tensorfile.write(tmp_path / "judge.safetensors", tensorfile.MODEL, made.state_dict(), config)
    with pytest.raises(df.InputError, match="not finite"):
        df.load_classifier(tmp_path / "judge.safetensors")
