"""The jackknife's standard errors are those that are known in closed form, or from many sets of samples."""

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.metrics.jackknife import jackknife


def test_of_a_mean_it_is_the_standard_error():
    values = np.random.default_rng(0).normal(size=30)
    found = jackknife(lambda i: {"mean": values[i].mean(), "three": 3.0}, 30, groups=30)
    np.testing.assert_allclose(found["mean"], values.std(ddof=1) / 30**0.5, rtol=1e-12)
    assert found["three"] == 0


def test_groups_leave_out_each_sample_once():
    seen = []
    jackknife(lambda i: seen.append(i) or {}, 23, groups=5)
    counts = torch.zeros(23, dtype=torch.int64)
    for i in seen:
        counts[i] += 1
    assert (counts == 4).all() and sorted(len(i) for i in seen) == [18, 18, 18, 19, 19]


def test_of_a_variance_it_is_about_the_spread_over_sets_of_samples():
    rng = np.random.default_rng(1)
    sets = rng.normal(size=(400, 200))
    spread = sets.var(axis=1, ddof=1).std()
    errors = [jackknife(lambda i, x=x: {"var": x[i].var(ddof=1)}, 200)["var"] for x in sets[:100]]
    assert abs(np.sqrt(np.mean(np.square(errors))) / spread - 1) < 0.1


def test_wrong_numbers_are_refused():
    with pytest.raises(InputError, match="groups is 1"):
        jackknife(lambda i: {}, 5, groups=1)
    with pytest.raises(InputError, match="groups is 6"):
        jackknife(lambda i: {}, 5, groups=6)
