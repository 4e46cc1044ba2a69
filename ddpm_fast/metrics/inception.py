"""The inception score [Salimans et al. 2016, sec. 4]: exp of the mean of KL(p(y|x) || p(y)) over the images x, where
p(y|x) is a classifier's answer and p(y) its mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.metrics.inputs import Array, as_vectors


class InceptionScore(NamedTuple):
    """An inception score: 1 at the least, the number of classes at the most.

    Attributes:
        mean: The mean over the splits.
        std: Their standard deviation (divided by the number of splits); 0 if there is one.
    """

    mean: float
    std: float


def inception_score(
    logits: Array, splits: int = 10, split_size: int | None = None, seed: int | None = None
) -> InceptionScore:
    """The inception score, in float64.

    Codes differ in the splits. guided-diffusion takes 5,000 images for each, as they come, and what remains for the
    last: split_size=5000. torch-fidelity shuffles the images and takes ten splits: seed=2020.

    Args:
        logits: A classifier's answers before the softmax, [n, classes]; those codes leave out Inception's bias.
        splits: How many splits; their sizes differ by 1 at the most.
        split_size: How many images a split has, in place of `splits`.
        seed: If given, the images are shuffled as torch-fidelity does with it. Images that are sorted by class need
            that.

    Raises:
        InputError: If there are fewer images than splits.
    """
    check_integer("splits", splits, 1)
    answers = as_vectors("logits", logits, 1, "an inception score").to("cpu", torch.float64)
    n = len(answers)
    if seed is not None:
        random = np.random.RandomState(check_integer("seed", seed, 0, 2**32 - 1))
        answers = answers[torch.from_numpy(random.permutation(n))]
    if split_size is not None:
        size = check_integer("split_size", split_size, 1)
        ends = [*range(size, n, size), n]
    elif n < splits:
        raise InputError(f"there are logits of {n} images for {splits} splits; take fewer splits")
    else:
        ends = [(i + 1) * n // splits for i in range(splits)]
    scores = []
    for start, end in zip([0, *ends], ends, strict=False):
        log_p = answers[start:end].log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(end - start)
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
