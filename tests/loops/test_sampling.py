"""The sampling loop equals the ancestral chain written out, and a sample does not depend on the batch that it is in."""

import dataclasses
import typing

import numpy as np
import pytest
import torch
from support.networks import random_unet

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import SamplingKeywords, SamplingOptions
from ddpm_fast.loops.sampling import prepare, sample
from ddpm_fast.loops.state import BatchState, DeviceTable, RowKind
from ddpm_fast.nn import UNet
from ddpm_fast.noise import NoiseKey, Stream, normals
from ddpm_fast.samplers import SamplerTable, make_table
from ddpm_fast.schedule import Schedule


@pytest.fixture(scope="module")
def network():
    """A small conditional network whose output depends on its input."""
    return random_unet(
        image_size=16,
        in_channels=2,
        model_channels=16,
        channel_mult=(1, 2),
        attention_resolutions=(8,),
        num_classes=3,
        norm_groups=8,
    )


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
    others = sample(Elementwise(), diffusion, 64, steps=20, seed=4, shape=shape)
    options = {"steps": 20, "seed": 3, "shape": shape}
    together = sample(Elementwise(), diffusion, 64, **options)
    assert together.shape == (64, *shape) and not torch.equal(together, others)
    assert torch.equal(together, sample(Elementwise(), diffusion, 64, **options, batch_size=10))
    assert torch.equal(together[17:18], sample(Elementwise(), diffusion, 1, **options, first_sample_id=17))


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


class Recording(Elementwise):
    """An elementwise network with `groups` x C output channels that keeps what it is called with."""

    def __init__(self, groups=1):
        super().__init__()
        self.groups, self.calls = groups, []

    def forward(self, x, t):
        self.calls.append((t.tolist(), x.dtype))
        return torch.cat([x * self.weight, torch.tanh(x.flip(1))][: self.groups], dim=1)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddpm", {}),
        ("ddim", {}),
        ("ddim", {"eta": 0.7, "clip": False}),
        ("dpmpp_1", {}),
        ("dpmpp_2m", {}),
        ("dpmpp_2m", {"clip": False, "spacing": "quadratic"}),
        ("dpmpp_2m_sde", {}),
    ],
)
def test_every_sampler_is_its_table_written_out(sampler, options):
    # x0 = clip(a_x x + a_out out), x = b_x x + b_x0 x0 + b_previous x0_previous + sigma z, in float64.
    diffusion = GaussianDiffusion(Schedule.cosine(100))
    model = Recording()
    found = sample(model, diffusion, 4, sampler=sampler, steps=9, seed=2, shape=(3, 5), **options)
    table = make_table(diffusion, sampler, 9, **options)
    assert model.calls == [([t] * 4, torch.float32) for t in table.timesteps.tolist()]
    x = normals(NoiseKey.of(2, 4, stream=Stream.INITIAL), 15).view(4, 3, 5).double()
    x0 = torch.zeros_like(x)
    for i, row in enumerate(table.coefficients.tolist()):
        a_x, a_out, b_x, b_x0, b_previous, sigma, clip, _ = row
        previous, x0 = x0, (a_x * x + a_out * model.weight.detach().double() * x).clamp(-clip, clip)
        z = normals(NoiseKey.of(2, 4, step=i, stream=Stream.REVERSE), 15).view_as(x).double()
        x = b_x * x + b_x0 * x0 + b_previous * previous + sigma * z
    torch.testing.assert_close(found.double(), x, rtol=1e-3, atol=1e-4)


def test_learned_variance_reaches_the_noise():
    # Nichol & Dhariwal 2021, eq. 15: log Sigma between log beta~ and log beta, by the network's second C channels.
    diffusion = GaussianDiffusion(Schedule.cosine(30), prediction="v", variance="learned_range", loss="hybrid")
    found = sample(Recording(groups=2), diffusion, 4, seed=2, shape=(3, 5))
    schedule = diffusion.schedule
    x = normals(NoiseKey.of(2, 4, stream=Stream.INITIAL), 15).view(4, 3, 5).double()
    for i, t in enumerate(reversed(range(30))):
        ab = schedule.alphas_cumprod[t]
        out, v = x * torch.tensor(0.3).double(), torch.tanh(x.flip(1))
        x0 = (ab.sqrt() * x - (1 - ab).sqrt() * out).clamp(-1, 1)
        f = (v + 1) / 2
        log_variance = f * schedule.betas[t].log() + (1 - f) * schedule.posterior_log_variance_clipped[t]
        z = normals(NoiseKey.of(2, 4, step=i, stream=Stream.REVERSE), 15).view_as(x).double()
        x = schedule.posterior_mean_coef1[t] * x0 + schedule.posterior_mean_coef2[t] * x
        x = x + (t > 0) * (log_variance / 2).exp() * z
    torch.testing.assert_close(found.double(), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("variance", "groups", "message"),
    [
        ("learned_range", 1, r"has 2 channels; a diffusion with a learned variance expects 2C = 4"),
        ("fixed_small", 2, r"has 4 channels; a diffusion with a fixed variance expects C = 2"),
    ],
)
def test_output_channels_that_do_not_fit_the_diffusion(network, variance, groups, message):
    diffusion = GaussianDiffusion(Schedule.cosine(20), variance=variance, loss="hybrid")
    with pytest.raises(InputError, match=message):
        sample(Recording(groups), diffusion, 2, shape=(2, 3))
    model = UNet(dataclasses.replace(network.config, learned_variance=groups == 2))
    drawn = []
    with pytest.raises(InputError, match=message):
        sample(model, diffusion, 2, on_step=drawn.append)
    assert not drawn


def test_a_row_without_a_network_moves_the_state_alone():
    # As in RePaint's table: one row of noising between two rows of denoising.
    diffusion = GaussianDiffusion(Schedule.cosine(10))
    table = make_table(diffusion, "ddim", 2)
    jump = torch.tensor([[0, 0, 0.6, 0, 0, 0.8, float("inf"), 0]], dtype=torch.float64)
    jumping = SamplerTable(torch.cat([table.coefficients[:1], jump, table.coefficients]), torch.tensor([9, 9, 9, 0]))
    asked, states = [], []

    def predict(x, t):
        asked.append(t.tolist())
        return 0.3 * x

    state = BatchState.of(torch.randn(2, 3, 4), DeviceTable.of(jumping, torch.device("cpu"), None), NoiseKey.of(0, 2))
    for asks in (True, False, True, True):
        state.advance(predict, RowKind(asks=asks))
        states.append(state.x.clone())
    assert asked == [[9, 9], [9, 9], [0, 0]]
    z = normals(NoiseKey.of(0, 2, step=1, stream=Stream.REVERSE), 12).view(2, 3, 4)
    torch.testing.assert_close(states[1], 0.6 * states[0] + 0.8 * z)


def test_the_keywords_are_the_options():
    assert typing.get_type_hints(SamplingKeywords) == typing.get_type_hints(SamplingOptions)
    assert SamplingKeywords.__optional_keys__ == {field.name for field in dataclasses.fields(SamplingOptions)}


def test_unknown_keywords_are_refused(network):
    with pytest.raises(TypeError, match="stepps"):
        sample(network, GaussianDiffusion(Schedule.cosine(100)), 1, stepps=5)


def test_preparing_calls_no_network_and_what_is_prepared_can_be_drawn(network, monkeypatch):
    diffusion = GaussianDiffusion(Schedule.cosine(100))
    expected = sample(network, diffusion, 3, steps=4, labels=1, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(UNet, "forward", None)
        prepared = prepare(Network.of(network), diffusion, 3, SamplingOptions(steps=4, labels=1, seed=2))
    assert (prepared.n, prepared.rows, prepared.shape) == (3, 4, (2, 16, 16))
    assert torch.equal(prepared.draw(), expected)
    assert torch.equal(prepared.draw(), expected), "it can be drawn again"


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"sampler": "ddpm"}, torch.float32),
        ({"sampler": "ddpm"}, torch.bfloat16),
        ({"sampler": "ddim", "clip": False}, torch.float32),
        ({"sampler": "dpmpp_2m"}, torch.bfloat16),
        ({"sampler": "dpmpp_2m", "dynamic_threshold": 0.7}, torch.float32),
    ],
    ids=["ddpm", "ddpm, bf16", "ddim, unclipped", "dpmpp_2m, bf16", "dynamic threshold"],
)
def test_on_step_is_given_every_row_and_does_not_change_the_images(options, dtype):
    # x0 is that of the table written out in float64, from the states that on_step was given.
    diffusion = GaussianDiffusion(Schedule.cosine(100))
    model, found = Elementwise().to(dtype), []
    drawn = sample(model, diffusion, 5, steps=6, shape=(3, 5), batch_size=3, on_step=found.append, **options)
    silent = sample(model, diffusion, 5, steps=6, shape=(3, 5), batch_size=3, **options)
    assert torch.equal(drawn.view(torch.int32), silent.view(torch.int32)), "the images differ by their bits"
    threshold = options.get("dynamic_threshold")
    table = make_table(diffusion, options["sampler"], 6, clip=options.get("clip", threshold is None))
    assert [(step.first, step.index, step.t) for step in found] == [
        (first, i, t) for first in (0, 3) for i, t in enumerate(table.timesteps.tolist())
    ]
    assert torch.equal(torch.cat([found[5].x, found[11].x]), drawn)
    for batch in (found[:6], found[6:]):
        n, first = len(batch[0].x), batch[0].first
        x = normals(NoiseKey.of(0, n, first_sample_id=first, stream=Stream.INITIAL), 15).view(n, 3, 5)
        for row, step in zip(table.coefficients, batch, strict=True):
            output = (x.to(dtype) * model.weight.detach()).double()
            x0 = (row[0] * x.double() + row[1] * output).clamp(-row[6], row[6])
            if threshold is not None:
                s = x0.abs().flatten(1).quantile(threshold, dim=1).clamp(min=1).view(-1, 1, 1)
                x0 = x0.clamp(-s, s) / s
            torch.testing.assert_close(step.x0.double(), x0, rtol=1e-3, atol=1e-4)
            assert step.x0.dtype == step.x.dtype == torch.float32
            x = step.x


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
        ({"steps": 0}, r"ask for 1..100"),
        ({"steps": 101}, r"ask for 1..100"),
        ({"steps": "ten"}, "cannot read the respacing 'ten'"),
        ({"spacing": "karras"}, "spacing 'karras' is unknown"),
        ({"eta": 0.5}, "eta belongs to ddim"),
        ({"labels": 4}, r"the classes 0..2"),
        ({"labels": -1}, r"the classes 0..2"),
        ({"labels": [0, 1, 2]}, r"expected one class, or 2"),
        ({"batch_size": 0}, "batch_size is 0; expected an integer of at least 1"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; expected an integer in -2\^63"),
        ({"seed": 1.0}, r"seed is 1.0, a float; expected an integer"),
        ({"sampler": "ddim", "eta": "0"}, r"eta is '0'; expected"),
        ({"batch_size": True}, r"batch_size is True, a bool"),
        ({"first_sample_id": -1}, "first_sample_id is -1"),
    ],
)
def test_bad_arguments(network, options, message):
    with pytest.raises(InputError, match=message):
        sample(network, GaussianDiffusion(Schedule.cosine(100)), 2, **{"steps": 2, **options})


def test_numbers_of_numpy_are_as_good_as_python_s(network):
    diffusion = GaussianDiffusion(Schedule.cosine(np.int64(20)), min_snr_gamma=np.float32(5))
    plain = sample(network, diffusion, 2, sampler="ddim", steps=3, eta=0.5, seed=7, first_sample_id=1, batch_size=1)
    numbers = {"steps": np.int64(3), "eta": np.float32(0.5), "seed": np.uint64(7), "first_sample_id": np.int8(1)}
    same = sample(network, diffusion, np.int16(2), sampler="ddim", batch_size=np.int64(1), **numbers)
    assert torch.equal(plain, same)
    assert diffusion.respace(np.int64(4)).num_timesteps == 4
    assert diffusion.respace([np.int64(3), np.int64(9)]).schedule.timesteps.tolist() == [3, 9]


def test_labels_for_an_unconditional_model(network):
    model = UNet(dataclasses.replace(network.config, num_classes=0))
    with pytest.raises(InputError, match="unconditional"):
        sample(model, GaussianDiffusion(Schedule.cosine(100)), 2, steps=2, labels=1)


def test_batches_are_the_parts_of_what_is_drawn_and_one_left_out_changes_no_other(network):
    diffusion = GaussianDiffusion(Schedule.cosine(50), prediction="v")
    options = SamplingOptions(steps=3, labels=[0, 1, 2, 0, 1], batch_size=2)
    prepared = prepare(Network.of(network), diffusion, 5, options)
    whole = prepared.draw()
    batches = [(part, x.clone()) for part, x in prepared.batches()]
    assert [(part.start, part.stop) for part, _ in batches] == [(0, 2), (2, 4), (4, 5)]
    assert all(torch.equal(whole[part], x) for part, x in batches)
    (only,) = prepared.batches(wanted=lambda part: part.start == 2)
    assert torch.equal(only[1], whole[2:4])


def test_the_check_is_made_before_every_row_and_ends_the_drawing(network):
    diffusion = GaussianDiffusion(Schedule.cosine(50), prediction="v")
    rows, finished = [], []
    options = SamplingOptions(steps=3, batch_size=2, on_step=rows.append)

    def check():
        if len(rows) == 4:  # the first row of the second batch is done
            raise KeyError

    network.train()
    with pytest.raises(KeyError):
        for part, _ in prepare(Network.of(network), diffusion, 5, options).batches(check):
            finished.append(part)
    assert finished == [slice(0, 2)] and len(rows) == 4
    assert network.training, "the network is in the mode that it was in before"
    network.eval()
