"""Made-up features and logits that tests/golden/make_metrics.py measures with other codes, and tests with ours."""

import numpy as np
import torch
from support.made_weights import made_input
from torch import Tensor


def features() -> tuple[Tensor, Tensor]:
    """float32 [230, 24] and [180, 24] whose numbers depend on each other, and whose distributions differ a little."""
    mix = made_input("mix", (24, 24)) * torch.logspace(0, -1.5, 24)
    real = made_input("real", (230, 24)) @ mix + 3
    fake = 0.9 * made_input("fake", (180, 24)) @ mix + 3.2
    return real, fake


def few_features() -> tuple[Tensor, Tensor]:
    """The first 15 and 20 of them: their covariances are singular."""
    real, fake = features()
    return real[:15], fake[:20]


def logits() -> Tensor:
    """float32 [230, 10]."""
    return 2 * made_input("logits", (230, 10))


def moments(vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the covariance in float64, as numpy has them."""
    return vectors.double().numpy().mean(0), np.cov(vectors.double().numpy(), rowvar=False)
