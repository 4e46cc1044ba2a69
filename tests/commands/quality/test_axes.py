"""--sweep is read as said, and its axes are combined to every way of drawing, each once."""

import itertools

import pytest

from ddpm_fast.commands.quality.axes import Combination, expand, parse_axes
from ddpm_fast.errors import InputError
from ddpm_fast.loops.options import SamplingOptions

BASE = Combination(model="m")


def test_values_are_read_and_repeated_ones_are_kept_once():
    axes = parse_axes(["steps=10, 25,ddim50,10", "guidance=1,1.0,2.5", "sampler=ddim,ddpm", "model=a.pt,hf:b/c"])
    assert axes == {
        "model": ["a.pt", "hf:b/c"],
        "sampler": ["ddim", "ddpm"],
        "guidance": [1.0, 2.5],
        "steps": [10, 25, "ddim50"],
    }


def test_every_combination_is_there_once_and_models_vary_slowest():
    axes = parse_axes(["steps=10,20", "model=a,b", "guidance=1,2", "sampler=ddpm,dpmpp_2m"])
    combinations, said = expand(axes, BASE)
    assert not said and len(set(combinations)) == len(combinations) == 16
    found = {(one.model, one.sampler, one.steps, one.guidance) for one in combinations}
    assert found == set(itertools.product("ab", ("ddpm", "dpmpp_2m"), (10, 20), (1.0, 2.0)))
    assert [one.model for one in combinations] == ["a"] * 8 + ["b"] * 8


def test_eta_is_for_ddim_and_the_others_are_drawn_once():
    combinations, said = expand(parse_axes(["eta=0,0.5,1", "sampler=ddpm,ddim"]), BASE)
    assert [(one.sampler, one.eta) for one in combinations] == [
        ("ddpm", None),
        ("ddim", 0.0),
        ("ddim", 0.5),
        ("ddim", 1.0),
    ]
    assert said == ["eta belongs to ddim: ddpm is drawn without it, once"]


def test_what_is_no_axis_is_as_in_the_base():
    (one,), _ = expand(parse_axes(["steps=7"]), Combination("m", "ddim", 50, "quadratic", 0.3, 2.0))
    assert one == Combination("m", "ddim", 7, "quadratic", 0.3, 2.0)


def test_a_combination_sets_the_options_of_sampling():
    base = SamplingOptions(seed=5, batch_size=3, dynamic_threshold=0.9)
    options = Combination("m", "ddim", "ddim5", "even", 0.5, 1.5).options(base)
    assert (options.sampler, options.steps, options.eta, options.guidance) == ("ddim", "ddim5", 0.5, 1.5)
    assert (options.seed, options.batch_size, options.dynamic_threshold) == (5, 3, 0.9)
    assert Combination("m", "ddpm", 5).options(base).guidance is None


def test_it_is_described_by_what_varies():
    one = Combination("m", "ddim", 10, "quadratic", 0.5, 2.0)
    assert one.describe([]) == "ddim 10 quadratic"
    assert one.describe(["eta", "guidance", "model"]) == "ddim 10 quadratic eta 0.5 guidance 2 m"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["steps"], "'steps'; expected an option and its values, such as steps=10,25,50"),
        (["clip=1"], "the options are model, sampler, guidance, spacing, eta, steps"),
        (["steps=1", "steps=2"], "steps is given twice"),
        (["steps=,"], "steps has no values"),
        (["steps=10,0"], "--sweep steps: steps is '0'; expected a number of steps"),
        (["steps=1e3"], "'1e3'; expected a number of steps"),
        (["steps=٣"], "expected a number of steps"),
        (["sampler=euler"], "--sweep sampler: "),
        (["spacing=log"], "spacing 'log' is unknown"),
        (["eta=2"], "eta is 2.0; expected a number from 0"),
        (["guidance=nan"], "guidance is nan; expected a number of at least 0"),
        (["guidance=-1"], "expected a number of at least 0"),
        (["guidance=strong"], "guidance is 'strong'; expected a number"),
    ],
)
def test_what_cannot_be_read_is_refused(texts, message):
    with pytest.raises(InputError) as error:
        parse_axes(texts)
    assert message in str(error.value)
