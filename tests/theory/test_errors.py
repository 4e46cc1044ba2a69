"""What counts as an integer and as a number, wherever one is given."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError, check_integer, check_number


@pytest.mark.parametrize("value", [7, np.int8(7), np.uint64(7), np.array(7), torch.tensor(7)])
def test_integers_of_every_kind_become_an_int(value):
    number = check_integer("n", value, 0, 7)
    assert type(number) is int
    assert number == 7


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        torch.tensor(True),
        7.0,
        np.float32(7),
        "7",
        None,
        [7],
        np.array([1, 7]),
        Fraction(7),
        torch.tensor(7.5),
    ],
)
def test_what_is_no_integer_is_refused_by_name_and_type(value):
    with pytest.raises(InputError, match=rf"n is .*a {type(value).__name__}; expected an integer in 0\.\.9"):
        check_integer("n", value, 0, 9)
    with pytest.raises(InputError, match="a Tensor"):
        check_integer("n", torch.tensor(7.5), 0, 9)


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (-1, 0, None, "n is -1; expected an integer of at least 0"),
        (np.int64(10), 0, 9, r"n is 10; expected an integer in 0\.\.9"),
        (2**70, -(2**63), 2**64 - 1, r"expected an integer in -2\^63\.\.2\^64-1"),
        (-1, 0, 2**56, r"expected an integer in 0\.\.2\^56"),
    ],
)
def test_a_number_outside_the_range_is_refused_with_the_range(value, low, high, said):
    with pytest.raises(InputError, match=said):
        check_integer("n", value, low, high)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_real_numbers_of_every_kind_become_a_float(value):
    number = check_number("eta", value, lambda v: 0 <= v <= 1, "0 to 1")
    assert type(number) is float
    assert number == 0.5
    assert check_number("eta", np.int32(1), lambda v: 0 <= v <= 1, "0 to 1") == 1.0


@pytest.mark.parametrize("value", [True, "0.5", None, 1.5, float("nan"), 1j, 10**400, torch.tensor([0.5, 0.5])])
def test_what_is_no_number_or_out_of_range_is_refused(value):
    with pytest.raises(InputError, match=r"eta is .*; expected 0 to 1"):
        check_number("eta", value, lambda v: 0 <= v <= 1, "0 to 1")
