"""How numbers are stored: every bf16 and fp16 bit pattern is read exactly, and results are rounded to nearest even.

What the numbers are and how they round is written down independently in support/storage.py.
"""

import numpy as np
import pytest
import torch
from support.storage import LOW, SPECIAL, boundaries, exact_values, nearest_even, patterns, same, through


def test_every_pixel_is_divided_exactly(isa):
    pixels = np.arange(256, dtype=np.uint8)
    expected = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    found = through(torch.from_numpy(pixels), torch.float32).numpy()
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("name", LOW)
def test_every_bit_pattern_is_read_exactly(name, isa):
    same(through(patterns(name), torch.float32), exact_values(name))


@pytest.mark.parametrize("name", LOW)
def test_every_bit_pattern_comes_back(name, isa):
    same(through(patterns(name), LOW[name]), exact_values(name))


@pytest.mark.parametrize("name", LOW)
def test_results_are_rounded_to_nearest_even(name, isa):
    any_bits = np.random.default_rng(0).integers(0, 2**32, 2**19, dtype=np.uint32).view(np.float32)
    for x in (boundaries(name), SPECIAL, any_bits):
        same(through(torch.from_numpy(x), LOW[name]), nearest_even(x, name))


@pytest.mark.parametrize("name", LOW)
def test_the_oracle_rounds_as_torch_does(name):
    x = np.concatenate([boundaries(name), SPECIAL])
    same(torch.from_numpy(x).to(LOW[name]), nearest_even(x, name))
