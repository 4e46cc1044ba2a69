"""The power-function averages of a training: they change nothing else, are saved as models, and stay as begun."""

import pytest
import torch
from support import two_ranks

import ddpm_fast as df
from ddpm_fast.files import checkpoint
from ddpm_fast.files.averages import average_prefix, saved_averages

WIDTHS = (0.05, 0.1)


def states(folder):
    return checkpoint.read_training(checkpoint.latest_checkpoint(folder))[0]


def test_they_change_no_bit_of_what_is_trained(tmp_path):
    for widths in ((), WIDTHS):
        two_ranks.trainer(average_widths=widths).train(4, tmp_path / str(len(widths)))
    plain, kept = states(tmp_path / "0"), states(tmp_path / "2")
    averages = {name for name in kept if name.startswith("average.")}
    assert len(averages) == 2 * len([name for name in plain if name.startswith("ema.")])
    assert kept.keys() - averages == plain.keys()
    assert all(torch.equal(value, kept[name]) for name, value in plain.items())
    assert not (tmp_path / "0" / "averages").exists()


def test_they_are_the_sums_of_the_weights_of_all_steps(tmp_path):
    """In float64; each is saved as a model, in fp16, which rounds by half a unit of 11 bits."""
    subject, history = two_ranks.trainer(average_widths=WIDTHS), []
    for _ in range(6):
        subject.train_step()
        history.append(subject.model.state_dict()["conv_in.weight"].double().clone())
    subject.save(tmp_path)
    subject.save_averages(tmp_path)
    for saved in saved_averages(tmp_path):
        gamma = df.nn.power_average.gamma_of(saved.profile.width)
        shares = (torch.arange(7, dtype=torch.float64) / 6).pow(gamma + 1).diff()
        expected = (shares.view(-1, 1, 1, 1, 1) * torch.stack(history)).sum(0)
        state = checkpoint.take_prefix(average_prefix(saved.profile.width), states(tmp_path))
        torch.testing.assert_close(state["conv_in.weight"].double(), expected, rtol=1e-6, atol=1e-7)
        loaded = df.load_model(saved.path)
        torch.testing.assert_close(loaded.model.conv_in.weight.double(), expected, rtol=2**-11, atol=2**-25)
        assert loaded.config["average"] == {"width": saved.profile.width, "step": 6}
    assert [saved.profile for saved in saved_averages(tmp_path)] == [(6, 0.05), (6, 0.1)]


def test_a_run_keeps_the_widths_that_it_began_with(tmp_path):
    straight = two_ranks.trainer(average_widths=WIDTHS)
    straight.train(3, tmp_path, average_every=1)
    assert {saved.profile.step for saved in saved_averages(tmp_path)} == {1, 2, 3}
    path = checkpoint.latest_checkpoint(tmp_path)
    straight.train(5)
    for widths in ((), (0.2,)):
        other = two_ranks.trainer(average_widths=widths)
        other.load(path)
        assert other.config.average_widths == WIDTHS
        other.train(5)
        for width, average in straight.averages.items():
            for name, value in average.state_dict().items():
                assert torch.equal(value, other.averages[width].state_dict()[name]), (widths, width, name)


def test_a_run_that_had_none_gets_none(tmp_path):
    two_ranks.trainer().train(1, tmp_path)
    other = two_ranks.trainer(average_widths=WIDTHS)
    other.load(checkpoint.latest_checkpoint(tmp_path))
    assert other.averages == {} and other.config.average_widths == ()


def test_what_was_saved_after_the_state_that_a_run_goes_on_from_is_removed(tmp_path):
    subject = two_ranks.trainer(average_widths=WIDTHS)
    subject.train(2, tmp_path, average_every=1)
    path = checkpoint.latest_checkpoint(tmp_path)
    subject.train_step()
    subject.save_averages(tmp_path)
    other = two_ranks.trainer(average_widths=WIDTHS)
    with pytest.raises(df.InputError, match="has step-00000002"):
        other.train(1, tmp_path)
    other.load(path)
    other.train(2, tmp_path)
    assert {saved.profile.step for saved in saved_averages(tmp_path)} == {1, 2}
    path.unlink()
    with pytest.raises(df.InputError, match="averages of another run"):
        two_ranks.trainer().train(1, tmp_path)
    assert len(saved_averages(tmp_path)) == 4


def test_a_run_that_begins_with_a_model_averages_from_its_weights(tmp_path):
    two_ranks.trainer().train(2, tmp_path)
    subject = two_ranks.trainer(average_widths=WIDTHS)
    subject.start_from(df.load_model(tmp_path))
    for average in subject.averages.values():
        assert torch.equal(average.state_dict()["conv_in.weight"], subject.model.conv_in.weight)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((0.05, 0.05), "expected different numbers"),
        ((0.0515,), "at most three decimals"),
        ((0.3,), r"average_widths\[0\] is 0.3; expected a width from 0.001 to 0.288"),
        (0.05, "expected a tuple of widths"),
    ],
)
def test_bad_widths(widths, message):
    with pytest.raises(df.InputError, match=message):
        df.TrainConfig(average_widths=widths)


@pytest.mark.parametrize("widths", [0.05, [0.05, 0.05], ["0.05"], [0.7]])
def test_a_state_with_other_widths_than_a_training_has_is_refused(tmp_path, widths):
    two_ranks.trainer(average_widths=WIDTHS).train(1, tmp_path)
    path = checkpoint.latest_checkpoint(tmp_path)
    tensors, meta = checkpoint.read_training(path)
    meta["training"]["average_widths"] = widths
    checkpoint.save_training(path, tensors, meta)
    with pytest.raises(df.InputError, match="training in its meta is not what a training writes"):
        two_ranks.trainer().load(path)
