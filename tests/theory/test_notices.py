"""The warnings that are given once: many losses on one noise, and images in another range."""

import re
import warnings

import pytest
import torch

from ddpm_fast import diffusion as module
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.noise import NoiseKey
from ddpm_fast.notices import Notices
from ddpm_fast.schedule import Schedule

T = torch.tensor([1, 2])
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def diffusion(monkeypatch):
    monkeypatch.setattr(module, "notices", Notices())
    return GaussianDiffusion(Schedule.cosine(10))


def given_by(run):
    """The warnings of ours that run() gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    found = [str(warning.message) for warning in caught if warning.category is UserWarning]
    for warning in caught:
        if warning.category is UserWarning:
            assert warning.filename == __file__  # it names the caller's line
    return found


def losses(diffusion, keys, requires_grad=True):
    def run():
        for key in keys:
            output = torch.zeros_like(IMAGES, requires_grad=requires_grad)
            diffusion.training_losses(output, IMAGES, T, key)

    return given_by(run)


def test_a_loop_on_one_noise_is_told_so_once(diffusion):
    assert losses(diffusion, (NoiseKey.of(seed=3, n=2) for _ in range(99))) == []
    (said,) = losses(diffusion, (NoiseKey.of(seed=3, n=2) for _ in range(200)))
    assert said.startswith("100 training losses have met the same noise (seed 3, step 0, samples from 0)")
    assert "each_step" in said and "step=i" in said


@pytest.mark.parametrize(
    "keys",
    [
        lambda: zip(range(300), NoiseKey.each_step(0, 2), strict=False),
        lambda: ((i, NoiseKey.of(0, 2, step=i)) for i in range(300)),
        lambda: ((i, NoiseKey.of(i, 2)) for i in range(300)),
        lambda: ((i, NoiseKey.of(0, 2, first_sample_id=2 * i)) for i in range(2500)),
    ],
    ids=["each step", "step=i", "another seed", "other samples"],
)
def test_fresh_noise_is_no_reason(keys, diffusion):
    assert losses(diffusion, (key for _, key in keys())) == []


def test_a_key_that_is_advanced_in_place_is_fresh(diffusion):
    key = NoiseKey.of(0, 2)

    def advanced():
        for _ in range(300):
            key.step.add_(1)
            yield key

    assert losses(diffusion, advanced()) == []


def test_two_keys_in_turn_are_each_counted(diffusion):
    keys = (NoiseKey.of(0, 2, first_sample_id=2 * (i % 2)) for i in range(250))
    assert len(losses(diffusion, keys)) == 1


def test_losses_without_a_gradient_are_not_counted(diffusion):
    assert losses(diffusion, (NoiseKey.of(0, 2) for _ in range(150)), requires_grad=False) == []
    with torch.no_grad():
        assert losses(diffusion, (NoiseKey.of(0, 2) for _ in range(150))) == []


def test_a_compiler_sees_nothing_of_it(diffusion):
    torch._dynamo.reset()
    key = NoiseKey.of(0, 2)

    @torch.compile(fullgraph=True, backend="eager")
    def loss(output, x0):
        return diffusion.training_losses(output, x0, T, NoiseKey(key.seed, key.sample_id, key.step)).mean()

    unit = (IMAGES + 1) / 2
    assert given_by(lambda: [loss(torch.zeros_like(unit, requires_grad=True), unit) for _ in range(120)]) == []


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (
            (IMAGES + 1) / 2,
            r"from \d\S* to [01]\S*; the diffusion expects \[-1, 1\]\. If the pixels are 0\.\.1",
        ),
        ((IMAGES + 1).mul(127.5).round(), r"x0 range from 0 to 255; .* give the uint8 pixels"),
        (IMAGES * 4, r"x0 range from -\d\S* to \d\S*; .*Latents"),
        (((IMAGES + 1) / 2).half(), r"range from .* 2 \* x0 - 1"),
    ],
    ids=["0..1", "0..255", "latents", "fp16"],
)
@pytest.mark.parametrize("method", ["q_sample", "training_losses"])
def test_images_in_another_range_are_told_so_once(method, images, said, diffusion):
    def run():
        for _ in range(20):
            if method == "q_sample":
                diffusion.q_sample(images, T, NoiseKey.of(0, 2))
            else:
                diffusion.training_losses(torch.zeros_like(images), images, T, NoiseKey.of(0, 2))

    (warning,) = given_by(run)
    assert re.search(said, warning), warning


@pytest.mark.parametrize(
    "images",
    [
        IMAGES,
        IMAGES * 1.2,
        torch.zeros_like(IMAGES),
        torch.ones_like(IMAGES),
        (IMAGES * 127.5 + 127.5).to(torch.uint8),
        torch.full_like(IMAGES, torch.nan),
        torch.rand(2, 3, 2, 2),  # too small to say
        torch.zeros(0, 3, 16, 16),
    ],
    ids=["-1..1", "a little more", "black", "white", "uint8", "nan", "tiny", "empty"],
)
def test_other_images_are_no_reason(images, diffusion):
    t = T[: len(images)]
    assert given_by(lambda: diffusion.q_sample(images, t, NoiseKey.of(0, len(images)))) == []


def test_only_the_first_batches_are_looked_at(diffusion, monkeypatch):
    looked = []
    original = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda *a, **k: looked.append(1) or original(*a, **k))
    for _ in range(50):
        diffusion.q_sample(IMAGES, T, NoiseKey.of(0, 2))
    assert len(looked) == 8
