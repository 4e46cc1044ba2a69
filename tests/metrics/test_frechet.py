"""The Frechet distance against ADM's evaluator, EDM's formula with scipy's root of a matrix, closed forms, and an exact
form for singular covariances; and what few images are said to add to it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.made_weights import made_input
from support.metric_cases import features, few_features, moments

from ddpm_fast.errors import InputError
from ddpm_fast.metrics import estimate_frechet, frechet_distance

linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed: pip install -e '.[test]'")
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "metrics.npz")
D = 24


def of(x, y) -> float:
    mu1, sigma1 = moments(x)
    mu2, sigma2 = moments(y)
    return frechet_distance(mu1, sigma1, mu2, sigma2)


def exactly(x, y) -> float:
    """Of vectors, without a root of a matrix: with centred X and Y, Tr((S1 S2)^(1/2)) is the sum of the singular values
    of X Y^T, which loses nothing where covariances are singular."""
    x, y = x.double().numpy(), y.double().numpy()
    a, b = (v - v.mean(0) for v in (x, y))
    a, b = a / np.sqrt(len(a) - 1), b / np.sqrt(len(b) - 1)
    apart = np.square(x.mean(0) - y.mean(0)).sum()
    return apart + np.square(a).sum() + np.square(b).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()


def test_it_is_adms():
    assert of(*features()) == pytest.approx(float(GOLDEN["frechet/many"]), rel=1e-9)
    # The root of a singular matrix is as good as 1e-5 there.
    assert of(*few_features()) == pytest.approx(float(GOLDEN["frechet/few"]), rel=1e-4)


def test_it_is_edms_formula():
    (mu, sigma), (mu_ref, sigma_ref) = (moments(x) for x in features())
    s = linalg.sqrtm(np.dot(sigma, sigma_ref))
    fid = float(np.real(np.square(mu - mu_ref).sum() + np.trace(sigma + sigma_ref - s * 2)))
    assert frechet_distance(mu, sigma, mu_ref, sigma_ref) == pytest.approx(fid, rel=1e-9)


def test_it_is_the_closed_form_of_covariances_that_commute():
    a, b = np.array([4.0, 1e-12, 0.0, 9e6]), np.array([1.0, 1e-6, 3.0, 4e6])
    rotation = np.linalg.qr(made_input("rotation", (4, 4)).double().numpy())[0]
    sigma1, sigma2 = rotation * a @ rotation.T, rotation * b @ rotation.T
    distance = frechet_distance(np.zeros(4), sigma1, np.full(4, 2.0), sigma2)
    assert isinstance(distance, float)
    assert distance == pytest.approx(16 + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-7)


@pytest.mark.parametrize(("n", "m"), [(5, 7), (24, 25), (15, 200), (3, 3)], ids=str)
def test_singular_covariances_lose_nothing(n, m):
    real, fake = features()
    x, y = fake[:n], real[:m]
    assert of(x, y) == pytest.approx(exactly(x, y), rel=1e-6)
    assert of(y, x) == pytest.approx(exactly(x, y), rel=1e-6)


def test_spectra_over_ten_decades_lose_no_more_than_float64_has():
    scales = torch.logspace(0, -10, D, dtype=torch.float64)
    x, y = (made_input(name, (300, D)).double() * scales for name in ("x", "y"))
    # An eigenvalue is off by 1e-16 of the largest, and its root by up to 1e-8; both variances are around 1.5.
    assert of(x, y) == pytest.approx(exactly(x, y), abs=D * 1e-8)


def test_equal_sets_are_0_apart_and_never_less():
    real, _ = features()
    assert 0 <= of(real, real) < 1e-7
    assert 0 <= of(real[:10], real[:10]) < 1e-5


def test_arrays_and_tensors_give_the_same():
    (mu1, sigma1), (mu2, sigma2) = (moments(x) for x in features())
    tensors = [torch.from_numpy(a) for a in (mu1, sigma1, mu2, sigma2)]
    assert frechet_distance(*tensors) == frechet_distance(mu1, sigma1, mu2, sigma2)


@pytest.mark.parametrize("n", [150, 12])
def test_the_estimate_of_all_images_is_the_distance(n):
    real, fake = features()
    assert estimate_frechet(fake[:n], *moments(real)).value == pytest.approx(of(fake[:n], real), rel=1e-6)


@pytest.mark.parametrize("n", [201, 1000])
def test_the_bias_is_what_images_of_the_references_own_distribution_are_away(n):
    """The distance of images from their own distribution is bias and nothing else."""
    found = [estimate_frechet(made_input("own", (n, 8), seed), np.zeros(8), np.eye(8)) for seed in range(20)]
    values, biases = np.array(found).T
    # To first order: d / n of the mean, and the variances of the covariance's numbers, d (d + 1) / (4 n).
    assert values.mean() == pytest.approx(8 / n + 8 * 9 / (4 * n), rel=0.1)
    assert biases.mean() == pytest.approx(values.mean(), rel=0.15)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mu1": np.zeros(3)}, r"first mean has shape \[3\] and its covariance \[2, 2\]"),
        ({"mu1": np.zeros(3), "sigma1": np.eye(3)}, "first mean has 3 numbers and the second 2"),
        ({"mu2": np.zeros((2, 1))}, r"shape of the second mean is \[2, 1\]; expected \[d\]"),
        ({"sigma2": np.array([[1.0, np.nan], [np.nan, 1]])}, "2 of 4 numbers of the second covariance are not finite"),
        ({"sigma1": np.array([[1.0, 0.5], [0.4, 1]])}, "first covariance is not symmetric: .* by up to 0.1"),
        ({"sigma1": np.array([[1.0, 2], [2, 1]])}, "first covariance has an eigenvalue of -1, and its largest is 3"),
        ({"sigma2": np.array([[1.0, 2], [2, 1]])}, "second covariance has an eigenvalue of -1"),
        ({"sigma2": -np.eye(2)}, "second covariance has an eigenvalue of -1"),
        ({"sigma1": np.eye(2, dtype=complex)}, "expected real numbers"),
        ({"mu1": None}, "got a NoneType without numbers for the first mean"),
    ],
)
def test_what_is_no_gaussian_is_refused(change, words):
    fine = {"mu1": np.zeros(2), "sigma1": np.eye(2), "mu2": np.zeros(2), "sigma2": np.eye(2)}
    with pytest.raises(InputError, match=words):
        frechet_distance(**(fine | change))


def test_an_estimate_needs_halves_and_one_extractor():
    with pytest.raises(InputError, match="of 3 images; the bias of a Frechet distance needs at least 4"):
        estimate_frechet(np.ones((3, 2)), np.zeros(2), np.eye(2))
    with pytest.raises(InputError, match="features have 3 numbers for each image and the reference 2"):
        estimate_frechet(np.ones((5, 3)), np.zeros(2), np.eye(2))
