"""The path that the network takes on a GPU, where additions are left to the ops that read their results, is compared
with plain torch's layers in float64; what it derives from the weights; where it is not taken."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import ddpm_fast as df
from ddpm_fast.nn import derived, pending
from ddpm_fast.nn.layers import Downsample, ResBlock, Upsample
from ddpm_fast.ops import channels, norm
from ddpm_fast.ops.backends import cpu
from tests.support.networks import random_unet

SMALL = {"image_size": 8, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 8}
CONFIGS = {
    "as Ho et al.": {"attention_resolutions": (4,), "downsample_padding": "asymmetric"},
    "as Nichol and Dhariwal": {"scale_shift": True, "learned_variance": True, "num_heads": 2, "num_classes": 3},
    "resampling residual blocks": {"resample": "resblock", "num_classes": 3, "attention_resolutions": ()},
    "one input channel": {"in_channels": 1},
    "a decoder block that keeps its channels": {"channel_mult": (4, 2), "attention_resolutions": ()},
    "groups that have channels of both images": {"model_channels": 12, "channel_mult": (1, 3), "norm_groups": 4},
}


@contextlib.contextmanager
def fused():
    """Inside, the CPU is treated as a GPU is. Its own group norm runs, and plain torch for the ops that it lacks."""
    with contextlib.ExitStack() as stack:
        for module in (pending, norm, channels):
            stack.enter_context(mock.patch.object(module, "has_kernel", lambda *_: True))
        yield


def network(name: str, **more: object) -> df.UNet:
    return random_unet(0.05, **(SMALL | CONFIGS[name] | more))


def batch(model: df.UNet, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    config, generator = model.config, torch.Generator().manual_seed(0)
    x = torch.randn(n, config.in_channels, config.image_size, config.image_size, generator=generator)
    labels = torch.arange(n) % (config.num_classes + 1) if config.num_classes else None
    return x, torch.tensor([3, 500, 999])[:n], labels


def exactly(model: df.UNet) -> df.UNet:
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("taken", [fused, contextlib.nullcontext], ids=["a GPU's path", "a CPU's path"])
@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_gradients_are_those_of_plain_torch(name, taken):
    model = network(name)
    x, t, labels = batch(model)
    twin = exactly(model)
    expected = twin(x.double(), t, labels)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * probe).sum().backward()
    with taken():
        output = model(x, t, labels)
        (output * probe.float()).sum().backward()
    assert torch.linalg.vector_norm(output - expected) <= 2e-6 * torch.linalg.vector_norm(expected)
    for (key, found), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        error = torch.linalg.vector_norm(found.grad - wanted.grad)
        assert error <= 3e-5 * torch.linalg.vector_norm(wanted.grad) + 1e-6, key


@pytest.mark.parametrize("name", CONFIGS)
def test_sampling_with_held_weights_and_one_timestep(name):
    model = network(name).eval()
    x, _, labels = batch(model)
    t = torch.tensor([700])
    with torch.no_grad():
        expected = exactly(model)(x.double(), t.repeat(3), labels)
        with fused(), derived.held(model):
            output = model(x, t.expand(3), labels)
    assert torch.linalg.vector_norm(output - expected) <= 2e-6 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast(name):
    """The weights are fp32 and the images bf16, as in training."""
    model = network(name)
    x, t, labels = batch(model)
    expected = exactly(model)(x.double(), t, labels)
    with fused(), torch.autocast("cpu", torch.bfloat16):
        output = model(x, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x, t, labels)
    assert output.dtype == plain.dtype == torch.bfloat16
    assert (output - expected).norm() <= 1.5 * (plain - expected).norm()
    output.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)], ids=str)
def test_upsampling_is_one_transposed_convolution(size):
    layer = Upsample(4).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (filters,) = layer.derive()
    found = F.conv_transpose2d(x, filters, layer.conv.bias, stride=2, padding=1)
    torch.testing.assert_close(found, layer(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [(4, 4), (6, 2)], ids=str)
def test_asymmetric_padding_is_a_wider_filter(size):
    layer = Downsample(4, "asymmetric").double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (filters,) = layer.derive()
    torch.testing.assert_close(F.conv2d(x, filters, layer.conv.bias, 2, 1), layer(x), rtol=1e-13, atol=1e-13)


def test_held_tensors_stay_where_they_are_and_follow_the_weights():
    model = network("as Ho et al.").eval()
    x, t, _ = batch(model)
    layers = [layer for layer in model.modules() if isinstance(layer, derived.Derives)]
    assert len(layers) == 3  # the network, a Downsample and an Upsample
    with fused(), torch.no_grad():
        with derived.held(model):
            first = [layer.derived() for layer in layers]
            with derived.held(model):  # within a block, as guidance in on_step
                pass
            assert all(layer.derived() is held for layer, held in zip(layers, first, strict=True))
            with torch.enable_grad():  # a gradient must reach the weights
                assert model.derived()[0].requires_grad
        model.middle[0].emb.weight.mul_(2)
        expected = model(x, t)  # made anew, since nothing is held
        with derived.held(model):
            for layer, held in zip(layers, first, strict=True):
                assert layer.derived() is held  # where a captured graph reads them
                for found, wanted in zip(held, layer.derive(), strict=True):
                    assert torch.equal(found, wanted)
            assert torch.equal(model(x, t), expected)
        model.double()
        with derived.held(model):
            assert all(layer.derived()[0].dtype == torch.float64 for layer in layers)


def test_held_tensors_are_made_outside_of_inference_mode():
    model = network("as Ho et al.").eval()
    with fused():
        for _ in range(2):  # in place the second time
            with torch.inference_mode(), derived.held(model):
                assert not model.derived()[0].is_inference()


def test_a_copy_of_a_network_does_not_carry_held_tensors():
    model = network("as Ho et al.").eval()
    with fused(), torch.no_grad(), derived.held(model):
        twin = copy.deepcopy(model)
        twin.middle[0].emb.weight.zero_()
        assert not torch.equal(twin.derived()[0], model.derived()[0])


def test_an_image_is_added_up_once():
    x, residual, bias = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.randn(4)
    image = pending.Pending(x, residual, bias)
    with fused(), mock.patch.object(pending, "add_bias", wraps=pending.add_bias) as adding:
        torch.testing.assert_close(image.total(), x + residual + bias[:, None, None])
        assert image.total() is image.total() and adding.call_count == 1
    assert image.is_added_up
    torch.testing.assert_close(pending.Pending(x, residual, bias).total(), residual + (x + bias[:, None, None]))


def test_a_layer_by_itself_takes_and_gives_tensors():
    block = ResBlock(8, 16, 4, groups=4, eps=1e-5, dropout=0.0, scale_shift=False).double()
    torch.nn.init.normal_(block.conv2.weight)
    torch.nn.init.normal_(block.conv1.bias)
    x, emb = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    expected = block(x, emb)
    with fused():
        found = block.float()(x.float(), emb.float())
        joined = block(x[:, :4].float(), emb.float(), x[:, 4:].float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(joined.double(), expected, rtol=1e-4, atol=1e-5)


def test_hooks_see_whole_images():
    model = network("as Ho et al.").eval()
    x, t, _ = batch(model)
    seen = []
    handle = model.middle[0].conv1.register_forward_hook(lambda layer, given, made: seen.append(made))
    with fused(), torch.no_grad():
        model(x, t)
    with torch.no_grad():
        model(x, t)
        handle.remove()
    assert model.middle[0].conv1.bias.abs().min() > 0  # which a fused path would leave out
    torch.testing.assert_close(seen[0], seen[1])


def test_where_it_is_taken():
    on_meta = torch.empty(1, 4, 2, 2, device="meta")
    assert pending.is_fused(on_meta)
    assert not pending.is_fused(on_meta.double()) and not pending.is_fused(torch.empty(1, 4, 2, 2))
    with df.use_backend("reference"):
        assert not pending.is_fused(on_meta)
    with pending.unfused():
        assert not pending.is_fused(on_meta) and not pending.is_added_by_norms(on_meta)


@pytest.mark.skipif(not cpu.isas(), reason=cpu.unavailable)
def test_where_norms_add_residuals():
    image = torch.empty(1, 4, 2, 2)
    assert pending.is_added_by_norms(image) and not pending.is_added_by_norms(image.double())
    with df.use_backend("reference"):
        assert not pending.is_added_by_norms(image)


@pytest.mark.skipif(not cpu.isas(), reason=cpu.unavailable)
def test_a_cpu_joins_no_images_side_by_side():
    model = network("as Ho et al.").eval()
    x, t, _ = batch(model)
    with torch.no_grad(), mock.patch.object(torch, "cat", wraps=torch.cat) as cat:
        model(x, t)
        assert all(call.args[0][0].ndim == 2 for call in cat.call_args_list)  # the embedding's halves
        with df.use_backend("reference"):
            model(x, t)
    assert any(call.args[0][0].ndim == 4 for call in cat.call_args_list)


def test_a_block_with_an_edited_projection_is_projected_by_itself():
    model = network("as Ho et al.").eval()
    x, t, _ = batch(model)
    model.middle[0].emb = torch.nn.Sequential(model.middle[0].emb, torch.nn.Tanh())
    with torch.no_grad():
        expected = exactly(model)(x.double(), t)
        with fused():
            output = model(x, t)
    assert torch.linalg.vector_norm(output - expected) <= 2e-6 * torch.linalg.vector_norm(expected)
