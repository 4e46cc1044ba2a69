"""Files of lucidrains' denoising-diffusion-pytorch: its own Unet runs, and its diffusion is ours.

The tests of the marker `peers` compare with the package itself, which CI installs in a folder of its own.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.made_weights import made_input, made_state
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.errors import InputError
from ddpm_fast.formats import lucidrains
from ddpm_fast.formats.imported import Wrapped
from ddpm_fast.schedule import Schedule

PATH = Path("model-3.pt")
needs_package = pytest.mark.skipif(find_spec("denoising_diffusion_pytorch") is None, reason="the package is missing")


def peer(test):
    return pytest.mark.peers(needs_package(test))


def network(**arguments):
    """Their Unet with weights that are made up."""
    from denoising_diffusion_pytorch import Unet

    unet = Unet(**{"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 4, "attn_heads": 2, **arguments}).eval()
    unet.load_state_dict(made_state({name: tensor.shape for name, tensor in unet.state_dict().items()}))
    return unet


def diffusion(unet, **arguments):
    from denoising_diffusion_pytorch import GaussianDiffusion

    return GaussianDiffusion(unet, **{"image_size": 8, "timesteps": 100, **arguments})


class Answers(torch.nn.Module):
    """A network that answers the same to all."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.output.clone()


def written(theirs, path: Path) -> df.LoadedModel:
    """What their Trainer writes of a diffusion, loaded."""
    from ema_pytorch import EMA

    opt = torch.optim.Adam(theirs.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(theirs, beta=0.995, update_every=10)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(1)  # the average differs from what was trained last
    data = {"step": 3, "model": theirs.state_dict(), "opt": opt.state_dict(), "ema": ema.state_dict()}
    torch.save({**data, "scaler": None, "version": "2.3.4"}, path)
    return df.load_model(path, flags="--image_size 8x16")


def read(content: object, flags: str | None = "--image_size 8") -> Wrapped:
    assert lucidrains.claims(content)
    return lucidrains.read(content, PATH, flags)


@peer
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dim_mults": (1, 2, 4), "init_dim": 12, "channels": 1},
        {"full_attn": (True, False, True), "dim_mults": (1, 1, 2), "attn_heads": (1, 2, 4), "attn_dim_head": (8, 4, 2)},
        {"dim_mults": (2,), "channels": 2},
    ],
)
def test_the_network_answers_as_in_its_package(tmp_path, arguments):
    unet = network(**arguments)
    channels = arguments.get("channels", 3)
    x, t = made_input("x", (2, channels, 8, 16)), torch.tensor([3, 70])
    with torch.no_grad():
        expected = unet(x, t)
        loaded = written(diffusion(unet), tmp_path / "model.pt")
        assert torch.equal(loaded.model(x, t), expected)
    assert loaded.model.shape == (channels, 8, 16)
    images = df.sample(loaded.model, loaded.diffusion, 2, sampler="ddim", steps=3)
    assert images.shape == (2, channels, 8, 16)


@peer
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_v", "pred_x0"])
@pytest.mark.parametrize("min_snr", [False, True])
def test_the_chain_and_the_loss_are_those_of_its_package(schedule, objective, min_snr):
    output, noise = (made_input(name, (4, 3, 8, 8)) for name in ("output", "noise"))
    x0 = made_input("x0", (4, 3, 8, 8)).clamp(-1, 1)
    t = torch.tensor([0, 1, 700, 999])
    theirs = diffusion(
        network(), timesteps=1000, beta_schedule=schedule, objective=objective, min_snr_loss_weight=min_snr
    )
    ours = read(theirs.state_dict()).diffusion
    x_t = theirs.q_sample(x0, t, noise)
    torch.testing.assert_close(ours.q_sample(x0, t, noise), x_t, rtol=1e-5, atol=1e-5)
    theirs.model = Answers(output)
    mean, _, log_variance, x_start = theirs.p_mean_variance(x_t, t)
    losses = theirs.p_losses(x0, t, noise.clone(), loss_reduction="none")
    found = ours.p_mean_variance(output, x_t, t)
    torch.testing.assert_close(found.mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pred_x0, x_start, rtol=1e-5, atol=1e-5)
    # At t = 0 no noise is added. Their log variance is a float32.
    torch.testing.assert_close(found.log_variance[1:, :1, :1, :1], log_variance[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.training_losses(output, x0, t, noise), losses, rtol=1e-4, atol=1e-5)


@peer
def test_a_learned_variance_is_that_of_its_package():
    from denoising_diffusion_pytorch import LearnedGaussianDiffusion

    output, x_t = made_input("output", (4, 6, 8, 8)), made_input("x_t", (4, 3, 8, 8))
    t = torch.tensor([1, 2, 50, 99])
    unet = network(learned_variance=True)
    theirs = LearnedGaussianDiffusion(unet, image_size=8, timesteps=100, objective="pred_noise")
    wrapped = read(theirs.state_dict())
    assert wrapped.model.out_channels == 6
    mean, variance, log_variance, _ = theirs.p_mean_variance(x=x_t, t=t, clip_denoised=True, model_output=output)
    found = wrapped.diffusion.p_mean_variance(output, x_t, t)
    torch.testing.assert_close(found.mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_variance, log_variance, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.variance, variance, rtol=1e-4, atol=0)


@peer
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"self_condition": True}, "self_condition = True is not supported"),
        ({"learned_sinusoidal_cond": True}, "learned_sinusoidal_cond"),
        ({"random_fourier_features": True}, "random_fourier_features"),
    ],
)
def test_networks_that_the_sampler_cannot_call_are_refused_by_name(arguments, reason):
    state = {**chain(), **{f"model.{name}": tensor for name, tensor in network(**arguments).state_dict().items()}}
    with pytest.raises(InputError, match=reason):
        read(state)


@peer
def test_weights_that_do_not_fit_are_refused_by_name():
    state = diffusion(network()).state_dict()
    for name in [name for name in state if name.startswith("model.")][::9]:
        changes = [{name: torch.ones(3, 1, 4, 1, 5)}, {name: state[name] * torch.nan}, {name: state[name].int()}]
        for changed in changes if name in lucidrains._CLAIMED else [*changes, {}]:
            with pytest.raises(InputError, match=r"^model-3\.pt: "):
                read({**{n: t for n, t in state.items() if n != name}, **changed})
    with pytest.raises(InputError, match="unexpected"):
        read({**state, "model.downs.0.2.fn.fn.to_qkv.weight": torch.ones(2)})


def chain(objective: str = "v", schedule: Schedule | None = None) -> dict[str, Tensor]:
    """The tables of a file, in float32."""
    schedule = Schedule.cosine(100) if schedule is None else schedule
    snr = schedule.snr
    weight = {"eps": torch.ones_like(snr), "v": snr / (snr + 1), "x0": snr}[objective]
    tables = {"betas": schedule.betas, "alphas_cumprod": schedule.alphas_cumprod, "loss_weight": weight}
    return {name: table.float() for name, table in tables.items()}


def shapes(**changed: list[int]) -> dict[str, Tensor]:
    """The weights of a Unet that say what it is, without memory."""
    found = {
        "init_conv.weight": [8, 3, 7, 7],
        "final_conv.weight": [3, 8, 1, 1],
        "time_mlp.1.weight": [32, 8],
        "downs.0.2.mem_kv": [2, 4, 32, 4],
        "downs.0.3.1.weight": [8, 32, 1, 1],
        "downs.1.2.mem_kv": [2, 4, 4, 32],
        "downs.1.2.to_out.weight": [8, 128, 1, 1],
        "downs.1.3.weight": [16, 8, 3, 3],
    }
    found |= {name.replace("_dot_", "."): shape for name, shape in changed.items()}
    return {f"model.{name}": torch.empty(shape, device="meta") for name, shape in found.items()}


def test_the_shapes_say_what_the_network_was_made_with():
    weights = {name.removeprefix("model."): tensor for name, tensor in shapes().items()}
    assert lucidrains._arguments(weights) == {
        "dim": 8,
        "init_dim": 8,
        "dim_mults": (1, 2),
        "channels": 3,
        "learned_variance": False,
        "attn_heads": (4, 4),
        "attn_dim_head": (32, 32),
        "full_attn": (False, True),
    }


@pytest.mark.parametrize(
    ("changed", "flags", "reason"),
    [
        ({}, None, "--flags '--image_size 64'"),
        ({}, "--image_size eight", "--image_size is 'eight'; expected the side of a square"),
        ({}, "--image_size 9", "--image_size is 9; expected a multiple of 2"),
        ({}, "--image_size 8x9", "--image_size is 8x9; expected a multiple of 2"),
        (
            {},
            "--image_size 8 --objective pred_noise",
            "--objective is pred_noise, but its loss_weight is that of pred_v",
        ),
        ({}, "--image_size 8 --objective score", "--objective is 'score'; expected one of pred_noise, pred_v"),
        ({"loss_weight": torch.rand(100)}, "--image_size 8", "does not tell what the network predicts: give it"),
        ({"betas": torch.ones(3, 3)}, "--image_size 8", r"betas and alphas_cumprod have shapes \[3, 3\] and \[100\]"),
        ({"betas": torch.ones(100)}, "--image_size 8", "betas"),
        ({"betas": torch.zeros(100)}, "--image_size 8", "betas"),
        ({"betas": torch.full((100,), torch.nan)}, "--image_size 8", "betas"),
        (shapes(init_conv_dot_weight=[8, 6, 7, 7]), "--image_size 8", "self_condition"),
        (shapes(init_conv_dot_weight=[8, 5, 7, 7]), "--image_size 8", "takes 5 channels and gives 3"),
        (shapes(time_mlp_dot_1_dot_weight=[32, 9]), "--image_size 8", "dim = 9"),
        (shapes(time_mlp_dot_1_dot_weight=[0, 0]), "--image_size 8", "dim = 0"),
        ({"model.classes_emb.weight": torch.ones(2)}, "--image_size 8", "classifier_free_guidance's Unet"),
        ({"model.time_mlp.0.weights": torch.ones(2)}, "--image_size 8", "learned_sinusoidal_cond"),
        ({"model.downs.0.2.mem_kv": torch.ones(2)}, "--image_size 8", r"model\.downs\.0\.2\.mem_kv has shape \[2\]"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changed, flags, reason):
    with pytest.raises(InputError, match=rf"^model-3\.pt: .*{reason}"):
        read({**chain(), **shapes(), **changed}, flags)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    with pytest.raises(InputError, match="pip install denoising-diffusion-pytorch"):
        read({**chain(), **shapes()})


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("gamma", [None, 5.0, 2.5])
@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_the_weights_of_the_loss_tell_what_is_predicted(name, prediction, gamma):
    schedule = getattr(Schedule, name)(1000)
    snr = schedule.snr
    weight = (snr if gamma is None else snr.clamp(max=gamma)) / {"eps": snr, "v": snr + 1, "x0": 1}[prediction]
    tables = {**chain(schedule=schedule), "loss_weight": weight.float()}
    found = lucidrains._diffusion(tables, lucidrains._schedule(tables), {}, False)
    assert found.objective.prediction == prediction
    assert found.schedule.source == {"kind": name, "T": 1000}
    assert (found.objective.loss_weighting == "min_snr") == (gamma is not None)
    torch.testing.assert_close(found.objective.loss_table(schedule)[:, 2], weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "content", [None, 3, [], {}, {"ema": None, "model": {}}, {"model": {"betas": 1}}, torch.ones(2)]
)
def test_what_is_of_another_format_is_not_claimed(content):
    assert not lucidrains.claims(content)
