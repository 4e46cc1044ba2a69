"""All metrics of a set of samples against a reference, in JSON's types, with what they were measured with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ddpm_fast.errors import InputError, printable
from ddpm_fast.metrics.feature_set import FeatureSet
from ddpm_fast.metrics.frechet import estimate_frechet, frechet_distance
from ddpm_fast.metrics.inception import inception_score
from ddpm_fast.metrics.kernel import kernel_distance
from ddpm_fast.metrics.manifold import density_coverage, precision_recall

_SUBSET_SIZE = 1000  # images of a subset of KID [Binkowski et al. 2018], where there are twice as many
_SPLITS = 10
_SEED = 2020  # torch-fidelity's, so that its numbers come out


def measure(fake: FeatureSet, real: FeatureSet, metrics: Sequence[str]) -> dict[str, Any]:
    """Compute metrics, and say what they are of.

    Where the two sets are not of one kind, or it is not known of one, it warns that the numbers may mean nothing.

    Args:
        fake: The samples.
        real: The reference.
        metrics: Some of METRICS.

    Returns:
        For each metric a dict of its numbers: "fid" has value and bias (None where the samples' features are not at
        hand), "kid" value, error and subset_size, "pr" precision, recall, density and coverage, "is" mean, std and
        splits. And "about": features, resizing, reference, n and reference_n (None if it is not known).

    Raises:
        InputError: If a metric is unknown, or a set lacks what it needs.
    """
    for name in metrics:
        if name not in _MEASURES:
            raise InputError(f"metric {name!r:.99} is unknown; expected some of {', '.join(METRICS)}")
    _warn_of_kinds(fake, real)
    found: dict[str, Any] = {name: _MEASURES[name](fake, real) for name in metrics}
    found["about"] = {
        "features": fake.kind.features,
        "resizing": fake.kind.resizing,
        "reference": real.source,
        "n": fake.n or None,
        "reference_n": real.n or None,
    }
    return found


def _fid(fake: FeatureSet, real: FeatureSet) -> dict[str, float | None]:
    mean, covariance = real.statistics.mean, real.statistics.covariance
    if fake.features is None or len(fake.features) < 4:
        statistics = fake.statistics
        return {"value": frechet_distance(statistics.mean, statistics.covariance, mean, covariance), "bias": None}
    return estimate_frechet(fake.features, mean, covariance)._asdict()


def _kid(fake: FeatureSet, real: FeatureSet) -> dict[str, float]:
    x, y = _features(fake, "samples", "kid"), _features(real, "reference", "kid")
    # Halves at the most, because the whole sets in all subsets would have no error.
    size = max(2, min(_SUBSET_SIZE, len(x) // 2, len(y) // 2))
    return {**kernel_distance(x, y, subset_size=size, seed=_SEED)._asdict(), "subset_size": size}


def _pr(fake: FeatureSet, real: FeatureSet) -> dict[str, float]:
    y, x = _features(real, "reference", "pr"), _features(fake, "samples", "pr")
    return {**precision_recall(y, x)._asdict(), **density_coverage(y, x)._asdict()}


def _is(fake: FeatureSet, real: FeatureSet) -> dict[str, float]:
    if fake.logits is None:
        raise InputError(
            f"the features {printable(fake.kind.features)} come without a classifier's answers, which the inception "
            "score needs; choose another extractor, or leave out is"
        )
    splits = min(_SPLITS, len(fake.logits))
    return {**inception_score(fake.logits, splits=splits, seed=_SEED)._asdict(), "splits": splits}


def _features(images: FeatureSet, what: str, metric: str) -> Tensor:
    if images.features is None:
        raise InputError(
            f"of the {what} {printable(images.source)} only the mean and covariance are known, and {metric} compares "
            f"images one by one; give the images as the {what}, or measure fid alone"
        )
    return images.features


def _warn_of_kinds(fake: FeatureSet, real: FeatureSet) -> None:
    """Warn if the sets are not of one kind, as far as is known."""
    for what, of_fake, of_real in (
        ("features", fake.kind.features, real.kind.features),
        ("resizing", fake.kind.resizing, real.kind.resizing),
        ("weights of the extractor (SHA-256)", fake.kind.digest, real.kind.digest),
    ):
        if of_fake and of_real and of_fake != of_real:
            warnings.warn(
                f"the {what} of the samples and of the reference differ: {printable(of_fake)!r} and "
                f"{printable(of_real)!r}. Their comparison means nothing: use one extractor for both",
                stacklevel=3,
            )
    # What other codes' files of statistics are of is not written in them; their users know it to be Inception.
    for what, unknown, known in (("samples", fake, real), ("reference", real, fake)):
        if not unknown.kind.features and known.kind.features and "inception" not in known.kind.features.lower():
            warnings.warn(
                f"what the features of the {what} {printable(unknown.source)} are is not known, and the others are "
                f"{printable(known.kind.features)!r}. If they are of another extractor, such as Inception, the "
                "comparison means nothing",
                stacklevel=3,
            )


_MEASURES: dict[str, Callable[[FeatureSet, FeatureSet], dict[str, Any]]] = {
    "fid": _fid,
    "kid": _kid,
    "pr": _pr,
    "is": _is,
}
METRICS = tuple(_MEASURES)
