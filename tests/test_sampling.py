"""The sampling loop: the ancestral chain written out, and a sample that is the same in any company."""

import dataclasses

import pytest
import torch

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.nn import UNet, UNetConfig
from ddpm_fast.noise import NoiseKey, Stream, normals
from ddpm_fast.sampling import sample
from ddpm_fast.schedule import Schedule


@pytest.fixture(scope="module")
def network():
    """A small conditional network whose output depends on its input."""
    torch.manual_seed(0)
    config = UNetConfig(
        image_size=16, in_channels=2, model_channels=16, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(8,), num_classes=3, norm_groups=8,
    )  # fmt: skip
    model = UNet(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    return model.eval()


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_sample_is_the_chain_of_p_mean_variance_written_out(network, prediction, steps):
    # Ho et al. 2020, alg. 2, in float64 with the plain-torch diffusion and the noise of the contract.
    diffusion = GaussianDiffusion(Schedule.cosine(50), prediction=prediction, variance="fixed_small")
    found = sample(network, diffusion, 3, steps=steps, seed=5, first_sample_id=40, labels=[0, 2, 1])
    chain = diffusion.respace(steps)
    wide = UNet(network.config).double().eval()
    wide.load_state_dict(network.state_dict())
    key = NoiseKey.of(5, 3, first_sample_id=40, stream=Stream.INITIAL)
    x = normals(key, 512).view(3, 2, 16, 16).double()
    with torch.no_grad():
        for i, t in enumerate(reversed(range(steps))):
            told = chain.schedule.timesteps[t].expand(3)
            p = chain.p_mean_variance(wide(x, told, torch.tensor([0, 2, 1])), x, torch.full((3,), t))
            z = normals(NoiseKey.of(5, 3, first_sample_id=40, step=i, stream=Stream.REVERSE), 512).view_as(x).double()
            x = p.mean + (t > 0) * (0.5 * p.log_variance).exp() * z
    # The network in fp32 against float64, accumulated over the chain.
    torch.testing.assert_close(found.double(), x, rtol=0, atol=2e-3)


def test_sample_is_the_same_alone_and_in_a_batch_up_to_the_networks_rounding(network):
    # The noise is the same bits in any batch (test_ops); what is left is the convolutions' dependence on the batch
    # size. Against the images' range of 2 it stays below a tenth of an 8-bit level.
    diffusion = GaussianDiffusion(Schedule.cosine(100), prediction="v", variance="fixed_small")
    labels = [i % 3 for i in range(64)]
    together = sample(network, diffusion, 64, steps=20, labels=labels)
    in_tens = sample(network, diffusion, 64, steps=20, labels=labels, batch_size=10)
    alone = sample(network, diffusion, 1, steps=20, labels=labels[33], first_sample_id=33)
    assert (together - in_tens).abs().max() < 0.1 * 2 / 255
    assert (together[33:34] - alone).abs().max() < 0.1 * 2 / 255
    assert (together[0] - together[3]).abs().max() > 0.1, "two samples of one class must differ"


class Elementwise(torch.nn.Module):
    """A network of one's own, in which no sample can see another."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t):
        return x * self.weight


@pytest.mark.parametrize("shape", [(2, 16, 16), (5,), (1, 3, 4, 5)], ids=["images", "vectors", "volumes"])
def test_with_an_elementwise_network_the_batch_does_not_matter_at_all(shape):
    diffusion = GaussianDiffusion(Schedule.cosine(100))
    options = {"steps": 20, "seed": 3, "shape": shape}
    together = sample(Elementwise(), diffusion, 64, **options)
    assert together.shape == (64, *shape)
    assert torch.equal(together, sample(Elementwise(), diffusion, 64, **options, batch_size=10))
    assert torch.equal(together[17:18], sample(Elementwise(), diffusion, 1, **options, first_sample_id=17))
    assert not torch.equal(together, sample(Elementwise(), diffusion, 64, **{**options, "seed": 4}))


def test_shape_is_needed_for_a_network_of_ones_own_and_only_then(network):
    diffusion = GaussianDiffusion(Schedule.cosine(100))
    with pytest.raises(InputError, match="samples is not known"):
        sample(Elementwise(), diffusion, 1)
    with pytest.raises(InputError, match="leave shape out"):
        sample(network, diffusion, 1, shape=(3, 16, 16))


def test_low_precision_network_keeps_the_state_in_fp32(network):
    diffusion = GaussianDiffusion(Schedule.cosine(100), prediction="v", variance="fixed_small")
    exact = sample(network, diffusion, 4, steps=10, labels=1)
    low = UNet(network.config).eval()
    low.load_state_dict(network.state_dict())
    rough = sample(low.to(torch.bfloat16), diffusion, 4, steps=10, labels=1)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.03  # bf16's 8 bits, not a diverged chain


def test_labels_matter_and_none_is_the_null_class(network):
    diffusion = GaussianDiffusion(Schedule.cosine(100), prediction="v")
    one, two, null = (sample(network, diffusion, 2, steps=5, labels=label) for label in (1, 2, 3))
    assert (one - two).abs().max() > 1e-3
    assert torch.equal(null, sample(network, diffusion, 2, steps=5))


def test_no_samples(network):
    assert sample(network, GaussianDiffusion(Schedule.cosine(100)), 0, steps=5).shape == (0, 2, 16, 16)


def test_sampling_leaves_the_models_mode(network):
    network.train()
    sample(network, GaussianDiffusion(Schedule.cosine(100)), 1, steps=1)
    assert network.training
    network.eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, "sampler 'euler' is unknown; there are ddpm"),
        ({"steps": 0}, r"expected 1..100"),
        ({"steps": 101}, r"expected 1..100"),
        ({"labels": 4}, r"the classes 0..2"),
        ({"labels": -1}, r"the classes 0..2"),
        ({"labels": [0, 1, 2]}, r"expected one class, or 2"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": 2**64}, "64 bits"),
        ({"first_sample_id": -1}, "ids must lie in"),
    ],
)
def test_bad_arguments(network, options, message):
    with pytest.raises(InputError, match=message):
        sample(network, GaussianDiffusion(Schedule.cosine(100)), 2, **{"steps": 2, **options})


def test_labels_for_an_unconditional_model(network):
    model = UNet(dataclasses.replace(network.config, num_classes=0))
    with pytest.raises(InputError, match="unconditional"):
        sample(model, GaussianDiffusion(Schedule.cosine(100)), 2, steps=2, labels=1)
