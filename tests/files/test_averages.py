"""Averages are made of files in a folder: near what is wanted, in a little memory, and of nothing that does not fit."""

from collections import Counter

import pytest
import torch
from support.networks import random_unet

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files import averages, checkpoint
from ddpm_fast.files.averages import Profile, average_path, average_prefix, make, plan, save_average, saved_averages
from ddpm_fast.nn.power_average import gamma_of
from ddpm_fast.schedule import Schedule

BOTH = (0.05, 0.1)
STEPS = 640
NETWORK = random_unet(image_size=4, in_channels=1, model_channels=4, channel_mult=(1,), norm_groups=2)
CONFIG = {"unet": NETWORK.config.to_dict(), "diffusion": GaussianDiffusion(Schedule.cosine(10)).to_dict()}
START = {name: value.double() for name, value in NETWORK.state_dict().items()}


def average(profile):
    """The average of made-up weights, which fall as 1/4 + exp(-3 t), over the first steps of a training: float64."""
    t = torch.arange(1, profile.step + 1, dtype=torch.float64) / STEPS
    edges = torch.linspace(0, 1, profile.step + 1, dtype=torch.float64) ** (gamma_of(profile.width) + 1)
    factor = (edges.diff() * (0.25 + torch.exp(-3 * t))).sum()
    return {name: value * factor for name, value in START.items()}


def run_with(folder, steps=range(20, STEPS + 1, 20), widths=BOTH):
    for step in steps:
        for width in widths:
            save_average(folder, Profile(step, width), average(Profile(step, width)), CONFIG)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_with(tmp_path_factory.mktemp("run"))


def apart(made, profile):
    """The largest difference from the average itself, relative to the largest weight."""
    expected = average(profile)
    largest = max(value.abs().max() for value in expected.values())
    return max((made[name] - value).abs().max() / largest for name, value in expected.items()).item()


@pytest.mark.parametrize(
    ("width", "step", "largest"),
    [(0.05, None, 2**-12), (0.1, 400, 2**-12), (0.075, None, 2**-11), (0.15, 320, 2**-11), (0.03, None, 2**-9)],
)
def test_any_width_at_any_saved_step(run, width, step, largest):
    """Within what fp16 has rounded, of numbers that a small network has some hundred of."""
    (made,) = make(plan(run, [width], step))
    assert made.profile == (step or STEPS, width)
    assert all(value.dtype == torch.float64 for value in made.state.values())
    assert apart(made.state, made.profile) <= largest


def test_several_widths_are_those_one_by_one_and_each_file_is_read_once_for_four(tmp_path, monkeypatch):
    run = run_with(tmp_path, range(40, 321, 40))
    widths = [0.03, 0.04, 0.06, 0.07, 0.12]
    alone = [next(make(plan(run, [width]))) for width in widths]
    read, calls, told = averages.tensorfile.read, [], []
    monkeypatch.setattr(averages.tensorfile, "read", lambda path, *forms: calls.append(path) or read(path, *forms))
    together = list(make(plan(run, widths), lambda *numbers: told.append(numbers)))
    for one, other in zip(alone, together, strict=True):
        assert one.profile == other.profile and one.error == other.error
        assert all(torch.equal(value, other.state[name]) for name, value in one.state.items())
    assert max(Counter(calls).values()) == 2, "once for four widths, and once for the fifth"
    assert told == [(number, len(calls)) for number in range(1, len(calls) + 1)]


def test_one_that_was_saved_is_that_file_alone(run, monkeypatch):
    path = average_path(run, Profile(STEPS, 0.1))
    state, config = checkpoint.read_model(path)
    read, calls = averages.tensorfile.read, []
    monkeypatch.setattr(averages.tensorfile, "read", lambda other, *forms: calls.append(other) or read(other, *forms))
    (made,) = make(plan(run, [0.1]))
    assert calls == [path]
    assert all(torch.equal(value.half(), state[name]) for name, value in made.state.items())
    assert made.config["unet"] == config["unet"]
    assert made.config["average"] == {"width": 0.1, "step": STEPS, "error": made.error}


def test_a_run_that_was_stopped_has_those_of_its_newest_state_too(tmp_path):
    run_with(tmp_path, range(20, 101, 20))
    tensors = {}
    for width in BOTH:
        tensors |= checkpoint.add_prefix(average_prefix(width), average(Profile(110, width)))
    meta = {"step": 110, **CONFIG, "training": {"average_widths": list(BOTH)}}
    checkpoint.save_training(checkpoint.checkpoint_path(tmp_path, 110), tensors, meta)
    (made,) = make(plan(tmp_path, [0.1]))
    assert made.profile == (110, 0.1) and apart(made.state, made.profile) <= 1e-9
    assert made.config["unet"] == CONFIG["unet"] and "average_widths" in made.config["training"]
    assert plan(tmp_path, [0.1], 100).wanted == [(100, 0.1)]


def test_a_step_between_two_that_were_saved_is_rougher(run):
    planned = plan(run, [0.1], 630)
    assert {saved.profile.step for saved in planned.given} >= {620, 640}
    assert planned.sums.errors[0] > 0.02
    (made,) = make(planned)
    assert apart(made.state, made.profile) < 5e-3


def test_files_that_are_no_averages_are_passed_over(tmp_path):
    assert saved_averages(tmp_path) == []
    for name in ("00000000-0.050.safetensors", "00000001-0.999.safetensors", "1-0.050.safetensors", "a.txt"):
        (tmp_path / "averages").mkdir(exist_ok=True)
        (tmp_path / "averages" / name).write_bytes(b"")
    assert saved_averages(tmp_path) == []
    with pytest.raises(InputError, match=r"has no averages to make others of .*--average-widths 0.05,0.1"):
        plan(tmp_path, [0.1])


@pytest.mark.parametrize("step", [0, -1, 641])
def test_a_step_of_which_there_is_nothing(run, step):
    with pytest.raises(InputError, match=f"step is {step}; .* averages of steps 20 to 640"):
        plan(run, [0.1], step)


def other_network(path):
    state = dict(average(Profile(40, 0.05)))
    state["conv_in.weight"] = state["conv_in.weight"][:1]
    save_average(path.parents[1], Profile(40, 0.05), state, CONFIG)


def other_config(path):
    changed = CONFIG | {"diffusion": GaussianDiffusion(Schedule.cosine(20)).to_dict()}
    save_average(path.parents[1], Profile(40, 0.05), average(Profile(40, 0.05)), changed)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read as safetensors.*move it away"),
        (lambda path: path.unlink(), "cannot be read|does not exist"),
        (other_network, r"other weights: conv_in.weight\): move it away"),
        (other_config, r"of another run than the files before it \(diffusion differs\)"),
    ],
    ids=["cut short", "gone meanwhile", "other weights", "other diffusion"],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, spoil, message):
    run_with(tmp_path, (20, 40, 60))
    planned = plan(tmp_path, [0.07])
    path = average_path(tmp_path, Profile(40, 0.05))
    spoil(path)
    with pytest.raises(InputError, match=message) as caught:
        list(make(planned))
    assert str(path) in str(caught.value)
