"""Classifier guidance: whole chains against guided-diffusion's own code (tests/golden/make_guidance.py), and everything
else that a loop has to keep."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import random_classifier, random_unet

import ddpm_fast as df
from ddpm_fast import ops
from ddpm_fast.loops import graphs
from ddpm_fast.loops.classifier_guidance import shift_table
from ddpm_fast.loops.network import Network as Known
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.loops.sampling import prepare
from ddpm_fast.samplers import make_table
from tests.support.classifier_cases import (
    CHAINS,
    CHANNELS,
    CLASSES,
    LABELS,
    SIZE,
    STEPS,
    Images,
    N,
    Network,
    T,
    chain_noise,
)
from tests.support.made_weights import made_input

SHAPE = (CHANNELS, SIZE, SIZE)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "guidance.npz") as file:
        return dict(file)


def diffusion_of(case):
    fixed = "fixed_small" if case.small else "fixed_large"
    variance, loss = ("learned_range", "hybrid") if case.learned else (fixed, "simple")
    return df.GaussianDiffusion(df.Schedule.linear(T), variance=variance, loss=loss)


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_those_of_guided_diffusion(name, golden, monkeypatch):
    case, (first, *rest) = CHAINS[name], chain_noise(name)
    network, judge = Images(case.learned), Network(CLASSES, seed=2)
    rate = 1000 / T if case.rescale else 1
    options = SamplingOptions(
        sampler="ddim" if case.ddim else "ddpm",
        eta=case.eta if case.ddim else None,
        steps=str(STEPS),
        clip=case.clip,
        shape=SHAPE,
        labels=LABELS,
        classifier=lambda x, t: judge(x, t * rate),
        classifier_scale=case.scale,
    )
    prepared = prepare(Known.of(lambda x, t: network(x, t * rate)), diffusion_of(case), N, options)
    normals, step = iter(rest), ops.reverse_step_
    monkeypatch.setattr(
        ops,
        "reverse_step_",
        lambda x, out, rows, i, key, **others: step(x, out, rows, i, next(normals), **others),
    )
    found = dataclasses.replace(prepared, start=lambda key, part: (first[part], None)).draw()
    # PyTorch's matrix products round differently on another processor, which an unclipped chain carries on.
    torch.testing.assert_close(found, torch.from_numpy(golden[name]), rtol=2e-5, atol=1e-5)


LEARNED = df.GaussianDiffusion(df.Schedule.cosine(T), variance="learned_range", loss="hybrid")
FIXED = df.GaussianDiffusion(df.Schedule.cosine(T), variance="fixed_small")


def judge():
    return Network(CLASSES, seed=2)


def drawn(diffusion=FIXED, n=N, **options):
    model = Images(diffusion.objective.learned)
    return df.sample(model, diffusion, n, **{"shape": SHAPE, "steps": 5, "labels": 1, "classifier": judge()} | options)


SAMPLERS = ["ddpm", "ddim", "dpmpp_1", "dpmpp_2m", "dpmpp_2m_sde"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_scale_of_zero_is_no_classifier_and_more_leads_towards_the_label(sampler):
    plain = drawn(sampler=sampler, classifier=None, labels=None, n=64)
    assert torch.equal(drawn(sampler=sampler, classifier_scale=0, n=64), plain)
    weight = made_input("weight", (CHANNELS * SIZE * SIZE, CLASSES)) / 4

    def linear(x, t):
        return x.flatten(1) @ weight

    label = int(linear(plain, None).softmax(1).mean(0).argmin())
    given = {"sampler": sampler, "classifier": linear, "labels": label, "n": 64}
    chances = [linear(drawn(**given, classifier_scale=scale), None).softmax(1)[:, label].mean() for scale in (0, 2)]
    assert chances[0] < 0.4 and chances[1] > chances[0] + 0.2


def test_samplers_of_first_order_are_the_same_guided_too():
    """DPM-Solver++ of first order is DDIM, so the shifted x_0 has to come to the same."""
    torch.testing.assert_close(drawn(sampler="dpmpp_1"), drawn(sampler="ddim"), rtol=1e-5, atol=1e-6)


def test_the_second_order_looks_back_at_the_shifted_x0():
    table = make_table(FIXED, "dpmpp_2m", 3)
    shifts = shift_table(FIXED, table, "dpmpp_2m")
    steps = []
    found = drawn(sampler="dpmpp_2m", steps=3, n=1, on_step=steps.append)
    x = ops.normal(df.NoiseKey.of(0, 1, stream=df.Stream.INITIAL), SHAPE).double()
    model, classifier = Images(False).double(), judge().double()
    previous = torch.zeros_like(x)
    for row, t, (_, to_x0), step in zip(table.coefficients, table.timesteps, shifts, steps, strict=True):
        given = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(classifier(given, t[None]).log_softmax(1)[:, 1].sum(), given)
        with torch.no_grad():
            x0 = (row[0] * x + row[1] * model(x, t[None])).clamp(-1, 1) + to_x0 * g
        x = row[2] * x + row[3] * x0 + row[4] * previous
        previous = x0
        torch.testing.assert_close(step.x0.double(), x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("diffusion", [FIXED, LEARNED], ids=["fixed", "learned"])
def test_a_part_of_a_table_and_repeated_rows_are_guided_as_in_the_whole(diffusion):
    """Editing runs the last rows of a table, or some rows several times, with rows between that add noise."""
    whole = make_table(diffusion, "ddpm", 6)
    shifts = shift_table(diffusion, whole, "ddpm")
    rows = [2, 3, 2, 3, 4, 5]
    part = type(whole)(whole.coefficients[rows], whole.timesteps[rows])
    torch.testing.assert_close(shift_table(diffusion, part, "ddpm"), shifts[rows], rtol=1e-12, atol=0)


def test_pure_noise_is_not_guided():
    diffusion = df.GaussianDiffusion(df.Schedule.cosine(T).zero_terminal_snr(), prediction="v")
    for sampler in ("ddim", "dpmpp_2m"):
        shifts = shift_table(diffusion, make_table(diffusion, sampler, 4), sampler)
        assert not shifts[0].any() and shifts[1:].all() and shifts.isfinite().all()
        assert drawn(diffusion, sampler=sampler).isfinite().all()


def test_a_sample_does_not_depend_on_its_batch():
    labels = [0, 1, 2, 1, 0]
    together = drawn(n=5, labels=labels, sampler="ddpm")
    apart = drawn(n=5, labels=labels, sampler="ddpm", batch_size=2)
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)


FIELDS = {"image_size": 8, "in_channels": 2, "model_channels": 8, "channel_mult": (1, 2), "norm_groups": 4}


def small_classifier(**changes):
    return random_classifier(**FIELDS | changes)


def unet(**changes):
    return random_unet(**FIELDS | changes)


def test_beside_guidance_without_a_classifier_and_in_edits():
    model, classifier, diffusion = unet(num_classes=3), small_classifier().train(), FIXED
    given = {"steps": 3, "labels": [1, 2], "classifier": classifier}
    both = df.sample(model, diffusion, 2, **given, guidance=2.0)
    assert classifier.training and all(parameter.requires_grad for parameter in classifier.parameters())
    assert not torch.equal(both, df.sample(model, diffusion, 2, **given))
    assert not torch.equal(both, df.sample(model, diffusion, 2, steps=3, labels=[1, 2], guidance=2.0))
    images = both.clamp(-1, 1)
    for use in (
        lambda **more: df.image_to_image(model, diffusion, images, **more),
        lambda **more: df.inpaint(model, diffusion, images, torch.eye(8), resamplings=1, **more),
        lambda **more: df.interpolate(model, diffusion, *images, 2, **more),
        lambda **more: df.decode(model, diffusion, images, **more),
    ):
        assert not torch.equal(use(**given), use(**given, classifier_scale=0.0))
    known = torch.eye(8).bool()
    painted = df.inpaint(model, diffusion, images, known, jump_length=2, resamplings=2, **given)
    assert torch.equal(painted[..., known], images[..., known])


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"sampler": "dpmpp_2m"}, torch.float32),
        ({"sampler": "ddim", "dynamic_threshold": 0.9}, torch.bfloat16),
    ],
)
def test_replayed_loops_are_the_eager_ones_bit_for_bit(recording, options, dtype):
    learned = not options
    model, diffusion = unet(learned_variance=learned).to(dtype), LEARNED if learned else FIXED
    classifier = small_classifier().to(dtype)
    given = {"steps": 5, "classifier": classifier, "classifier_scale": 2.0, **options}
    eager = df.sample(model, diffusion, 2, labels=[0, 2], **given, cuda_graph=False)
    assert torch.equal(df.sample(model, diffusion, 2, labels=[0, 2], **given), eager)
    assert recording.captures == 1 and recording.replays == 3
    other = df.sample(model, diffusion, 2, labels=[1, 1], seed=5, **given)
    assert torch.equal(other, df.sample(model, diffusion, 2, labels=[1, 1], seed=5, **given, cuda_graph=False))
    assert recording.captures == 1 and not torch.equal(other, eager)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.mul_(0.5)
    changed = df.sample(model, diffusion, 2, labels=[0, 2], **given)
    assert torch.equal(changed, df.sample(model, diffusion, 2, labels=[0, 2], **given, cuda_graph=False))
    assert recording.captures == 1 and not torch.equal(changed, eager)


def test_graphs_belong_to_the_model_and_the_classifier_together(recording):
    model, classifiers = unet(), [small_classifier(), small_classifier(pool="adaptive")]
    for classifier in classifiers * 2:
        df.sample(model, FIXED, 1, steps=3, labels=0, classifier=classifier)
    assert recording.captures == 2
    del classifier, classifiers
    assert not graphs._guided[model]


def test_a_classifier_that_cannot_be_captured_says_why(recording, monkeypatch):
    classifier = small_classifier()
    monkeypatch.setattr(
        graphs, "cannot_capture", lambda device, model=None: "it is watched" if model is classifier else ""
    )
    with pytest.raises(df.InputError, match="no graph can be captured: it is watched"):
        df.sample(unet(), FIXED, 1, steps=2, labels=0, classifier=classifier, cuda_graph=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": None}, "a classifier needs labels, the classes to guide towards"),
        ({"labels": 3, "classifier": small_classifier()}, r"the classifier has the classes 0\.\.2"),
        ({"labels": -1}, "the classifier has the classes 0 and above"),
        ({"labels": 3}, "answered with logits of 3 classes, and labels go up to 3"),
        ({"labels": 0.5}, "labels are torch.float32; expected integers"),
        ({"classifier": None, "classifier_scale": 1.0}, "classifier_scale is 1.0 without a classifier"),
        ({"classifier_scale": -1}, "classifier_scale is -1; expected a finite number"),
        ({"classifier": "classifier.pt"}, "the classifier is a str; expected a"),
        ({"classifier": judge().to("meta")}, "the classifier is on meta and the network on cpu"),
        (
            {"classifier": lambda x, t: x},
            r"torch.float32 \[2, 2, 4, 4\]; expected its logits",
        ),
        ({"classifier": lambda x, t: (x,)}, "answered with a tuple; expected its logits"),
        ({"classifier": lambda x, t: torch.zeros(2, 3)}, "do not depend on x: it has no gradient"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(df.InputError, match=message):
        drawn(**options)


def test_labels_of_an_unconditional_network_are_the_classifiers_alone():
    model = unet()
    assert df.sample(model, FIXED, 1, steps=2, labels=2, classifier=small_classifier()).shape == (1, 2, 8, 8)
    with pytest.raises(df.InputError, match="unconditional"):
        df.sample(model, FIXED, 1, steps=2, labels=2)
    with pytest.raises(TypeError, match="classifier"):
        df.encode(model, FIXED, torch.zeros(1, 2, 8, 8), classifier=small_classifier())
