"""How a training may be configured, and its learning rates beside torch's own schedulers."""

import math

import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.loops.train_config import TrainConfig

LR = 3e-4


def theirs(make, steps):
    """The learning rates of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_constant_rate_rises_linearly_at_first():
    config = TrainConfig(lr=LR, warmup=4)
    assert [config.lr_at(step) for step in range(6)] == [LR * share for share in (0.25, 0.5, 0.75, 1, 1, 1)]
    assert TrainConfig(lr=LR, warmup=0).lr_at(0) == LR


@pytest.mark.parametrize("least", [0.0, 0.1])
def test_a_cosine_is_torchs_and_stays_at_its_end(least):
    config = TrainConfig(lr=LR, warmup=5, lr_schedule="cosine", lr_steps=45, lr_least=least)
    cosine = theirs(lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 40, eta_min=least * LR), 41)
    # Step number 4, counted from 0, is the warm-up's last and has lr; theirs begins with lr.
    assert [config.lr_at(4 + i) for i in range(41)] == pytest.approx(cosine, rel=1e-9, abs=1e-12)
    assert [config.lr_at(i) for i in range(4)] == pytest.approx([LR * (i + 1) / 5 for i in range(4)])
    assert config.lr_at(1000) == pytest.approx(least * LR, abs=1e-12)


def test_an_inverse_square_root_is_that_of_vaswani():
    config = TrainConfig(lr=LR, warmup=10, lr_schedule="inverse_sqrt")
    width = 1 / (LR**2 * 10)  # d_model^-0.5 min(step^-0.5, step warmup^-1.5) with the peak LR at the end of the warm-up
    for step in (1, 5, 10, 11, 40, 1000):
        assert config.lr_at(step - 1) == pytest.approx(width**-0.5 * min(step**-0.5, step * 10**-1.5))
    assert TrainConfig(lr=LR, warmup=0, lr_schedule="inverse_sqrt").lr_at(3) == pytest.approx(LR / 2)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"warmup": "abc"}, "warmup is 'abc'"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"lr": "abc"}, "lr is 'abc'; expected a positive number"),
        ({"lr": math.inf}, "lr is inf"),
        ({"weight_decay": math.nan}, "weight_decay is nan; expected a number of at least 0"),
        ({"label_drop": None}, "label_drop is None; expected a share"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"micro_batch": 1.5}, "micro_batch is 1.5"),
        ({"lr_schedule": "step"}, "lr_schedule is 'step'; expected one of constant, cosine, inverse_sqrt"),
        ({"lr_schedule": "cosine"}, "lr_steps is not given"),
        ({"lr_schedule": "cosine", "lr_steps": 100}, "lr_steps is 100; expected more than the 100"),
        ({"lr_least": 2}, "lr_least is 2; expected a share"),
        ({"lr_least": math.nan}, "lr_least is nan"),
        ({"betas": (0.9,)}, "betas is"),
        ({"betas": "ab"}, "betas is 'ab'"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0; expected a number in \[0, 1\)"),
        ({"order": 3}, "order is 3; expected one of 1, 2"),
        ({"dropout_version": 0}, "dropout_version is 0"),
    ],
)
def test_what_makes_no_training_is_refused(options, problem):
    with pytest.raises(InputError, match=problem):
        TrainConfig(**options)


def test_betas_may_be_a_list_as_a_state_has_them():
    assert TrainConfig(betas=[0.8, 0.95]).betas == (0.8, 0.95)
