"""The fused ops of the bound give what the reference codes' composition of it gives."""

import pytest
import torch
from support import composed_bound

import ddpm_fast as df

T = 100


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (3, 1, 5, 7)])
def test_the_composition_of_the_reference_codes(shape):
    torch.manual_seed(0)
    diffusion = df.GaussianDiffusion(df.Schedule.linear(T), variance="learned_range", loss="hybrid")
    tables = composed_bound.tables_of(diffusion.schedule, torch.device("cpu"))
    x0, noise, t = torch.rand(shape) * 2 - 1, torch.randn(shape), torch.tensor([0, 1, 50, T - 1])[: shape[0]]
    output = torch.cat([torch.randn(shape), torch.rand(shape) * 2 - 1], 1)
    x_t = diffusion.q_sample(x0, t, noise)
    wide = [x.double() for x in (output, x0, x_t)]
    bits, mse_x0, mse_eps = composed_bound.composed_terms(tables, *wide, t, noise.double())
    terms = diffusion.vlb_terms(output, x0, t, noise)
    for ours, expected in ((terms.bits_per_dim, bits), (terms.mse_x0, mse_x0), (terms.mse_eps, mse_eps)):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    expected = composed_bound.composed_hybrid(tables, *wide, t, noise.double())
    losses = diffusion.training_losses(output, x0, t, noise)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)
