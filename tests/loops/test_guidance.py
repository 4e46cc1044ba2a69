"""Classifier-free guidance and dynamic thresholding, against the formulas written out in float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from support.networks import random_unet

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops.guidance import dynamic_threshold, predictor, rescale_to
from ddpm_fast.loops.sampling import sample
from ddpm_fast.nn import UNet
from ddpm_fast.noise import NoiseKey, Stream, normals
from ddpm_fast.samplers import make_table
from ddpm_fast.schedule import Schedule

NULL = 3


class Conditional(torch.nn.Module):
    """An elementwise network with classes 0..2 and a null class; counts its calls. groups = 2: a learned variance."""

    def __init__(self, groups=1):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor([0.9, -0.4, 0.2, 0.5]))
        self.groups, self.calls = groups, []

    def forward(self, x, t, labels=None):
        labels = torch.full_like(t, NULL) if labels is None else labels
        self.calls.append(labels.tolist())
        gain = self.gain[labels].view(-1, *[1] * (x.ndim - 1))
        return torch.cat([gain * torch.cos(3 * x) + 0.1, torch.tanh(x + gain)][: self.groups], dim=1)


def diffusion_for(model, steps=20):
    learned = {"variance": "learned_range", "loss": "hybrid"} if model.groups == 2 else {}
    return GaussianDiffusion(Schedule.cosine(steps), prediction="v", **learned)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def unet():
    return random_unet(image_size=8, in_channels=2, model_channels=8, channel_mult=(1, 2), num_classes=3, norm_groups=4)


@pytest.mark.parametrize("groups", [1, 2], ids=["fixed variance", "learned variance"])
@pytest.mark.parametrize("scale", [0.3, 1.5, 7.0])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_guided_output_is_the_formula(scale, phi, groups):
    # Ho & Salimans 2022, eq. 6 with w + 1 written w; Lin et al. 2023, eq. 15-16.
    model = Conditional(groups)
    labels, x, t = torch.tensor([2, 0, 1]), torch.randn(3, 2, 5), torch.tensor([4, 4, 4])
    predict = predictor(model, labels, learned=groups == 2, guidance=scale, rescale=phi, null_label=NULL)
    found = predict(x, t)
    assert model.calls == [[2, 0, 1, NULL, NULL, NULL]]
    wide = Conditional(groups).double()
    cond, uncond = wide(x.double(), t, labels), wide(x.double(), t)
    guided = uncond[:, :2] + scale * (cond[:, :2] - uncond[:, :2])
    ratio = np.array([cond[i, :2].detach().numpy().std() / guided[i].detach().numpy().std() for i in range(3)])
    guided = guided * (phi * torch.from_numpy(ratio) + 1 - phi).view(3, 1, 1)
    torch.testing.assert_close(found[:, :2].double(), guided, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, 2:].double(), cond[:, 2:], rtol=1e-5, atol=1e-6)
    assert found.shape[1] == 2 * groups


@pytest.mark.parametrize("guidance", [None, 0, 3.0])
@pytest.mark.parametrize("n", [1, 3])
def test_the_network_sees_that_all_samples_are_at_one_timestep(unet, guidance, n):
    strides, forward = [], UNet.forward

    def watched(self, x, t, labels=None):
        assert t.shape == x.shape[:1]
        strides.append((len(t), t.stride(), t.unique().tolist()))
        return forward(self, x, t, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet, "forward", watched)
        sample(unet, GaussianDiffusion(Schedule.cosine(20)), n, steps=[3, 19], labels=1, guidance=guidance)
    size = 2 * n if guidance else n
    stride = (0,) if size > 1 else (1,)  # of a single element torch says 1
    assert strides == [(size, stride, [19]), (size, stride, [3])]


def test_timesteps_that_differ_stay_with_their_samples():
    t, seen = torch.tensor([3, 5, 4]), []

    def model(x, t, labels):
        seen.append(t.tolist())
        return x

    predict = predictor(model, torch.zeros(3, dtype=torch.long), learned=False, guidance=2.0, null_label=NULL)
    predict(torch.zeros(3, 2, 5), t)
    predict(torch.zeros(3, 2, 5), t[1:2].expand(3))
    assert seen == [[3, 5, 4, 3, 5, 4], [5, 5, 5, 5, 5, 5]]


@pytest.mark.peers
@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescaling_is_diffusers(phi):
    peer = pytest.importorskip("diffusers.guiders.guider_utils")
    cond = torch.randn(4, 3, 8, 8)
    guided = cond + 3 * torch.randn(4, 3, 8, 8)
    expected = peer.rescale_noise_cfg(guided, cond, guidance_rescale=phi)
    torch.testing.assert_close(rescale_to(cond, guided, phi), expected, rtol=1e-5, atol=1e-6)


def test_rescaling_leaves_the_output_of_a_new_network_zero():
    zero = torch.zeros(2, 3, 4)
    assert torch.equal(rescale_to(zero, zero, 1.0), zero)


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"guidance": None}, [1, 2]),
        ({"guidance": 1.0, "guidance_rescale": 0.5}, [1, 2]),
        ({"guidance": 0.0}, [NULL, NULL]),
        ({"guidance": 2.0}, [1, 2, NULL, NULL]),
        ({"guidance": 0.0, "guidance_rescale": 0.5}, [1, 2, NULL, NULL]),
    ],
    ids=["none", "one", "zero", "two", "zero, rescaled"],
)
def test_one_call_a_step_and_on_the_batch_doubled_only_where_needed(options, labels):
    model = Conditional()
    sample(model, diffusion_for(model), 2, steps=5, labels=[1, 2], shape=(2, 3), null_label=NULL, **options)
    assert model.calls == [labels] * 5


@pytest.mark.parametrize("groups", [1, 2], ids=["fixed variance", "learned variance"])
def test_guidance_of_one_is_the_plain_model_and_of_zero_the_unconditional_one(groups):
    model = Conditional(groups)
    options = {"steps": 7, "shape": (2, 3)}

    def draw(**more):
        return sample(model, diffusion_for(model), 4, **options, **more)

    assert torch.equal(draw(labels=1, guidance=1.0, null_label=NULL), draw(labels=1))
    assert torch.equal(draw(labels=1, guidance=0.0, null_label=NULL), draw())
    assert not torch.equal(draw(labels=1, guidance=2.0, null_label=NULL), draw(labels=1))


def test_a_unet_knows_its_null_class(unet):
    diffusion = GaussianDiffusion(Schedule.cosine(20), prediction="v")
    plain = sample(unet, diffusion, 2, steps=4)
    assert torch.equal(sample(unet, diffusion, 2, steps=4, labels=1, guidance=0.0), plain)
    # w = 1 + 1e-6 takes the way of two calls.
    doubled = sample(unet, diffusion, 2, steps=4, labels=1, guidance=1 + 1e-6)
    torch.testing.assert_close(doubled, sample(unet, diffusion, 2, steps=4, labels=1), rtol=0, atol=1e-4)


def test_guidance_is_computed_in_fp32_for_a_low_precision_network():
    model = Conditional().to(torch.bfloat16)
    x, t = torch.randn(2, 2, 64).bfloat16(), torch.tensor([0, 0])
    labels = torch.tensor([0, 1])
    found = predictor(model, labels, learned=False, guidance=5.0, null_label=NULL)(x, t)
    cond, uncond = model(x, t, labels).double(), model(x, t).double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), uncond + 5 * (cond - uncond), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold_is_numpys_quantile(quantile):
    # The first sample has outliers; the second lies within [-1, 1] and is left as it is.
    x0 = torch.randn(2, 3, 5, 7) * torch.tensor([4.0, 0.1]).view(2, 1, 1, 1)
    found = dynamic_threshold(x0, quantile)
    for one, result in zip(x0.double().numpy(), found.numpy(), strict=True):
        s = max(1.0, np.quantile(np.abs(one), quantile))
        np.testing.assert_allclose(result, np.clip(one, -s, s) / s, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[1], x0[1])


@pytest.mark.parametrize("groups", [1, 2], ids=["fixed variance", "learned variance"])
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_thresholded_guided_chain_is_the_one_written_out(sampler, groups):
    model = Conditional(groups)
    diffusion = diffusion_for(model)
    options = {"sampler": sampler, "steps": 8}
    found = sample(
        model,
        diffusion,
        3,
        seed=9,
        labels=[0, 2, 1],
        shape=(2, 6),
        guidance=6.0,
        dynamic_threshold=0.8,
        null_label=NULL,
        **options,
    )
    wide, table = Conditional(groups).double(), make_table(diffusion, clip=False, **options)
    x = normals(NoiseKey.of(9, 3, stream=Stream.INITIAL), 12).view(3, 2, 6).double()
    x0, scales = torch.zeros_like(x), []
    with torch.no_grad():
        for i, row in enumerate(table.coefficients.tolist()):
            a_x, a_out, b_x, b_x0, b_previous, sigma, _, spread = row
            t = table.timesteps[i].expand(3)
            cond, uncond = wide(x, t, torch.tensor([0, 2, 1])), wide(x, t)
            out = uncond[:, :2] + 6.0 * (cond[:, :2] - uncond[:, :2])
            previous, x0 = x0, a_x * x + a_out * out
            s = np.maximum(1.0, np.quantile(np.abs(x0.numpy()), 0.8, axis=(1, 2)))
            scales.append(s.max())
            s = torch.from_numpy(s).view(3, 1, 1)
            x0 = x0.clamp(-s, s) / s
            z = normals(NoiseKey.of(9, 3, step=i, stream=Stream.REVERSE), 12).view_as(x).double()
            if groups == 2:
                z = (spread * cond[:, 2:]).exp() * z
            x = b_x * x + b_x0 * x0 + b_previous * previous + sigma * z
    assert max(scales) > 1.5, "the threshold must have had something to do"
    torch.testing.assert_close(found.double(), x, rtol=1e-3, atol=1e-3)


def test_guided_and_thresholded_samples_do_not_depend_on_the_batch():
    model = Conditional()
    options = {"steps": 6, "shape": (2, 4), "guidance": 4.0, "guidance_rescale": 0.5, "dynamic_threshold": 0.9}

    def draw(n, **more):
        return sample(model, diffusion_for(model), n, null_label=NULL, **options, **more)

    together = draw(12, labels=[i % 3 for i in range(12)])
    assert torch.equal(together, draw(12, labels=[i % 3 for i in range(12)], batch_size=5))
    assert torch.equal(together[7:8], draw(1, labels=1, first_sample_id=7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 2.0}, "guidance needs labels"),
        ({"guidance": -0.5, "labels": 1}, "guidance is -0.5; expected a finite number of at least 0"),
        ({"guidance": math.inf, "labels": 1}, "guidance is inf; expected a finite"),
        ({"guidance": math.nan, "labels": 1}, "guidance is nan; expected a finite"),
        ({"guidance": 2.0, "guidance_rescale": 1.1, "labels": 1}, r"guidance_rescale is 1.1; expected 0"),
        ({"guidance_rescale": 0.5, "labels": 1}, "guidance_rescale is 0.5 without guidance"),
        ({"guidance": 2.0, "labels": 1, "null_label": 2}, "this U-Net's null class is 3"),
        ({"dynamic_threshold": 0.0}, r"dynamic_threshold is 0.0; expected a quantile in \(0, 1\]"),
        ({"dynamic_threshold": 1.5}, r"dynamic_threshold is 1.5; expected a quantile in \(0, 1\]"),
    ],
)
def test_refusals_before_any_sampling(unet, options, message):
    drawn = []
    with pytest.raises(InputError, match=message):
        sample(unet, GaussianDiffusion(Schedule.cosine(20)), 2, on_step=drawn.append, **options)
    assert not drawn


def test_guidance_of_models_without_a_null_class(unet):
    plain = UNet(dataclasses.replace(unet.config, num_classes=0))
    diffusion = GaussianDiffusion(Schedule.cosine(20))
    with pytest.raises(InputError, match="this one was trained without: leave guidance out"):
        sample(plain, diffusion, 2, guidance=2.0)
    with pytest.raises(InputError, match=r"which class of the Conditional stands for none .* give null_label"):
        sample(Conditional(), diffusion, 2, guidance=2.0, labels=1, shape=(2, 3))
