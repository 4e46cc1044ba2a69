"""DDPMFastScheduler as diffusers expects of a scheduler: configs in and out, folders, timesteps, what step returns.

These are the common checks of diffusers' own tests of schedulers, written anew, and what this one refuses.
"""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_fast.errors import InputError
from ddpm_fast.formats.diffusers_scheduler import DDPMFastScheduler

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # numpy 2 on their tensors
]
SAMPLERS = ("ddpm", "ddim", "dpmpp_1", "dpmpp_2m", "dpmpp_2m_sde")
X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def ready(sampler="ddpm", steps=10, **options):
    scheduler = DDPMFastScheduler(sampler=sampler, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def two_steps(scheduler):
    """The state after two steps of noise of a fixed seed."""
    x, generator = X, torch.Generator().manual_seed(3)
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(0.1 * x, t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize(
    ("peer", "sampler"),
    [
        (DDPMScheduler(), "ddpm"),
        (DDIMScheduler(), "ddim"),
        (DPMSolverMultistepScheduler(), "dpmpp_2m"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "dpmpp_2m_sde"),
        (DPMSolverMultistepScheduler(solver_order=1), "dpmpp_1"),
        (DDIMScheduler.from_config(DDPMScheduler(variance_type="fixed_large").config), "ddim"),
        (DDPMScheduler.from_config({"_class_name": "DDIMScheduler", "beta_end": 0.03}), "ddpm"),
        (DDPMFastScheduler(sampler="dpmpp_2m"), "dpmpp_2m"),
    ],
)
def test_the_config_says_the_sampler(peer, sampler, tmp_path):
    assert DDPMFastScheduler.from_config(peer.config).config.sampler == sampler
    peer.save_pretrained(tmp_path)
    assert DDPMFastScheduler.from_pretrained(tmp_path).config.sampler == sampler


def test_defaults_are_those_of_the_samplers_class():
    config = DDIMScheduler().config
    assert DDPMFastScheduler.from_config(config).config.timestep_spacing == "leading"
    assert DDPMFastScheduler.from_config(config, sampler="dpmpp_2m").config.timestep_spacing == "linspace"
    given = DDIMScheduler(timestep_spacing="trailing").config
    assert DDPMFastScheduler.from_config(given, sampler="dpmpp_2m").config.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    "options", [{}, {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}], ids=str
)
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_the_way_to_ours_and_back_changes_no_option(kind, options, tmp_path):
    peer = kind(steps_offset=1, rescale_betas_zero_snr=True, **options)
    ours = DDPMFastScheduler.from_config(peer.config)
    back = kind.from_config(ours.config)
    names = [name for name in peer.config if not name.startswith("_")]
    assert [back.config[name] for name in names] == [peer.config[name] for name in names]
    ours.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    loaded.set_timesteps(7)
    ours.set_timesteps(7)
    assert loaded.timesteps.tolist() == ours.timesteps.tolist() and torch.equal(loaded.betas, ours.betas)


@pytest.mark.parametrize("peer", [PNDMScheduler(), EulerDiscreteScheduler(), UniPCMultistepScheduler()])
def test_other_schedulers_give_their_betas_and_are_asked_for_a_sampler(peer, tmp_path):
    with pytest.raises(InputError, match="no sampler of a class that is not named"):
        DDPMFastScheduler.from_config(peer.config)
    peer.save_pretrained(tmp_path)
    name = type(peer).__name__
    with pytest.raises(InputError, match=f"no sampler of {name}.*sampler='ddim'"):
        DDPMFastScheduler.from_pretrained(tmp_path)
    made = DDPMFastScheduler.from_pretrained(tmp_path, sampler="dpmpp_2m")
    assert torch.equal(made.betas, peer.betas)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order=3"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "flow_prediction"),
        ("DPMSolverMultistepScheduler", {"solver_type": "rk4"}, "rk4"),
        ("EDMEulerScheduler", {"sampler": "ddim"}, "no betas"),
        ("FlowMatchEulerDiscreteScheduler", {"sampler": "ddpm"}, "no betas"),
        ("DDIMScheduler", {"sampler": "euler"}, "sampler is 'euler'"),
        ("DDIMScheduler", {"sampler": ["ddim"]}, r"sampler is \['ddim'\]"),
        ("DDPMScheduler", {"variance_type": "none"}, "variance_type is 'none'"),
        ("DDPMScheduler", {"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
        ("DDPMScheduler", {"beta_schedule": "cubic"}, "cubic"),
        ("DDPMScheduler", {"beta_end": 2.0}, r"\(0, 1\]"),
        ("DDPMScheduler", {"beta_end": float("nan")}, r"\(0, 1\]"),
        ("DDPMScheduler", {"beta_end": "much"}, "betas cannot be made"),
        ("DDPMScheduler", {"trained_betas": [[0.1]]}, r"\(0, 1\]"),
        ("DDPMScheduler", {"trained_betas": []}, r"\(0, 1\]"),
        ("DDPMScheduler", {"trained_betas": 0.1}, "betas cannot be made"),
        ("DDPMScheduler", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("DDPMScheduler", {"num_train_timesteps": 2.5}, "num_train_timesteps"),
        ("DDPMScheduler", {"steps_offset": -1}, "steps_offset"),
        ("DDPMScheduler", {"clip_sample_range": 0}, "clip_sample_range"),
        ("DDPMScheduler", {"dynamic_thresholding_ratio": 2}, "dynamic_thresholding_ratio"),
        ("DDPMScheduler", {"sample_max_value": 0.5}, "sample_max_value"),
        ("DDIMScheduler", {"eta": 1.5}, "eta"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(name, changes, message):
    betas = {} if "Euler" in name else {"beta_schedule": "linear"}
    with pytest.raises(InputError, match=message):
        DDPMFastScheduler.from_config({"_class_name": name, **betas, **changes})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_saved_scheduler_takes_the_same_steps(sampler, tmp_path):
    made = DDPMFastScheduler(sampler=sampler, eta=0.5, prediction_type="v_prediction", thresholding=True)
    made.save_pretrained(tmp_path)
    loaded = DDPMFastScheduler.from_pretrained(tmp_path)
    assert {**loaded.config, "_use_default_values": 0} == {**made.config, "_use_default_values": 0}
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "DDPMFastScheduler"
    for scheduler in (made, loaded):
        scheduler.set_timesteps(10)
    assert torch.equal(two_steps(made), two_steps(loaded))


def test_trained_betas_are_saved(tmp_path):
    made = DDPMFastScheduler(trained_betas=np.array([0.1, 0.3]))
    made.save_pretrained(tmp_path)
    assert DDPMFastScheduler.from_pretrained(tmp_path).betas.tolist() == made.betas.tolist()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_gives_tensors_like_the_sample_as_an_object_or_a_tuple(sampler):
    scheduler = ready(sampler)
    first, second = scheduler.timesteps[:2]
    made = scheduler.step(0.1 * X, first, X, generator=torch.Generator().manual_seed(0))
    assert made.prev_sample.shape == made.pred_original_sample.shape == X.shape
    assert scheduler.step(0.1 * X, second, X).prev_sample.shape == X.shape
    scheduler.set_timesteps(10)
    given = scheduler.step(0.1 * X, first, X, generator=torch.Generator().manual_seed(0), return_dict=False)
    assert len(given) == 2 and torch.equal(given[0], made.prev_sample) and torch.equal(given[1], made[1])


def test_it_has_what_pipelines_ask_for():
    scheduler = ready("ddim")
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1 and len(scheduler) == 1000
    assert torch.equal(scheduler.scale_model_input(X, 3), X)
    assert scheduler.num_inference_steps == 10 and scheduler.begin_index is None and scheduler.step_index is None
    assert DDPMScheduler in scheduler.compatibles and scheduler.final_alpha_cumprod == 1.0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_timesteps_may_be_given(sampler):
    scheduler = DDPMFastScheduler(sampler=sampler)
    scheduler.set_timesteps(timesteps=[900, 500, 30, 0])
    assert scheduler.timesteps.tolist() == [900, 500, 30, 0] and scheduler.num_inference_steps == 4
    assert [scheduler.previous_timestep(t) for t in scheduler.timesteps] == [500, 30, 0, -1]
    assert two_steps(scheduler).isfinite().all()


def test_given_timesteps_are_walked_as_ddpm_walks_them():
    ours, peer = DDPMFastScheduler(), DDPMScheduler()
    for scheduler in (ours, peer):
        scheduler.set_timesteps(timesteps=[900, 500, 30, 0])
    theirs = peer.step(0.1 * X, 0, X).prev_sample
    torch.testing.assert_close(ours.step(0.1 * X, 0, X).prev_sample, theirs, rtol=1e-4, atol=1e-4)
    z = torch.zeros_like(X)
    before = ours.step(0.1 * X, 500, X, variance_noise=z).prev_sample
    found = [peer.step(0.1 * X, 500, X, generator=torch.Generator().manual_seed(i)).prev_sample for i in range(400)]
    assert (torch.stack(found).mean(0) - before).abs().max() < 6 * torch.stack(found).std(0).max() / 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.set_timesteps(), "either"),
        (lambda s: s.set_timesteps(5, timesteps=[1]), "either"),
        (lambda s: s.set_timesteps(1001), "num_inference_steps is 1001"),
        (lambda s: s.set_timesteps(0), "num_inference_steps is 0"),
        (lambda s: s.set_timesteps(timesteps=[]), "one or more"),
        (lambda s: s.set_timesteps(timesteps=[3, 3]), "descending"),
        (lambda s: s.set_timesteps(timesteps=[3, 7]), "descending"),
        (lambda s: s.set_timesteps(timesteps=[1000]), "a timestep is 1000"),
        (lambda s: s.set_timesteps(timesteps=[1.5]), "a timestep is 1.5"),
        (lambda s: s.step(X, 7, X), "timestep 7 is none of the 10"),
        (lambda s: s.step(X, 900, X, eta=2.0), "eta is 2.0"),
        (lambda s: s.step(X, 900, X, eta=1.0, generator=3), "generator is a int"),
        (lambda s: s.step(X, 900, X, eta=1.0, generator=[torch.Generator()] * 3), "3 generators for a batch of 4"),
        (lambda s: s.step(X, 900, X, generator=torch.Generator(), variance_noise=X), "not both"),
        (lambda s: s.step(X[:2], 900, X), "output has shape"),
        (lambda s: DDPMFastScheduler(sampler="ddim").step(X, 900, X), "set_timesteps"),
        (lambda s: ready(variance_type="learned_range").step(X, 900, X), "needs an output of 6 channels"),
        (lambda s: ready(num_train_timesteps=10, steps_offset=1), "timestep 10 is outside.*steps_offset"),
        (lambda s: ready(trained_betas=[0.1, 0.2]), "outside the chain of 2 betas"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(ready("ddim"))


def test_ddpm_steps_over_all_timesteps_before_set_timesteps():
    ours, peer = DDPMFastScheduler(), DDPMScheduler()
    torch.testing.assert_close(
        ours.step(0.1 * X, 0, X).prev_sample, peer.step(0.1 * X, 0, X).prev_sample, rtol=1e-4, atol=1e-4
    )
    assert ours.previous_timestep(500) == 499


def test_a_change_of_the_config_counts_from_set_timesteps_on():
    """Stable Diffusion's pipelines replace the options of an old config."""
    scheduler, steps = DDPMFastScheduler(sampler="ddim"), []
    for limit in (True, False):
        scheduler.register_to_config(clip_sample=limit)
        scheduler.set_timesteps(10)
        steps.append(scheduler.step(9 * X, 900, X).pred_original_sample.abs().max())
    assert steps[0] == 1 < steps[1]


def test_copies_go_their_own_way():
    scheduler = ready("dpmpp_2m_sde")
    first = two_steps(scheduler)
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        other.set_timesteps(10)
        assert torch.equal(two_steps(other), first)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_reads_a_tensor_back(sampler):
    """On fake tensors, whatever would wait for a number of the device raises."""
    scheduler = ready(sampler, steps=4, eta=0.5)
    timesteps = scheduler.timesteps.tolist()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 8, 8)
        for t in timesteps:
            x = scheduler.step(x, t, x, generator=torch.Generator()).prev_sample
    assert x.shape == (2, 3, 8, 8) and scheduler.step_index == 4


class Unreadable(torch.Tensor):
    """A tensor whose numbers must not be read back."""

    def __int__(self):
        raise AssertionError("a timestep was read back")


def test_a_timestep_is_found_by_its_place_in_memory():
    scheduler = ready("ddim", steps=4)
    scheduler.timesteps = scheduler.timesteps.as_subclass(Unreadable)
    for i, t in enumerate(scheduler.timesteps[1:]):
        scheduler.step(X, t, X)
        assert isinstance(t, Unreadable) and scheduler.step_index == i + 2
    with pytest.raises(AssertionError, match="read back"):
        scheduler.step(X, scheduler.timesteps[1].clone(), X)
