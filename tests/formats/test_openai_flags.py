"""What flags and shapes say of files of improved- and guided-diffusion: what is told by the shapes, what is asked for,
what is refused, and which of the two codes a file is of."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.formats.imported import Imported
from ddpm_fast.formats.openai.names import our_name, their_name, to_theirs
from ddpm_fast.formats.openai.network import claims, read
from ddpm_fast.formats.openai.weights import unfilled
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.unet_config import UNetConfig

BASE = UNetConfig(
    image_size=64,
    model_channels=32,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=1,
    attention_resolutions=(16, 8),
    num_heads=4,
    scale_shift=True,
)
TWO_LEVELS = replace(BASE, channel_mult=(1, 2), attention_resolutions=(32,))
README = replace(BASE, model_channels=128, num_res_blocks=3)
FLAGS = "--image_size 64 --num_channels 32 --num_res_blocks 1"


@functools.cache
def their_file(config: UNetConfig) -> dict[str, Tensor]:
    return to_theirs(unfilled(lambda: UNet(config)), config.heads, legacy=False)


def reading(config: UNetConfig, flags: str | None, **changed: Tensor | None) -> Imported:
    file = {name.replace("__", "."): value for name, value in (their_file(config) | changed).items()}
    return read({name: value for name, value in file.items() if value is not None}, Path("model.pt"), flags)


def test_what_the_shapes_say_need_not_be_given():
    config = replace(BASE, attention_resolutions=(32,), scale_shift=False, learned_variance=True, num_classes=7)
    config = replace(config, null_class=False, num_res_blocks=2, resample="resblock")
    assert reading(config, "").unet == config


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_the_levels_say_the_size_of_the_images(size):
    mult = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}[size]
    config = replace(BASE, image_size=size, model_channels=64, channel_mult=mult, attention_resolutions=())
    config = replace(config, stem_channels=32 if size == 512 else 0)
    assert reading(config, "").unet == config


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({}, "--channel_mult 1,2"),
        ({"image_size": 28, "attention_resolutions": ()}, "--image_size 28"),
        ({"in_channels": 1}, "--channel_mult 1,2"),
        ({"in_channels": 2}, "--channel_mult 1,2 --in_channels 2"),
        ({"in_channels": 6}, "--channel_mult 1,2 --in_channels 6"),
        ({"in_channels": 6}, "--channel_mult 1,2 --learn_sigma False"),
        ({"condition_channels": 3, "learned_variance": True}, "--large_size 64 --channel_mult 1,2"),
        ({"in_channels": 1, "condition_channels": 1}, "--large_size 64 --channel_mult 1,2"),
        ({"head_channels": 16, "num_heads": 1}, "--channel_mult 1,2 --num_head_channels 16 --num_heads_upsample 2"),
        ({"dropout": 0.25}, "--channel_mult 1,2 --dropout 0.25 --use_checkpoint True --lr 1e-4 --use_fp16 True"),
    ],
)
def test_what_a_script_fixes_may_be_added(fields, flags):
    config = replace(TWO_LEVELS, **fields)
    assert reading(config, flags).unet == config


@pytest.mark.parametrize(
    ("fields", "flags", "says"),
    [
        ({}, "--num_channels 64", "--num_channels 64 contradicts the weights: time_embed.0.weight has 32 columns"),
        ({}, "--num_res_blocks 2", "--num_res_blocks 2 contradicts the weights: 4 levels have 4 blocks"),
        ({}, "--class_cond True", "--class_cond True contradicts the weights: there is no label_emb.weight"),
        ({"num_classes": 5}, "--class_cond False", "--class_cond False contradicts the weights: there is a label_emb"),
        (
            {},
            "--use_scale_shift_norm False",
            "--use_scale_shift_norm False contradicts the weights: emb_layers.1.weight",
        ),
        ({}, "--resblock_updown True", "--resblock_updown True contradicts the weights: convolutions resample"),
        ({}, "--learn_sigma True", "--learn_sigma True contradicts the weights: .* out.2.weight writes 3"),
        ({}, "--in_channels 1", "--in_channels 1 contradicts the weights: input_blocks.0.0.weight reads 3"),
        ({}, "--large_size 64", "--large_size 64 contradicts the weights: input_blocks.0.0.weight reads 3"),
        ({}, "--channel_mult 1,2,2,2", "--channel_mult 1,2,2,2 contradicts .* levels of 32,64,96,128 channels"),
        ({}, "--image_size 256", "--image_size 256 contradicts .* 1,1,2,2,4,4 times .* 1,2,3,4 times the 32"),
        ({}, "--attention_resolutions 32,16", "--attention_resolutions 32,16 contradicts .* levels of 16,8 pixels"),
        ({}, "--num_heads 5", "--num_heads 5 contradicts .* 96 channels"),
        ({}, "--num_head_channels 64", "--num_head_channels 64 contradicts .* 96 channels"),
        ({}, "--num_heads 0", "--num_heads 0 contradicts"),
        ({}, "--num_heads_upsample 2", "--num_heads_upsample 2 is not supported"),
        ({}, "--noise_schedule sigmoid", "--noise_schedule is 'sigmoid'; expected linear or cosine"),
        ({}, "--diffusion_steps 0", "--diffusion_steps is 0"),
        ({}, "--diffusion_steps 15 --rescale_timesteps True", "ends at beta"),
        ({}, "--attention_resolutions 0", "--attention_resolutions is '0'; expected numbers"),
        ({}, "--channel_mult 1,x", "--channel_mult is '1,x'; expected numbers"),
        ({}, "--image_size 20 --channel_mult 1,2,3,4", "image_size 20 cannot be halved 3 times"),
        ({}, "--image_sise 64", "--image_sise is no flag of improved-diffusion or guided-diffusion"),
        ({}, "--class_cond maybe", "--class_cond is 'maybe'; expected True or False"),
        ({}, "--num_heads 1 --num_heads 2", "--num_heads is given twice, as 1 and 2"),
        ({"condition_channels": 3}, "--image_size 64", "it is an upsampler, which has no flag --image_size"),
        ({"in_channels": 2, "condition_channels": 2, "learned_variance": True}, "", "add --in_channels"),
        ({"channel_mult": (1, 4)}, "", "add --image_size to the flags"),
        ({"channel_mult": (1, 4), "condition_channels": 3}, "", "add --large_size to the flags"),
        ({"condition_channels": 1}, "", "reads 4 channels, and out.2.weight writes 3; expected as many"),
    ],
)
def test_what_does_not_agree_is_named(fields, flags, says):
    config = BASE if "channel_mult" not in fields else replace(BASE, attention_resolutions=())
    fields = {"null_class": False, **fields} if "num_classes" in fields else fields
    with pytest.raises(InputError, match=f"model.pt: .*{says}"):
        reading(replace(config, **fields), flags)


def test_without_flags_they_are_asked_for():
    with pytest.raises(InputError, match=r"how large the images are.*--num_channels 32 --num_res_blocks 1"):
        reading(BASE, None)


# Which of the two codes


@pytest.mark.parametrize(
    ("config", "flags", "code"),
    [
        (BASE, "--sigma_small True", "improved-diffusion"),
        (replace(BASE, image_size=32, channel_mult=(1, 2, 2, 2)), "", "improved-diffusion"),
        (BASE, "--num_head_channels 32", "guided-diffusion"),
        (BASE, "--use_new_attention_order False", "guided-diffusion"),
        (BASE, "--classifier_scale 1.0 --classifier_depth 4", "guided-diffusion"),
        (replace(BASE, resample="resblock"), "", "guided-diffusion"),
        (replace(BASE, image_size=128, channel_mult=(1, 1, 2, 3, 4)), "", "guided-diffusion"),
        (BASE, "--sigma_small True --num_head_channels 32", "guided-diffusion"),
        (README, "--image_size 64 --num_channels 128 --num_res_blocks 3", "improved-diffusion"),
    ],
)
def test_flags_and_sizes_tell_the_code(config, flags, code):
    found = reading(config, f"{flags} --diffusion_steps 4000")
    assert found.origin["format"] == code
    assert found.unet.timestep_scale == (0.25 if code == "improved-diffusion" else 1)


def test_the_code_is_asked_for_where_it_makes_a_difference():
    learned = replace(BASE, learned_variance=True)
    assert reading(learned, FLAGS).origin["format"] == "improved-diffusion or guided-diffusion"
    both = "add '--rescale_timesteps True --rescale_learned_sigmas True' .*, or '--rescale_timesteps False"
    with pytest.raises(InputError, match=both):
        reading(learned, f"{FLAGS} --diffusion_steps 4000")
    with pytest.raises(InputError, match="add '--rescale_timesteps True' "):
        reading(BASE, f"{FLAGS} --diffusion_steps 4000")
    with pytest.raises(InputError, match="add '--rescale_learned_sigmas True' "):
        reading(learned, f"{FLAGS} --diffusion_steps 4000 --rescale_timesteps False")
    given = f"{FLAGS} --diffusion_steps 4000 --rescale_timesteps True --rescale_learned_sigmas False"
    found = reading(learned, given)
    assert (found.unet.timestep_scale, found.diffusion.objective.vlb_weight) == (0.25, 1 / 4000)


def test_the_origin_keeps_what_is_not_applied():
    config = replace(BASE, condition_channels=3)
    flags = "--large_size 64 --small_size 16 --timestep_respacing ddim25"
    found = reading(config, flags)
    assert found.diffusion.num_timesteps == 1000
    expected = {"format": "improved-diffusion or guided-diffusion", "flags": flags}
    assert found.origin == {**expected, "timestep_respacing": "ddim25", "small_size": 16}


# Files that are not theirs


def test_other_contents_are_not_claimed():
    file = their_file(BASE)
    assert claims(file)
    classifier = {name: value for name, value in file.items() if not name.startswith("output_blocks")}
    for content in (classifier, None, [1], {1: 2}, {"state_dict": file}, torch.zeros(1), list(file)):
        assert not claims(content)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"step": 3}, "entries that are no floating-point weights under a name: step"),
        ({7: torch.zeros(1)}, "no floating-point weights under a name: 7"),
        ({"out.2.bias": torch.zeros(3, dtype=torch.int64)}, "no floating-point weights under a name: out.2.bias"),
        # Of any size, from one number.
        ({"out.2.bias": torch.zeros(1).expand(2**40)}, "no floating-point weights under a name: out.2.bias"),
        ({"out.2.bias": torch.zeros(3).to_sparse()}, "no floating-point weights under a name: out.2.bias"),
        ({"out.2.bias": None}, r"it lacks out.2.bias \[3\]"),
        ({"out.2.bias": torch.zeros(4)}, r"of another shape is out.2.bias \[4\] instead of \[3\]"),
        ({"more": torch.zeros(4)}, r"it has more \[4\]"),
        ({"a\x1b[31m": torch.zeros(4)}, r"it has a\\x1b\[31m"),
        ({"time_embed.0.weight": torch.zeros(128)}, r"time_embed.0.weight has the shape \[128\]; expected 2 sizes"),
        ({"time_embed.0.weight": None}, "it has no time_embed.0.weight"),
        ({"time_embed.0.weight": torch.zeros(128, 0)}, r"has the shape \[128, 0\]"),
        ({"output_blocks.2.1.conv.weight": torch.zeros(1)}, "do not make a network of levels"),
        ({"output_blocks.2.0.in_layers.0.weight": None}, "do not make a network of levels"),
        ({"output_blocks.9999.0.in_layers.0.weight": torch.zeros(1)}, "do not make a network of levels"),
        ({"input_blocks.3.1.transformer.weight": torch.zeros(1)}, "it has input_blocks.3.1.transformer.weight"),
    ],
)
def test_broken_files_are_refused(changed, says):
    file = {name: value for name, value in (their_file(TWO_LEVELS) | changed).items() if value is not None}
    with pytest.raises(InputError, match=f"model.pt: .*{says}"):
        read(file, Path("model.pt"), "--channel_mult 1,2")


def test_names_go_there_and_back():
    for name in UNet(replace(TWO_LEVELS, num_classes=2)).state_dict():
        assert our_name(their_name(name)) == name
    for name in ("input_blocks.0.1.norm.weight", "middle_block.3.norm.weight", "x", "out.1.weight", "input_blocks.1"):
        with pytest.raises(InputError, match="is no parameter of"):
            our_name(name)
    with pytest.raises(InputError, match="have no parameter like"):
        their_name("encoder.0.0.other.weight")
