"""The CPU's kernels give a sample the same bits for any number of threads, in any batch and in both memory formats."""

import contextlib

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import use_backend
from ddpm_fast.schedule import Schedule

N = 10


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def norm(n, layout):
    """Results of each sample, and then those that are sums over the batch."""
    x, rows = randn(N, 64, 28, 28, seed=1), [randn(N, 64, seed=seed) for seed in (2, 3, 4)]
    leaves = [x[:n].contiguous(memory_format=layout), *(row[:n].clone() for row in rows)]
    leaves += [randn(64, seed=5), randn(64, seed=6)]
    x, scale, shift, added, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    y = ops.group_norm(x, weight, bias, 8, 1e-5, scale_shift=(scale, shift), added=added, silu=True)
    *of_samples, by_weight, by_bias = torch.autograd.grad(y.square().sum(), (x, scale, shift, added, weight, bias))
    return [y.detach(), *of_samples], [by_weight, by_bias]


def convolution(n, layout):
    weight, bias = randn(48, 64, 3, 3, seed=7).requires_grad_(), randn(48, seed=9).requires_grad_()
    of_samples, of_weights = [], []
    for size in ((28, 28), (8, 8), (5, 13)):
        x = randn(N, 64, *size, seed=8)[:n].contiguous(memory_format=layout).requires_grad_()
        y = ops.convolve(x, weight, bias)
        by_x, *by_weights = torch.autograd.grad(y.square().sum(), (x, weight, bias))
        of_samples += [y.detach(), by_x]
        of_weights += by_weights
    return of_samples, of_weights


def losses(n, layout, channels=5):
    """With three channels, colour, the kernels shuffle whole registers; 783 pixels leave a part of one."""
    images = (randn(N, c, 27, 29, seed=c)[:n] for c in (channels, 2 * channels))
    x0, output = (image.contiguous(memory_format=layout) for image in images)
    key, t = NoiseKey.of(3, n), torch.arange(N)[:n]
    learned = GaussianDiffusion(Schedule.cosine(N), variance="learned_range", loss="hybrid")
    fixed = GaussianDiffusion(Schedule.cosine(N))
    found = []
    for diffusion, out in ((learned, output), (fixed, output[:, :channels])):
        out = out.clone().contiguous(memory_format=layout).requires_grad_()
        loss, terms = diffusion.training_losses(out, x0, t, key), diffusion.vlb_terms(out, x0, t, key)
        gradients = [torch.autograd.grad(v.sum(), out)[0] for v in (loss, terms.bits_per_dim)]
        found += [loss.detach(), terms.bits_per_dim.detach(), terms.mse_x0, *gradients]
    return found, []


def losses_of_colour(n, layout):
    return losses(n, layout, channels=3)


@pytest.mark.filterwarnings("ignore:the images x0 range")
@pytest.mark.parametrize("run", [norm, convolution, losses, losses_of_colour])
def test_the_same_bits(run):
    with use_backend("cpu"):
        with threads(1):
            expected, expected_sums = run(N, torch.channels_last)
        for count, n, layout in (
            (2, N, torch.channels_last),
            (3, N, torch.contiguous_format),
            (1, 1, torch.channels_last),
            (2, 7, torch.contiguous_format),
        ):
            with threads(count):
                found, sums = run(n, layout)
            for actual, wanted in zip(found, expected, strict=True):
                assert torch.equal(actual, wanted[:n])
            if n == N:
                assert all(map(torch.equal, sums, expected_sums))
