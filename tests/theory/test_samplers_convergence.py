"""Every sampler's error falls with its steps, at its order, on data whose best network and exact solution are known.

The problem (a mixture of Gaussians, in float64, unclipped) is that of the figure that docs/convergence.py draws.
"""

import importlib.util
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location("convergence", Path(__file__).parents[2] / "docs" / "convergence.py")
convergence = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(convergence)


@pytest.mark.parametrize("ab", [0.999, 0.5, 1e-3])
def test_the_network_and_the_quantiles_are_those_of_the_mixture(ab):
    # The density of x_t by differencing the distribution function at its quantiles; eps from its logarithm's slope.
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64, requires_grad=True)
    deviations = (ab * convergence.DEVIATIONS**2 + 1 - ab).sqrt()
    parts = torch.distributions.Normal(math.sqrt(ab) * convergence.MEANS, deviations)
    log_density = (convergence.WEIGHTS * parts.log_prob(x[:, None]).exp()).sum(-1).log()
    (score,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(convergence.best_eps(x.detach(), ab), -math.sqrt(1 - ab) * score)
    quantiles = convergence.quantiles(9, ab)
    p = (convergence.WEIGHTS * parts.cdf(quantiles[:, None])).sum(-1)
    torch.testing.assert_close(p, (torch.arange(9).double() + 0.5) / 9, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "spacing", "order"),
    [
        ("ddim", "even", 1),
        ("ddim", "quadratic", 1),
        ("dpmpp_1", "quadratic", 1),
        ("dpmpp_2m", "quadratic", 2),
    ],
)
def test_the_error_of_the_ode_samplers_falls_at_their_order(sampler, spacing, order):
    steps = [16, 32, 64, 128]
    errors = [convergence.error(sampler, n, spacing) for n in steps]
    logs = [torch.tensor(values, dtype=torch.float64).log() for values in (steps, errors)]
    centred = [values - values.mean() for values in logs]
    slope = -float(centred[0] @ centred[1] / (centred[0] @ centred[0]))
    low, high = {1: (0.9, 1.2), 2: (1.8, 2.4)}[order]
    assert low < slope < high, f"measured order {slope:.2f} from {errors}"
    assert all(after < before for before, after in pairwise(errors))


def test_second_order_needs_fewer_steps_than_first():
    # With steps dense near t = 0, where lambda changes fastest: measured 0.0105 and 0.0183.
    assert convergence.error("dpmpp_2m", 20, "quadratic") < convergence.error("ddim", 40, "quadratic")


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", None), ("ddim", 1.0), ("ddim", 0.5), ("dpmpp_2m_sde", None)])
def test_the_distribution_drawn_with_noise_approaches_that_of_the_data(sampler, eta):
    errors = [convergence.error(sampler, n, "quadratic", draws=2**13, eta=eta) for n in (4, 16, 64)]
    floor = convergence.sampling_noise(2**13)
    for before, after in pairwise(errors):
        assert after < before / 2.5, f"{errors}, where draws of the data themselves are {floor:.2g} away"
    assert errors[-1] < 6 * floor
