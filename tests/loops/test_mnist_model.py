"""The shipped model is a real model of real data: an independent classifier reads its digits, and they vary as the real
ones do without being copies of them."""

import numpy as np
import pytest
import torch

import ddpm_fast as df
from ddpm_fast.data import load_dataset
from ddpm_fast.files import checkpoint
from ddpm_fast.metrics import precision_recall

svm = pytest.importorskip("sklearn.svm", reason="scikit-learn is not installed: pip install -e '.[test]'")


@pytest.fixture(scope="module")
def real():
    dataset = load_dataset("mnist5k")
    return dataset.images.flatten(1).numpy() / 255.0, dataset.labels.numpy()


@pytest.fixture(scope="module")
def drawn(request):
    """100 samples, or 500 of --exhaustive, by the command's defaults (50 steps, fp32), as many of each digit: pixels in
    [0, 1] and what was asked."""
    samples = 500 if request.config.getoption("exhaustive") else 100
    loaded = df.load_model("mnist")
    labels = np.arange(samples) % 10
    x = df.sample(loaded.model, loaded.diffusion, samples, steps=50, seed=0, labels=labels, batch_size=64)
    return ((x + 1) / 2).clamp(0, 1).flatten(1).numpy(), labels


def mean_distance(images):
    """The mean distance between two different images."""
    distances = torch.cdist(torch.from_numpy(images), torch.from_numpy(images))
    return distances.sum().item() / (len(images) * (len(images) - 1))


def test_file_is_small_and_low_precision():
    path = df.load_model("mnist").path
    assert path.stat().st_size <= 8e6
    state, config = checkpoint.read_model(path)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert config["unet"]["num_classes"] == 10 and config["training"]["data"] == "mnist5k"


def test_asked_for_a_digit_it_draws_that_digit(real, drawn):
    # The judge never saw the model: a support vector machine trained on the real digits (about 96% right on digits it
    # was not trained on).
    judge = svm.SVC(C=10.0).fit(*real)
    images, labels = drawn
    agreement = (judge.predict(images) == labels).mean()
    print(f"the classifier agrees with {agreement:.1%} of {len(labels)} samples")
    assert agreement >= 0.95


def test_samples_of_a_digit_vary_as_the_real_ones_do(real, drawn):
    # Mode collapse would bring the samples of a class together; noise or a mixture of classes would spread them.
    ratios = []
    for digit in range(10):
        ours = mean_distance(drawn[0][drawn[1] == digit].astype(np.float32))
        theirs = mean_distance(real[0][real[1] == digit].astype(np.float32))
        print(f"digit {digit}: mean distance {ours:.2f}, real {theirs:.2f}")
        assert 0.85 < ours / theirs < 1.15, f"digit {digit}: {ours:.2f} against {theirs:.2f} between real ones"
        ratios.append(ours / theirs)
    print(f"spread: {np.mean(ratios):.3f} of the real digits'")
    assert np.mean(ratios) >= 0.95


def test_they_cover_the_real_ones(real, drawn):
    # How many real digits have a sample among them, beside how many have other real ones, as many and chosen so.
    images, ours = torch.from_numpy(real[0]).float(), torch.from_numpy(drawn[0]).float()
    n, random = len(ours), np.random.default_rng(0)
    recalls = []
    for _ in range(8):
        order = random.permutation(len(images))
        some, others = images[order[:n]], images[order[n : 2 * n]]
        recalls.append([precision_recall(some, x).recall for x in (ours, others)])
    covered, yardstick = np.mean(recalls, axis=0)
    print(f"recall {covered:.3f}; of real digits {yardstick:.3f}; ratio {covered / yardstick:.3f}")
    assert covered >= 0.9 * yardstick


def test_samples_are_not_copies_of_training_images(real, drawn):
    # A real digit's distance to the nearest other one says how near two different digits come. Copies would be at a
    # small fraction of that.
    images = torch.from_numpy(real[0].astype(np.float32))
    to_training = torch.cdist(torch.from_numpy(drawn[0]), images).min(dim=1).values
    between = torch.cdist(images, images)
    between.fill_diagonal_(float("inf"))
    between = between.min(dim=1).values
    print(f"nearest training image: median {to_training.median():.2f}; between real ones {between.median():.2f}")
    assert to_training.median() > 0.8 * between.median()
    near = between.quantile(0.01)
    share = (to_training < near).float().mean().item()
    print(f"{share:.1%} of the samples are nearer to a training image than 99% of real digits are to each other")
    assert share < 0.02


def test_samples_differ_from_each_other(drawn):
    images = torch.from_numpy(drawn[0])
    distances = torch.cdist(images, images).fill_diagonal_(float("inf"))
    assert distances.min() > 1.0
