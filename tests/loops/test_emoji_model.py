"""The shipped colour model draws emoji of the group that was asked for. They vary and are coloured as the real ones,
and are not copies of them."""

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

import ddpm_fast as df
from ddpm_fast.data import load_dataset, split_as_recorded
from ddpm_fast.files import checkpoint
from ddpm_fast.metrics import memorisation

MISSING = "scikit-learn is not installed: pip install -e '.[test]'"
svm = pytest.importorskip("sklearn.svm", reason=MISSING)
model_selection = pytest.importorskip("sklearn.model_selection", reason=MISSING)

GROUPS = 10
SKIN_TONES = 2  # a group of five plain squares, too few to say how it varies


@pytest.fixture(scope="module")
def real():
    """The 3,786 emoji, in [0, 1], and their groups."""
    dataset = load_dataset("emoji32")
    return dataset.images.float() / 255, dataset.labels.numpy()


@pytest.fixture(scope="module")
def drawn(request):
    """100 samples, or 500 of --exhaustive, as many of each group: in [0, 1], and what was asked."""
    samples = 500 if request.config.getoption("exhaustive") else 100
    loaded = df.load_model("emoji")
    labels = np.arange(samples) % GROUPS
    x = df.sample(loaded.model, loaded.diffusion, samples, sampler="dpmpp_2m", steps=20, seed=0, labels=labels)
    return ((x + 1) / 2).clamp(0, 1), labels


def of_groups(values, labels):
    """The mean of the groups' means: a third of all emoji are people."""
    return float(np.mean([np.mean(values[labels == group]) for group in range(GROUPS)]))


def small(images):
    """[n, 768]: what the judge sees."""
    return avg_pool2d(images, 2).flatten(1).numpy()


def test_file_is_small_and_low_precision():
    path = df.load_model("emoji").path
    assert path.stat().st_size <= 8e6
    state, config = checkpoint.read_model(path)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert config["unet"]["num_classes"] == GROUPS and config["training"]["data"] == "emoji32"
    assert config["label_names"] == load_dataset("emoji32").label_names


def test_asked_for_a_group_it_draws_that_group(real, drawn):
    # Some groups look alike (objects and activities), so what counts is how often real emoji are told apart.
    images, labels = real
    judge = svm.SVC(C=10.0)
    expected = of_groups(model_selection.cross_val_predict(judge, small(images), labels, cv=3) == labels, labels)
    agreement = of_groups(judge.fit(small(images), labels).predict(small(drawn[0])) == drawn[1], drawn[1])
    print(f"the classifier agrees with {agreement:.1%} of the samples, and with {expected:.1%} of real emoji")
    assert agreement >= 0.9 * expected


def test_samples_vary_as_the_real_ones_do(real, drawn):
    ratios = []
    for group in set(range(GROUPS)) - {SKIN_TONES}:
        ours, theirs = (images[labels == group].flatten(1) for images, labels in (drawn, real))
        spread = [torch.pdist(x).mean().item() for x in (ours, theirs)]
        print(f"group {group}: mean distance {spread[0]:.2f}, real {spread[1]:.2f}")
        ratios.append(spread[0] / spread[1])
    print(f"spread: {np.mean(ratios):.3f} of the real emoji's")
    assert 0.85 < np.mean(ratios) < 1.1


@pytest.mark.parametrize(
    ("what", "measure"),
    [
        ("white pixels", lambda images: (images > 0.95).all(1).float().mean((1, 2))),
        ("colourfulness", lambda images: (images.amax(1) - images.amin(1)).mean((1, 2))),
    ],
    ids=["white", "colourful"],
)
def test_samples_are_coloured_as_the_real_ones_are(what, measure, real, drawn):
    ours, theirs = (of_groups(measure(images).numpy(), labels) for images, labels in (drawn, real))
    print(f"{what}: {ours:.3f}, real {theirs:.3f}")
    assert ours == pytest.approx(theirs, rel=0.15)


def test_samples_are_not_copies_of_training_images(drawn):
    # Many emoji differ in the colour of the skin alone, and some in nothing, so held-out ones have near neighbours too.
    dataset = load_dataset("emoji32")
    training = df.load_model("emoji").config["training"]
    seen, held_out = (part.images.float().flatten(1) / 255 for part in split_as_recorded(dataset, training["held_out"]))
    found = memorisation(drawn[0].flatten(1), seen, held_out)
    print(f"nearer to a training image than a held-out emoji is, with probability {found.nearer:.3f}")
    assert found.nearer < 0.5
