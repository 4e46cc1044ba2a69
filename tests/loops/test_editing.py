"""Editing is compared with the sampling loop and with Gaussians whose answers are known in closed form, and its results
do not depend on the batch size."""

import itertools

import numpy as np
import pytest
import torch

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops.editing import (
    decode,
    encode,
    image_to_image,
    inpaint,
    interpolate,
    prepare_interpolate,
    prepare_round_trip,
)
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.loops.sampling import sample
from ddpm_fast.nn import UNet, UNetConfig
from ddpm_fast.noise import NoiseKey, Stream, normals
from ddpm_fast.samplers import make_table
from ddpm_fast.schedule import Schedule

DIFFUSION = GaussianDiffusion(Schedule.cosine(1000), variance="fixed_small")


class Gaussian(torch.nn.Module):
    """The perfect network for x_0 ~ N(0, covariance) on vectors: eps = sqrt(1-ab) (ab covariance + (1-ab) I)^-1 x_t."""

    def __init__(self, covariance):
        super().__init__()
        ab = DIFFUSION.schedule.alphas_cumprod.view(-1, 1, 1)
        noised = ab * covariance.double() + (1 - ab) * torch.eye(len(covariance), dtype=torch.float64)
        self.register_buffer("matrices", ((1 - ab).sqrt() * noised.inverse()).float())
        self.called = []

    def forward(self, x, t):
        self.called.append(int(t[0]))
        return torch.einsum("nij,nj->ni", self.matrices[t], x)


class Elementwise(torch.nn.Module):
    """A network in which no sample can see another, with classes."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor([0.9, 0.3, 0.5]))

    def forward(self, x, t, labels=None):
        labels = torch.full_like(t, 2) if labels is None else labels
        return x * self.gain[labels].view(-1, *[1] * (x.ndim - 1))


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 2, 4, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Image to image


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m_sde"])
def test_strength_one_is_sample(images, sampler):
    options = {"sampler": sampler, "steps": 10, "seed": 3, "first_sample_id": 5, "labels": 1}
    found = image_to_image(Elementwise(), DIFFUSION, images, 1.0, **options)
    assert torch.equal(found, sample(Elementwise(), DIFFUSION, 6, shape=(2, 4, 5), **options))


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
@pytest.mark.parametrize(("strength", "row"), [(0.75, 1), (0.6, 2), (0.21, 4), (0.001, 5)])
def test_image_to_image_is_q_sample_and_the_rest_of_the_chain(images, strength, row, sampler):
    # SDEdit written out in float64: the timesteps of six steps are 999, 799, 599, 400, 200, 0.
    options = {"sampler": sampler, "steps": 6, "spacing": "even", "clip": False}
    found = image_to_image(Elementwise(), DIFFUSION, images, strength, seed=4, **options)
    table = make_table(DIFFUSION, **options)
    ab = DIFFUSION.schedule.alphas_cumprod[table.timesteps[row]]
    z = normals(NoiseKey.of(4, 6, stream=Stream.INITIAL), 40).view_as(images).double()
    x = ab.sqrt() * images.double() + (1 - ab).sqrt() * z
    x0 = None
    for i, coefficients in enumerate(table.coefficients[row:].tolist()):
        a_x, a_out, b_x, b_x0, b_previous, sigma, _, _ = coefficients
        previous, x0 = x0, a_x * x + a_out * 0.5 * x
        # The first step has no past: of first order, where x_0 stands for the previous one.
        previous = x0 if previous is None else previous
        z = normals(NoiseKey.of(4, 6, step=i, stream=Stream.REVERSE), 40).view_as(images).double()
        x = b_x * x + b_x0 * x0 + b_previous * previous + sigma * z
    torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-3)


def test_less_strength_stays_nearer():
    data = torch.randn(500, 2) @ torch.linalg.cholesky(torch.tensor([[1.0, 0.5], [0.5, 1.0]])).T
    model = Gaussian(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    distances = [
        (image_to_image(model, DIFFUSION, data, strength, steps=50, clip=False) - data).square().mean().item()
        for strength in (0.1, 0.3, 0.5, 0.8, 1.0)
    ]
    assert distances == sorted(distances) and distances[0] < 0.1
    # Two independent draws of unit variance are sqrt(2) apart.
    assert distances[-1] == pytest.approx(2.0, abs=0.2)


def test_pixels_of_8_bits_are_the_same_images(images):
    pixels = ((images + 1) * 127.5).round().byte()
    options = {"strength": 0.4, "steps": 5}
    expected = image_to_image(Elementwise(), DIFFUSION, pixels.float() / 127.5 - 1, **options)
    assert torch.equal(image_to_image(Elementwise(), DIFFUSION, pixels, **options), expected)


# Inpainting


def masks(images):
    n, _, h, w = images.shape
    pixels = torch.rand(h, w, generator=torch.Generator().manual_seed(2)) < 0.5
    each = torch.rand(n, 1, h, w, generator=torch.Generator().manual_seed(3)) < 0.5
    return {
        "[H, W]": pixels,
        "[1, H, W]": pixels[None].float(),
        "[N, 1, H, W]": each.long(),
        "like the images": torch.rand(images.shape, generator=torch.Generator().manual_seed(4)) < 0.5,
    }


@pytest.mark.parametrize("kind", ["[H, W]", "[1, H, W]", "[N, 1, H, W]", "like the images"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_known_pixels_come_back_exactly(images, kind, sampler):
    mask = masks(images)[kind]
    options = {"sampler": sampler, "steps": 7, "resamplings": 2, "jump_length": 2}
    found = inpaint(Elementwise(), DIFFUSION, images, mask, **options)
    keep = mask.bool().expand(images.shape)
    assert torch.equal(found[keep], images[keep])
    assert not (found[~keep] == images[~keep]).any()


def repaint_calls(steps, resamplings, jump_length):
    """The states that RePaint asks the network about, in the order of its code's schedule (get_schedule_jump): a step
    leads from each state to a lower one."""
    jumps = dict.fromkeys(range(0, steps - jump_length, jump_length), resamplings - 1)
    t, times = steps, []
    while t >= 1:
        t -= 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump_length):
                t += 1
                times.append(t)
    times.append(-1)
    return [a for a, b in itertools.pairwise(times) if b < a]


@pytest.mark.parametrize(
    ("resamplings", "jump_length"),
    [(1, 3), (2, 1), (3, 3), (2, 7), (4, 4)],
    ids=["no resampling", "single steps", "stretches", "one long stretch", "an odd stretch at the start"],
)
def test_the_network_is_asked_in_repaints_order(resamplings, jump_length):
    model = Gaussian(torch.eye(2))
    options = {"steps": 8, "resamplings": np.int64(resamplings), "jump_length": np.int64(jump_length)}
    inpaint(model, DIFFUSION, torch.zeros(1, 2), torch.zeros(1, 2), **options)
    timesteps = DIFFUSION.schedule.respace(8).timesteps
    assert model.called == timesteps[repaint_calls(8, resamplings, jump_length)].tolist()


CORRELATED = torch.tensor([[1.0, 0.9], [0.9, 1.0]])


def test_resampling_brings_the_unknown_pixel_nearer_to_its_conditional_mean():
    # x_0 ~ N(0, CORRELATED) with the first pixel known to be 1.5: the second is N(0.9 * 1.5, 1 - 0.9^2).
    known, mask = torch.tensor([[1.5, 0.0]]).repeat(2000, 1), torch.tensor([[1, 0]]).repeat(2000, 1)
    options = {"steps": 20, "jump_length": 1, "clip": False}
    found = {
        r: inpaint(Gaussian(CORRELATED), DIFFUSION, known, mask, resamplings=r, **options)[:, 1] for r in (1, 3, 10)
    }
    error = {r: abs(x.mean().item() - 0.9 * 1.5) for r, x in found.items()}
    assert error[10] < error[3] < error[1]
    assert error[10] < 0.08 and error[1] > 0.3
    assert found[10].std().item() == pytest.approx(0.19**0.5, abs=0.15)


@pytest.mark.parametrize("jump_length", [1, 6])
def test_where_nothing_is_known_resampling_keeps_the_distribution(jump_length):
    # A jump is q(x_t | x_t'), which leads from the one marginal to the other; with any other variance this would drift.
    nothing = torch.zeros(4000, 2)
    options = {"steps": 150, "resamplings": 4, "jump_length": jump_length}
    found = inpaint(Gaussian(CORRELATED), DIFFUSION, nothing, nothing, clip=False, **options)
    torch.testing.assert_close(found.T.cov(), CORRELATED, rtol=0, atol=0.1)


# DDIM's latents


def test_latents_of_a_gaussian_are_the_ones_of_its_flow():
    # The ODE that DDIM follows keeps (x_t / its standard deviation) along each eigenvector of the covariance, so that
    # x_T = sqrt(ab_T + (1 - ab_T) / eigenvalue) x_0, which is nearly white.
    x0 = torch.randn(200, 2) @ torch.linalg.cholesky(CORRELATED).T
    found = encode(Gaussian(CORRELATED), DIFFUSION, x0, clip=False)
    values, vectors = torch.linalg.eigh(CORRELATED.double())
    ab = DIFFUSION.schedule.alphas_cumprod[-1]
    gain = vectors @ ((ab * values + 1 - ab) / values).sqrt().diag() @ vectors.T
    torch.testing.assert_close(found.double(), x0.double() @ gain, rtol=0, atol=0.05)


def test_round_trip_converges_as_steps_grow():
    x0 = torch.randn(200, 2) @ torch.linalg.cholesky(CORRELATED).T
    model, errors = Gaussian(CORRELATED), []
    for steps in (10, 40, 160, 640):
        latents = encode(model, DIFFUSION, x0, steps, clip=False)
        errors.append((decode(model, DIFFUSION, latents, steps, clip=False) - x0).abs().mean().item())
    # Of first order: four times the steps, about a quarter of the error.
    assert all(later < earlier / 3 for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.01


def test_encode_and_decode_are_ddims_steps_with_the_labels(images):
    # Song et al. 2020, eq. 12 with sigma = 0, upwards and downwards, in float64.
    labels, gain = [0, 1, 1, 0, 1, 0], torch.tensor([0.9, 0.3, 0.3, 0.9, 0.3, 0.9]).double().view(-1, 1, 1, 1)
    chain = DIFFUSION.respace(5).schedule
    ab = [*chain.alphas_cumprod.tolist()]

    def step(x, a, b):
        eps = gain * x
        x0 = ((x - (1 - a) ** 0.5 * eps) / a**0.5).clamp(-1, 1)
        return b**0.5 * x0 + (1 - b) ** 0.5 * (x - a**0.5 * x0) / (1 - a) ** 0.5

    x = images.double()
    for i in range(4):
        x = step(x, ab[i], ab[i + 1])
    latents = encode(Elementwise(), DIFFUSION, images, 5, labels)
    torch.testing.assert_close(latents.double(), x, rtol=1e-4, atol=1e-4)
    for i in reversed(range(5)):
        x = step(x, ab[i], ab[i - 1] if i else 1.0)
    found = decode(Elementwise(), DIFFUSION, latents, 5, labels)
    torch.testing.assert_close(found.double(), x, rtol=1e-3, atol=1e-3)


# Interpolation


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_ends_of_a_noised_way_are_image_to_image(images, sampler):
    options = {"strength": 0.6, "sampler": sampler, "steps": 8, "seed": 2, "first_sample_id": 11, "labels": 1}
    found = interpolate(Elementwise(), DIFFUSION, images[0], images[1], 5, **options)
    assert found.shape == (5, 2, 4, 5)
    for end, image in ((found[:1], images[:1]), (found[-1:], images[1:2])):
        assert torch.equal(end, image_to_image(Elementwise(), DIFFUSION, image, **options))


def test_noised_way_is_straight(images):
    # Without a clip everything from a and b to the way is linear, with one and the same noise.
    options = {"strength": 0.6, "steps": 8, "clip": False}
    found = interpolate(Elementwise(), DIFFUSION, images[0], images[1], 5, **options)
    straight = torch.lerp(found[:1], found[-1:], torch.linspace(0, 1, 5).view(-1, 1, 1, 1))
    torch.testing.assert_close(found, straight, rtol=0, atol=1e-4)


def test_ends_of_a_ddim_way_are_its_round_trips(images):
    found = interpolate(Elementwise(), DIFFUSION, images[0], images[1], 4, sampler="ddim", steps=8, labels=1)
    latents = encode(Elementwise(), DIFFUSION, images[:2], 8, 1)
    ends = decode(Elementwise(), DIFFUSION, latents, 8, 1)
    assert torch.equal(found[[0, -1]], ends)


def test_ddim_way_runs_on_the_sphere(images):
    options = {"sampler": "ddim", "steps": 8, "clip": False}
    found = interpolate(Elementwise(), DIFFUSION, images[0], images[1], 3, **options)
    a, b = encode(Elementwise(), DIFFUSION, images[:2], 8, clip=False).double()
    # Half way on the circle through a and b: both as much, and to the angle's half.
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    middle = ((a + b) / (2 * torch.cos(angle / 2))).float()[None]
    torch.testing.assert_close(
        found[1:2], decode(Elementwise(), DIFFUSION, middle, 8, clip=False), rtol=1e-3, atol=1e-4
    )


def test_ddim_way_of_less_strength_goes_up_to_its_row_and_back():
    model = Gaussian(CORRELATED)
    a, b = torch.tensor([0.5, -0.2]), torch.tensor([1.0, 1.2])
    found = interpolate(model, DIFFUSION, a, b, 2, strength=0.5, sampler="ddim", steps=9, clip=False)
    up = DIFFUSION.schedule.respace(9).timesteps.tolist()[:5]
    assert up[-1] in (499, 500)
    assert model.called == up[:-1] + up[::-1]
    torch.testing.assert_close(found, torch.stack([a, b]), rtol=0, atol=0.2)


# All of them


EDITS = {
    "image_to_image": lambda images, **o: image_to_image(Elementwise(), DIFFUSION, images, 0.6, **o),
    "inpaint": lambda images, **o: inpaint(
        Elementwise(), DIFFUSION, images, torch.eye(4, 5), resamplings=2, jump_length=2, **o
    ),
    "encode": lambda images, seed=0, first_sample_id=0, **o: encode(Elementwise(), DIFFUSION, images, **o),
    "decode": lambda images, **o: decode(Elementwise(), DIFFUSION, images, **o),
}


@pytest.mark.parametrize("name", list(EDITS))
def test_an_edit_does_not_depend_on_the_batch(images, name):
    edit, options = EDITS[name], {"steps": 6, "seed": 5}
    together = edit(images, **options)
    assert together.shape == images.shape and together.dtype == torch.float32
    assert torch.equal(together, edit(images, **options, batch_size=4))
    assert torch.equal(together[4:5], edit(images[4:5], **options, first_sample_id=4))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_interpolation_does_not_depend_on_the_batch(images, sampler):
    options = {"sampler": sampler, "steps": 6}
    together = interpolate(Elementwise(), DIFFUSION, images[0], images[1], 5, **options)
    assert torch.equal(
        together, interpolate(Elementwise(), DIFFUSION, images[0], images[1], 5, **options, batch_size=2)
    )


@pytest.fixture(scope="module")
def unet():
    config = UNetConfig(
        image_size=8, in_channels=1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(), num_classes=3, norm_groups=4,
    )  # fmt: skip
    return UNet(config).eval()


def test_edits_take_guidance_and_low_precision(unet):
    model = UNet(unet.config).to(torch.bfloat16).eval()
    images = torch.rand(2, 1, 8, 8)
    options = {"steps": 4, "labels": 1, "guidance": 2.0, "dynamic_threshold": 0.9}
    mask = torch.eye(8)
    found = inpaint(model, DIFFUSION, images, mask, resamplings=2, jump_length=2, **options)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert torch.equal(found[:, :, mask.bool()], images[:, :, mask.bool()])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m, x: image_to_image(m, DIFFUSION, x, 0.0), r"strength is 0.0; expected a number in \(0, 1\]"),
        (lambda m, x: image_to_image(m, DIFFUSION, x, 1.2), r"strength is 1.2; expected"),
        (lambda m, x: image_to_image(m, DIFFUSION, x[0], 0.5), r"are \[1, 8, 8\], but this UNet draws \(1, H"),
        (lambda m, x: image_to_image(m, DIFFUSION, x.numpy(), 0.5), "the images are ndarray; expected a tensor"),
        (lambda m, x: image_to_image(m, DIFFUSION, x.long(), 0.5), "the images are torch.int64; expected a tensor"),
        (lambda m, x: image_to_image(m, DIFFUSION, x / 0, 0.5), "the images have NaN or infinite values"),
        (lambda m, x: image_to_image(m, DIFFUSION, x, labels=5), r"this model has the classes 0..2"),
        (lambda m, x: image_to_image(m, DIFFUSION, x, guidance=2.0), "guidance needs labels"),
        (lambda m, x: inpaint(m, DIFFUSION, x, x[0, 0, :4] > 0), r"the mask is \[4, 8\]; .* \[8, 8\] or \[1, 8"),
        (lambda m, x: inpaint(m, DIFFUSION, x, "half"), "the mask is str; expected a tensor of shape"),
        (lambda m, x: inpaint(m, DIFFUSION, x, x[0, 0] * 0 + 0.5), "64 of the mask's 64 values are neither 0 nor 1"),
        (lambda m, x: inpaint(m, DIFFUSION, x, x > 0, resamplings=0), "resamplings is 0; expected an integer"),
        (lambda m, x: inpaint(m, DIFFUSION, x, x > 0, resamplings=2.5), "resamplings is 2.5, a float; expected"),
        (lambda m, x: inpaint(m, DIFFUSION, x, x > 0, steps=5), "jump_length is 5, but there are 5 steps: give a"),
        (lambda m, x: interpolate(m, DIFFUSION, x[0], x[1], 1), "n is 1; expected at least 2"),
        (lambda m, x: interpolate(m, DIFFUSION, x[0], x[1, :, 1:], 3), r"a is torch.float32 \[1, 8, 8\] and b"),
        (lambda m, x: interpolate(m, DIFFUSION, x[0], x[1], 3, strength=1), "strength is 1: nothing of a and b"),
    ],
)  # fmt: skip
def test_refusals_before_anything_is_drawn(unet, edit, message, monkeypatch):
    def draw(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(UNet, "forward", draw)
    with pytest.raises(InputError, match=message):
        edit(unet, torch.rand(2, 1, 8, 8))


def test_sampler_of_decode_is_ddim(unet):
    with pytest.raises(TypeError, match="sampler"):
        decode(unet, DIFFUSION, torch.rand(2, 1, 8, 8), sampler="ddpm")


@pytest.mark.parametrize(
    ("edit", "unexpected"),
    [
        (lambda m, x: image_to_image(m, DIFFUSION, x, shape=(1, 8, 8)), "shape"),
        (lambda m, x: inpaint(m, DIFFUSION, x, x > 0, strength=0.5), "strength"),
        (lambda m, x: interpolate(m, DIFFUSION, x[0], x[1], 3, shape=(1, 8, 8)), "shape"),
        (lambda m, x: encode(m, DIFFUSION, x, guidance=2.0), "guidance"),
        (lambda m, x: decode(m, DIFFUSION, x, eta=0.5), "eta"),
    ],
    ids=["image_to_image", "inpaint", "interpolate", "encode", "decode"],
)
def test_keywords_that_an_edit_does_not_take(unet, edit, unexpected):
    with pytest.raises(TypeError, match=f"unexpected keyword arguments {unexpected}; expected some of"):
        edit(unet, torch.rand(2, 1, 8, 8))


def test_on_step_is_given_no_x0_by_the_jumps_of_inpainting(images):
    mask, found = torch.eye(4, 5), []
    options = {"steps": 6, "resamplings": 2, "jump_length": 2, "sampler": "dpmpp_2m"}
    drawn = inpaint(Elementwise(), DIFFUSION, images, mask, on_step=found.append, **options)
    assert torch.equal(drawn, inpaint(Elementwise(), DIFFUSION, images, mask, **options))
    steps = DIFFUSION.schedule.respace(6).timesteps
    asked = [step.t for step in found if step.x0 is not None]
    assert asked == steps[repaint_calls(6, 2, 2)].tolist()
    assert [step.index for step in found] == list(range(len(found))) and len(found) == len(asked) + 2


def test_network_of_ones_own_with_images_without_channels():
    with pytest.raises(InputError, match=r"the images are \[3\]; expected \[N, C, ...\]"):
        image_to_image(Elementwise(), DIFFUSION, torch.rand(3))


@pytest.mark.parametrize("edit", ["interpolation", "round trip"])
def test_an_edit_that_encodes_is_drawn_and_checked_batch_by_batch_too(images, edit):
    network, options = Network.of(Elementwise()), SamplingOptions(sampler="ddim", steps=4, batch_size=2)
    if edit == "interpolation":
        prepared = prepare_interpolate(network, DIFFUSION, images[0], images[1], 5, options)
    else:
        prepared = prepare_round_trip(network, DIFFUSION, images[:5], options)
    whole, checks = prepared.draw(), []
    batches = [(part, x.clone()) for part, x in prepared.batches(lambda: checks.append(1))]
    assert [part.start for part, _ in batches] == [0, 2, 4] and prepared.n == 5
    assert all(torch.equal(whole[part], x) for part, x in batches)
    # Three rows encode and four decode. The ends of an interpolation are one batch.
    assert len(checks) == (1 if edit == "interpolation" else 3) * 3 + 3 * 4
    (only,) = prepared.batches(wanted=lambda part: part.start == 2)
    assert torch.equal(only[1], whole[2:4])
