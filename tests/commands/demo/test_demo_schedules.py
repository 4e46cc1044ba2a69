"""The tab of the schedules shows the formulas' values, and refuses what is no schedule."""

import numpy as np
import pytest
import torch

from ddpm_fast.commands.demo.limits import MOST_TIMESTEPS
from ddpm_fast.commands.demo.schedules import chosen, describe, log_snr, noised, timestep
from ddpm_fast.errors import InputError


def cosine_alpha_bar(T):
    """Nichol and Dhariwal 2021, eq. 17, with betas of at most 0.999."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


def test_the_logarithm_of_the_signal_to_noise_ratio_is_that_of_alpha_bar():
    (cosine,) = chosen(["cosine"], 50, False)
    alpha_bar = cosine_alpha_bar(50)
    assert np.allclose(log_snr(cosine), np.log10(alpha_bar / (1 - alpha_bar)), atol=1e-9)


def test_where_no_signal_is_left_nothing_is_drawn():
    (cosine,) = chosen(["cosine"], 50, True)
    assert np.isnan(log_snr(cosine)[-1]) and np.isfinite(log_snr(cosine)[:-1]).all()


def test_a_noised_picture_has_the_shares_of_signal_and_noise_that_the_schedule_says():
    schedules = chosen(["linear", "cosine"], 100, False)
    white, black = (torch.full((3, 64, 64), value, dtype=torch.uint8) for value in (255, 0))
    for t in (0, 30, 99):
        light, dark = noised(schedules, white, t).double(), noised(schedules, black, t).double()
        for i, schedule in enumerate(schedules):
            alpha_bar = schedule.alphas_cumprod[t].item()
            # x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, with the same eps and x_0 = 1 and -1
            assert torch.allclose((light - dark)[i] / 2, torch.tensor(alpha_bar**0.5).double(), atol=1e-6)
            assert ((light + dark)[i] / 2).std().item() == pytest.approx((1 - alpha_bar) ** 0.5, rel=0.03)


def test_another_seed_is_other_noise():
    (linear,) = chosen(["linear"], 100, False)
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    assert not torch.equal(noised([linear], image, 50, 0), noised([linear], image, 50, 1))


def test_the_share_leads_from_the_first_timestep_to_the_last():
    assert [timestep(share, 101) for share in (0, 50, 100)] == [0, 50, 100]


def test_the_line_says_alpha_bar_at_t():
    schedules = chosen(["cosine"], 50, False)
    assert describe(schedules, 25) == f"t = 25 of 0 to 49. alpha-bar: cosine {cosine_alpha_bar(50)[25]:.4g}"


@pytest.mark.parametrize("names", [[], None, "cosine", ["quadratic"], [None], [["cosine"]]])
def test_what_is_no_schedule_is_refused(names):
    with pytest.raises(InputError, match="at least one of the schedules"):
        chosen(names, 100, False)


@pytest.mark.parametrize("T", [0, 9, MOST_TIMESTEPS + 1, 10**12, "x", None, 10.5])
def test_a_length_out_of_range_is_refused_before_it_is_made(T):
    with pytest.raises(InputError, match="T is"):
        chosen(["linear"], T, False)


@pytest.mark.parametrize("share", [-1, 101, None, "50"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InputError, match="t is"):
        timestep(share, 100)
