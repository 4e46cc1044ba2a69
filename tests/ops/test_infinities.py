"""A number that diverges shows in every backend as it does in the reference: infinite where it is, and NaN where it is.

What is compared is the kind of each number: of a loss, of a state, and of what a gradient is made of. The exact decoder
is left out: a thousand deviations away the kernels' series are right, and the reference's difference of two CDFs is
not.
"""

import math

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.ops import use_backend

BAD = [math.inf, -math.inf, math.nan, 1e10, -1e10, 3e38, -3e38, 1000.0, -1000.0]
T = torch.arange(len(BAD))
STEP_ROW = [1.25, -0.75, 0.5, 0.4, -0.3, 0.2, 1.0, 0.35]


def image(seed, channels=3):
    return torch.randn((len(BAD), channels, 4, 5), generator=torch.Generator().manual_seed(seed))


def bound_table(kind, columns=9):
    row = [0.3, 0.9, -0.1, 20.0, -6.0, 0.2, 0.3, kind, math.inf, 1.0, 0.5]
    return torch.tensor([row[:columns]]).repeat(len(BAD), 1)


def kinds(*results):
    """0 for a finite number, 1 for -infinity, 2 for infinity, 3 for NaN."""
    return [(x == -math.inf) + 2 * (x == math.inf) + 3 * x.isnan() for x in (result.float() for result in results)]


def step(clip, images):
    x, output, x0, z = images
    table = torch.tensor([[*STEP_ROW[:6], clip, STEP_ROW[7]]])
    made = ops.reverse_step(x, output, table, torch.tensor(0), z, x0_previous=x0, return_x0=True)
    return made.x, made.x0


def hybrid(kind, images):
    x0, output, _, z = images
    output = output.clone().requires_grad_()
    loss = ops.hybrid_loss(output, x0, T, bound_table(kind, 11), z)
    return loss.detach(), torch.autograd.grad(loss.sum(), output)[0]


def bound(kind, images):
    x0, output, _, z = images
    output = output.clone().requires_grad_()
    terms = ops.vlb_terms(output, x0, T, bound_table(kind), z)
    return terms.bits_per_dim.detach(), terms.mse_x0, torch.autograd.grad(terms.bits_per_dim.sum(), output)[0]


CALLS = {
    "reverse_step, clipped": lambda images: step(1.0, images),
    "reverse_step": lambda images: step(math.inf, images),
    "hybrid_loss, KL": lambda images: hybrid(0.0, images),
    "hybrid_loss, decoder": lambda images: hybrid(1.0, images),
    "vlb_terms, KL": lambda images: bound(0.0, images),
    "vlb_terms, decoder": lambda images: bound(1.0, images),
}


@pytest.mark.parametrize("word", CALLS)
def test_what_diverges_shows(word, backend):
    # Each sample has one of the numbers.
    clean = [image(0), image(1, 6), image(2), image(3)]
    for which, channel in ((0, 1), (1, 1), (1, 4), (2, 1), (3, 2)):
        images = [x.clone() for x in clean]
        images[which][:, channel, 1, 2] = torch.tensor(BAD)
        found = kinds(*CALLS[word](images))
        with use_backend("reference"):
            expected = kinds(*CALLS[word](images))
        for actual, wanted in zip(found, expected, strict=True):
            assert torch.equal(actual, wanted), f"argument {which}, channel {channel}"


def test_a_variance_that_diverges_is_infinite(backend):
    # It was -1.1e38 once, which a test for finite numbers lets pass.
    x, output, x0, z = image(0), image(1, 6), image(2), image(3)
    output[0, 3, 1, 2] = 1e10
    assert step(math.inf, (x, output, x0, z))[0][0, 0, 1, 2] == z[0, 0, 1, 2].sign() * math.inf


def test_a_clipped_output_of_a_fixed_variance_may_be_infinite(backend):
    x0, output, z = image(0), image(1), image(2)
    output[:, 1, 1, 2] = torch.tensor(BAD)
    table = bound_table(0.0)
    table[:, 8] = 1.0
    terms = ops.vlb_terms(output, x0, T, table, z)
    assert torch.equal(terms.bits_per_dim.isnan(), torch.tensor(BAD).isnan())


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_shift_that_diverges_shows_in_a_group_norm(bad, silu, backend):
    nothing, shift = torch.zeros(len(BAD), 4), torch.zeros(len(BAD), 4)
    shift[0, 1] = bad
    given = (image(0, 4), torch.ones(4), torch.zeros(4), 2, 1e-5)
    found = ops.group_norm(*given, scale_shift=(nothing, shift), silu=silu)
    with use_backend("reference"):
        expected = ops.group_norm(*given, scale_shift=(nothing, shift), silu=silu)
    assert torch.equal(*kinds(found, expected))
    assert not found[0, 1].isfinite().any()
