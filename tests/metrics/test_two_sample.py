"""The kernel two-sample test tells different distributions apart and equal ones not."""

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.metrics.two_sample import deviations, two_sample_p


def test_it_is_calibrated_and_tells_apart():
    generator = torch.Generator().manual_seed(0)

    def drawn(n: int) -> torch.Tensor:
        return torch.randn(n, 4, generator=generator)

    values = np.array([two_sample_p(drawn(50), drawn(50), 500) for _ in range(100)])
    assert abs(values.mean() - 0.5) < 0.12 and (values < 0.05).mean() < 0.12, "not uniform where nothing differs"
    assert two_sample_p(drawn(200), drawn(200) + 0.4) < 1e-3
    assert two_sample_p(drawn(200), 1.5 * drawn(200)) < 1e-3, "the same mean"
    with pytest.raises(InputError, match="expected as many of both"):
        two_sample_p(drawn(3), drawn(4))


def test_deviations_are_in_levels():
    exact = np.full((2, 1, 2, 2), 128, dtype=np.uint8)
    off = exact.copy()
    off[0, 0, 0, 0] = 124
    assert deviations(off, exact) == {"mean_levels": 0.5, "differing_share": 0.125, "worst_image_mean_levels": 1.0}
