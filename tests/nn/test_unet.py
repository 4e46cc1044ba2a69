"""The U-Net against the networks it stands for: parameter counts of the papers, outputs of two reference
codes on their own weights (golden files), a float64 formula for each layer that those do not reach, and its
errors.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close

from ddpm_fast.errors import InputError
from ddpm_fast.formats.diffusers.network import from_diffusers, translated
from ddpm_fast.nn.layers import Attention, NearestUp, ResBlock, TimeEmbedding
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.unet_config import UNetConfig

GOLDEN = Path(__file__).parents[1] / "golden"

HO_2020 = UNetConfig(downsample_padding="asymmetric", norm_eps=1e-6, time_denominator="half-1", time_order="sin|cos")
NICHOL_2021 = UNetConfig(
    num_res_blocks=3, attention_resolutions=(16, 8), num_heads=4, scale_shift=True, learned_variance=True
)
SMALL = UNetConfig(
    image_size=8,
    in_channels=3,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_heads=2,
    num_classes=5,
    norm_groups=8,
)


def small(**changes) -> UNetConfig:
    return UNetConfig.from_dict({**SMALL.to_dict(), **changes})


def perturbed(config: UNetConfig, seed: int = 0) -> UNet:
    """A network whose zero-initialised layers, and norms, are not the identity any more."""
    torch.manual_seed(seed)
    net = UNet(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def batch(config: UNetConfig, n: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, config.in_channels, config.image_size, config.image_size, generator=generator)
    t = torch.randint(0, 1000, (n,), generator=generator)
    labels = torch.randint(0, config.num_classes + 1, (n,), generator=generator) if config.num_classes else None
    return x, t, labels


# Parameter counts


@pytest.mark.parametrize(
    ("config", "count"),
    [
        pytest.param(HO_2020, 35_746_307, id="CIFAR-10 network of Ho et al. 2020"),
        pytest.param(NICHOL_2021, 52_546_438, id="CIFAR-10 network of Nichol & Dhariwal 2021"),
    ],
)
def test_parameter_count_is_the_papers(config, count):
    with torch.device("meta"):
        net = UNet(config)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == count


# Golden networks


def load_golden(name: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    with safe_open(GOLDEN / name, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        config = json.loads(file.metadata()["config"])
    return config, {k[6:]: v for k, v in tensors.items() if k.startswith("state.")}, tensors


def from_improved_diffusion(state: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The state dict of openai/improved-diffusion's UNetModel under our names; the null class gets a row of
    zeros.
    """
    prefixes = {"time_embed": "time_embedding", "label_emb": "label_embedding"}
    prefixes |= {"input_blocks.0.0": "conv_in", "out.0": "norm_out", "out.2": "conv_out"}
    prefixes |= {f"middle_block.{k}": f"middle.{k}" for k in range(3)}
    stages = (config.num_res_blocks + 1) * len(config.channel_mult)
    for stage in range(stages):
        for layer in range(3):
            prefixes[f"input_blocks.{stage + 1}.{layer}"] = f"encoder.{stage}.{layer}"
            prefixes[f"output_blocks.{stage}.{layer}"] = f"decoder.{stage}.{layer}"
    suffixes = {"": "", "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "emb", "op": "conv"}
    suffixes |= {"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "skip", "conv": "conv"}
    suffixes |= {"norm": "norm", "qkv": "qkv", "proj_out": "proj", "0": "linear1", "2": "linear2"}
    result = {translated(name, prefixes, suffixes): value for name, value in state.items()}
    for name, value in result.items():
        if ".qkv." in name:  # theirs is [heads, q|k|v, channels], ours [q|k|v, heads, channels]
            heads = value.reshape(config.num_heads, 3, -1, *value.shape[1:2])
            result[name] = heads.transpose(0, 1).reshape(value.shape[:2])
        elif ".proj.weight" in name:
            result[name] = value.squeeze(-1)
    labels = result["label_embedding.weight"]
    result["label_embedding.weight"] = torch.cat([labels, torch.zeros_like(labels[:1])])
    return result


def test_golden_diffusers_ddpm():
    theirs, state, tensors = load_golden("unet_diffusers_ddpm.safetensors")
    base = theirs["block_out_channels"][0]
    config = UNetConfig(
        image_size=theirs["sample_size"],
        in_channels=theirs["in_channels"],
        model_channels=base,
        channel_mult=[c // base for c in theirs["block_out_channels"]],
        num_res_blocks=theirs["layers_per_block"],
        attention_resolutions=[
            theirs["sample_size"] >> k for k, name in enumerate(theirs["down_block_types"]) if "Attn" in name
        ],
        num_heads=theirs["block_out_channels"][1] // theirs["attention_head_dim"],
        downsample_padding="asymmetric" if theirs["downsample_padding"] == 0 else "symmetric",
        time_denominator="half-1" if theirs["freq_shift"] == 1 else "half",
        time_order="cos|sin" if theirs["flip_sin_to_cos"] else "sin|cos",
        norm_groups=theirs["norm_num_groups"],
        norm_eps=theirs["norm_eps"],
    )
    net = UNet(config)
    net.load_state_dict(from_diffusers(state, config), strict=True)
    with torch.no_grad():
        for mode in (net.train(), net.eval()):  # Winograd's filters made at each call; and kept
            output = mode(tensors["input.sample"], tensors["input.timestep"])
            torch.testing.assert_close(output, tensors["output"], rtol=0, atol=1e-5)


def test_golden_improved_diffusion():
    theirs, state, tensors = load_golden("unet_improved_diffusion.safetensors")
    size = tensors["input.x"].shape[-1]
    config = UNetConfig(
        image_size=size,
        in_channels=theirs["in_channels"],
        model_channels=theirs["model_channels"],
        channel_mult=theirs["channel_mult"],
        num_res_blocks=theirs["num_res_blocks"],
        attention_resolutions=[size // factor for factor in theirs["attention_resolutions"]],
        num_heads=theirs["num_heads"],
        num_classes=theirs["num_classes"],
        scale_shift=theirs["use_scale_shift_norm"],
        learned_variance=theirs["out_channels"] == 2 * theirs["in_channels"],
    )
    net = UNet(config)
    net.load_state_dict(from_improved_diffusion(state, config), strict=True)
    with torch.no_grad():
        for mode in (net.train(), net.eval()):
            output = mode(tensors["input.x"], tensors["input.timesteps"], tensors["input.y"])
            torch.testing.assert_close(output, tensors["output"], rtol=0, atol=1e-5)


# Initialisation, labels, gradients, dtypes, memory format


@pytest.mark.parametrize("scale_shift", [False, True], ids=["added", "scale-shift"])
def test_output_is_zero_at_initialisation(scale_shift):
    config = small(scale_shift=scale_shift, learned_variance=True)
    output = UNet(config)(*batch(config))
    assert output.shape == (3, 6, 8, 8)
    assert torch.count_nonzero(output) == 0


def test_no_labels_means_the_null_class():
    net = perturbed(SMALL)
    x, t, _ = batch(SMALL)
    null = net(x, t, torch.full((3,), SMALL.num_classes))
    torch.testing.assert_close(net(x, t), null, rtol=0, atol=0)
    assert (net(x, t, torch.zeros(3, dtype=torch.int64)) - null).abs().max() > 1e-3


def test_timesteps_may_be_floats():
    net = perturbed(SMALL)
    x, t, labels = batch(SMALL)
    torch.testing.assert_close(net(x, t.float(), labels), net(x, t, labels), rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="additive, convolutions resample"),
        pytest.param({"scale_shift": True, "resample": "resblock"}, id="scale-shift, residual blocks resample"),
        pytest.param({"downsample_padding": "asymmetric", "learned_variance": True}, id="asymmetric, learned variance"),
    ],
)
def test_every_parameter_gets_a_gradient(changes):
    config = small(**changes)
    net = perturbed(config)
    x, t, labels = batch(config)
    labels[0] = 1
    net(x, t, labels).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without


def test_bf16_autocast_trains():
    net = perturbed(SMALL)
    x, t, labels = batch(SMALL)
    exact = net(x, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x, t, labels)
    assert output.dtype == torch.bfloat16
    assert (output - exact).norm() < 0.03 * exact.norm()
    output.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_bf16_weights_take_fp32_images_and_keep_exact_frequencies():
    net = perturbed(SMALL)
    x, t, labels = batch(SMALL)
    exact = net(x, t, labels)
    frequencies = net.time_embedding.frequencies.clone()
    net.to(torch.bfloat16)
    output = net(x, t, labels)
    assert output.dtype == torch.bfloat16
    assert (output - exact).norm() < 0.03 * exact.norm()
    assert torch.equal(net.time_embedding.frequencies, frequencies)


def test_built_on_meta_then_materialised():
    source = perturbed(SMALL)
    with torch.device("meta"):
        net = UNet(SMALL)
    net.to_empty(device="cpu")
    net.load_state_dict(source.state_dict())
    assert torch.equal(net(*batch(SMALL)), source(*batch(SMALL)))


@pytest.mark.parametrize("in_channels", [1, 3, 5])
def test_channels_last_in_and_out(in_channels):
    config = small(in_channels=in_channels)
    net = perturbed(config)
    x, t, labels = batch(config)
    output = net(x, t, labels)
    assert output.is_contiguous(memory_format=torch.channels_last)
    same = net(x.contiguous(memory_format=torch.channels_last), t, labels)
    torch.testing.assert_close(same, output, rtol=0, atol=0)
    formats = {
        stage: h.is_contiguous(memory_format=torch.channels_last) for stage, h in stage_outputs(net, x, t).items()
    }
    assert all(formats.values()), formats


def stage_outputs(net: UNet, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    outputs = {}
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: outputs.setdefault(name, output))
        for name, module in net.named_modules()
        if name.startswith(("encoder.", "middle.", "decoder.")) and name.count(".") == 1
    ]
    net(x, t)
    for hook in hooks:
        hook.remove()
    return outputs


def test_one_channel_28_pixels_three_levels():
    config = UNetConfig(
        image_size=28,
        in_channels=1,
        model_channels=32,
        channel_mult=(1, 3, 4),
        num_res_blocks=1,
        attention_resolutions=(7,),
        num_classes=10,
    )
    assert config.resolutions == (28, 14, 7)
    assert perturbed(config)(*batch(config, 2)).shape == (2, 1, 28, 28)


def test_a_network_without_a_null_class_wants_labels():
    net = perturbed(small(null_class=False))
    x, t, _ = batch(net.config)
    labels = torch.tensor([0, 4, 2])
    assert net.label_embedding.weight.shape == (5, 64) and net(x, t, labels).shape == x.shape
    with pytest.raises(InputError, match="5 classes and no null class: give labels"):
        net(x, t)
    with pytest.raises(InputError, match=r"from 5 to 5; expected 0 to 4$"):
        net(x, t, torch.full_like(labels, 5))


def test_a_condition_comes_after_the_channels_of_x_and_is_scaled_to_its_size():
    net, plain = perturbed(small(condition_channels=2)), perturbed(SMALL)
    state = net.state_dict()
    both = state["conv_in.weight"]
    plain.load_state_dict(state | {"conv_in.weight": both[:, :3]})
    x, t, labels = batch(SMALL)
    condition = torch.randn(3, 2, 4, 4)
    scaled = F.interpolate(condition, scale_factor=2, mode="bilinear")
    added = F.conv2d(scaled, both[:, 3:], padding=1)
    plain.conv_in.register_forward_hook(lambda layer, inputs, output: output + added)
    assert_close(net(x, t, labels, condition=condition), plain(x, t, labels), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="a second image of 2 channels"):
        net(x, t, labels)
    with pytest.raises(InputError, match="gets no second image"):
        perturbed(SMALL)(x, t, labels, condition=condition)
    with pytest.raises(InputError, match=r"condition is \[3, 1, 4, 4\]; expected \[3 or 1, 2, H, W\]"):
        net(x, t, labels, condition=condition[:, :1])


def test_what_is_told_of_augmentation_is_added_to_the_sinusoids_of_the_timestep():
    net, plain = perturbed(small(augment_channels=4)), perturbed(SMALL)
    plain.load_state_dict({name: w for name, w in net.state_dict().items() if "augment" not in name})
    x, t, labels = batch(SMALL)
    told = torch.randn(3, 4)
    added = told @ net.augment_embedding.weight.T
    assert torch.equal(net(x, t, labels), plain(x, t, labels)), "without it the network is another"
    assert torch.equal(net(x, t, labels, augment=torch.zeros(3, 4)), plain(x, t, labels))
    different = (net(x, t, labels, augment=told) - plain(x, t, labels)).abs().amax((1, 2, 3))
    assert (different > 1e-4).all()
    plain.time_embedding.linear1.register_forward_pre_hook(lambda layer, inputs: inputs[0] + added)
    assert_close(net(x, t, labels, augment=told), plain(x, t, labels), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"augment is torch.float32 \[3, 3\]; expected floats \[3, 4\]"):
        net(x, t, labels, augment=told[:, :3])
    with pytest.raises(InputError, match=r"augment is torch\.int64"):
        net(x, t, labels, augment=told.long())
    with pytest.raises(InputError, match="not told how images are augmented"):
        plain(x, t, labels, augment=told)


def test_a_network_that_is_told_of_augmentation_begins_as_one_that_is_not():
    torch.manual_seed(0)
    told = UNet(small(augment_channels=4)).state_dict()
    torch.manual_seed(0)
    plain = UNet(SMALL).state_dict()
    assert not told.pop("augment_embedding.weight").any()
    assert told.keys() == plain.keys() and all(torch.equal(told[name], plain[name]) for name in plain)


def test_a_file_of_before_has_none_of_the_later_fields():
    added = ("stem_channels", "decoder_attention", "middle_attention", "head_channels", "null_class")
    added = (*added, "timestep_scale", "condition_channels", "augment_channels")
    old = {name: value for name, value in SMALL.to_dict().items() if name not in added}
    assert UNetConfig.from_dict(old) == SMALL


def test_empty_batch():
    x, t, labels = batch(SMALL, 0)
    assert UNet(SMALL)(x, t, labels).shape == (0, 3, 8, 8)


def test_a_sample_does_not_depend_on_its_batch():
    net = perturbed(SMALL)
    x, t, labels = batch(SMALL, 5)
    torch.testing.assert_close(net(x[3:4], t[3:4], labels[3:4]), net(x, t, labels)[3:4], rtol=1e-5, atol=1e-5)


def test_dropout_only_when_training():
    net = perturbed(small(dropout=0.5))
    inputs = batch(SMALL)
    assert not torch.equal(net(*inputs), net(*inputs))
    net.eval()
    assert torch.equal(net(*inputs), net(*inputs))


def test_captured_as_one_graph():
    """No graph break: nothing in forward needs a tensor's value."""
    net = perturbed(SMALL)
    inputs = batch(SMALL)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), net(*inputs), rtol=1e-4, atol=1e-5)


# Layers


@pytest.mark.parametrize("resample", ["down", "up"])
def test_resampling_residual_block_against_its_formula(resample):
    """Dhariwal & Nichol 2021, "Diffusion Models Beat GANs", section 3: BigGAN's up- and downsampling
    blocks.
    """
    torch.manual_seed(0)
    block = ResBlock(8, 8, 12, groups=4, eps=1e-5, dropout=0.0, scale_shift=True, resample=resample).double()
    nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(2, 8, 6, 6, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)

    def resampled(image: Tensor) -> Tensor:
        if resample == "up":
            return image.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return (image[:, :, ::2] + image[:, :, 1::2]).unflatten(-1, (3, 2)).sum(-1) / 4

    scale, shift = (emb @ block.emb.weight.T + block.emb.bias)[..., None, None].chunk(2, 1)
    h = F.conv2d(resampled(F.silu(F.group_norm(x, 4))), block.conv1.weight, block.conv1.bias, padding=1)
    h = F.silu(F.group_norm(h, 4) * (1 + scale) + shift)
    expected = resampled(x) + F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    torch.testing.assert_close(block(x, emb), expected)


def test_attention_against_its_formula():
    torch.manual_seed(0)
    layer = Attention(8, 2, groups=4, eps=1e-5).double()
    nn.init.normal_(layer.proj.weight)
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    normed = F.group_norm(x, 4).flatten(2)
    q, k, v = (torch.einsum("oc,ncp->nop", w, normed) for w in layer.qkv.weight.chunk(3))
    bias_q, bias_k, bias_v = layer.qkv.bias.chunk(3)
    q, k, v = q + bias_q[:, None], k + bias_k[:, None], v + bias_v[:, None]
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = torch.softmax(torch.einsum("ncp,ncq->npq", q[:, head], k[:, head]) / math.sqrt(4), dim=-1)
        heads.append(torch.einsum("npq,ncq->ncp", weights, v[:, head]))
    projected = torch.einsum("oc,ncp->nop", layer.proj.weight, torch.cat(heads, 1)) + layer.proj.bias[:, None]
    torch.testing.assert_close(layer(x), x + projected.view_as(x))


@pytest.mark.parametrize("denominator", ["half", "half-1"])
def test_time_embedding_frequencies(denominator):
    frequencies = TimeEmbedding(8, denominator, "cos|sin").frequencies
    last = {"half": 10000 ** (-3 / 4), "half-1": 1 / 10000}[denominator]
    assert frequencies[0] == 1 and frequencies[-1].item() == pytest.approx(last, rel=1e-6)


def test_nearest_upsampling_repeats_pixels():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert NearestUp()(x)[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"image_size": 30, "channel_mult": (1, 2, 2)}, "28 or 32.*at most 2 levels", id="halving"),
        pytest.param({"image_size": 2, "channel_mult": (1, 2, 2)}, "resize the images to 4", id="too small"),
        pytest.param({"attention_resolutions": (16,)}, r"\[16\].*heights \[8, 4\]", id="no such resolution"),
        pytest.param({"norm_groups": 32}, "16 channels.*set norm_groups to 16", id="groups"),
        pytest.param({"num_heads": 3}, "32 channels.*set num_heads to 2", id="heads"),
        pytest.param({"model_channels": 15}, "even number", id="odd channels"),
        pytest.param({"model_channels": 0}, "model_channels is 0; expected an integer in 1", id="no channels"),
        pytest.param({"channel_mult": ()}, "channel_mult is empty", id="no levels"),
        pytest.param({"channel_mult": (1, 0)}, "channel_mult is 0", id="empty level"),
        pytest.param({"channel_mult": (1, 1.7)}, r"level 1 has 16 x 1.7 = 27 channels, not divisible", id="fraction"),
        pytest.param({"channel_mult": (1, math.nan)}, "channel_mult has nan", id="no number"),
        pytest.param({"image_size": (8, 9)}, "8x9 cannot be halved .* to 8x8 or 8x10,", id="a side that is not halved"),
        pytest.param(
            {"image_size": (8, 8, 8)}, r"expected the side of a square, or \(height, width\)", id="three sides"
        ),
        pytest.param({"decoder_attention": (5,)}, r"decoder_attention has \[5\]", id="attention on the way up"),
        pytest.param(
            {"head_channels": 3}, r"not divisible by head_channels 3: set head_channels to 2", id="head width"
        ),
        pytest.param({"stem_channels": 6}, r"makes 6 channels, not divisible by norm_groups", id="stem"),
        pytest.param({"timestep_scale": 0.0}, r"timestep_scale is 0.0; expected 1, or 1000/T", id="scale"),
        pytest.param({"middle_attention": "some"}, "expected one of normed, plain, none", id="middle"),
        pytest.param({"dropout": 1.0}, r"dropout is 1.0.*\[0, 1\)", id="dropout"),
        pytest.param({"norm_eps": 0}, "norm_eps is 0.0", id="eps"),
        pytest.param({"num_classes": -1}, "num_classes is -1", id="classes"),
        pytest.param({"num_heads": "2"}, "num_heads is '2', a str; expected an integer", id="text for a number"),
        pytest.param({"scale_shift": 1}, "scale_shift is 1; expected bool", id="number for a switch"),
        pytest.param({"resample": "pool"}, "'pool'; expected one of conv, resblock", id="resample"),
        pytest.param({"time_order": "sin"}, "expected one of", id="order"),
    ],
)
def test_config_that_makes_no_network(changes, message):
    with pytest.raises(InputError, match=message):
        small(**changes)


def test_config_travels_as_json():
    assert UNetConfig.from_dict(json.loads(json.dumps(NICHOL_2021.to_dict()))) == NICHOL_2021


def test_config_with_unknown_or_missing_fields():
    fields = SMALL.to_dict()
    with pytest.raises(InputError, match=r"unknown .* colour; known are image_size"):
        UNetConfig.from_dict({**fields, "colour": 1})
    del fields["norm_eps"], fields["dropout"]
    with pytest.raises(InputError, match=r"missing .* dropout, norm_eps; .*UNetConfig\(\).to_dict\(\)"):
        UNetConfig.from_dict(fields)
    with pytest.raises(InputError, match="is a list; expected a dict"):
        UNetConfig.from_dict([1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"x": torch.zeros(3, 3, 8, 9)}, r"8x9 cannot be halved 1 times", id="size"),
        pytest.param({"x": torch.zeros(3, 1, 8, 8)}, r"expected floats \[N, 3, 8, 8\]", id="channels"),
        pytest.param({"x": torch.zeros(3, 8, 8)}, "expected floats", id="no batch"),
        pytest.param({"x": torch.zeros(3, 3, 8, 8, dtype=torch.uint8)}, "uint8", id="integers"),
        pytest.param({"t": torch.tensor(5)}, r"one timestep for each sample, \[3\]", id="one timestep for all"),
        pytest.param({"labels": torch.zeros(2, dtype=torch.int64)}, r"class for each sample, \[3\]", id="count"),
        pytest.param({"labels": torch.zeros(3)}, "labels are torch.float32", id="float labels"),
        pytest.param({"labels": torch.tensor([0, 6, 1])}, "from 0 to 6; expected 0 to 4, or 5 for", id="too large"),
        pytest.param({"labels": torch.tensor([0, -1, 1])}, "from -1 to 1", id="negative"),
    ],
)
def test_bad_inputs(changes, message):
    inputs = {"x": torch.zeros(3, 3, 8, 8), "t": torch.zeros(3, dtype=torch.int64), "labels": None, **changes}
    with pytest.raises(InputError, match=message):
        UNet(SMALL)(**inputs)


def test_labels_for_an_unconditional_network():
    config = small(num_classes=0)
    x, t, _ = batch(config)
    with pytest.raises(InputError, match="unconditional"):
        UNet(config)(x, t, torch.zeros(3, dtype=torch.int64))
