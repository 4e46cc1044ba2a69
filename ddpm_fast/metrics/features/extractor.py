"""What an extractor of features is to those who use one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_fast.metrics.feature_set import Kind


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into vectors.

    Attributes:
        kind: What its features are.
        dimensions: The length of a vector.
        device: Where it computes.
        compute: Takes uint8 images [n, C, H, W] of any size, grey or RGB, on any device; gives fp32 features [n, d]
            and fp32 logits [n, classes], or None for these, on `device`.
    """

    kind: Kind
    dimensions: int
    device: torch.device
    compute: Callable[[Tensor], tuple[Tensor, Tensor | None]]
