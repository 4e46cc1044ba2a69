"""Models of ours exported for diffusers: they load there, take the same steps, and come back as they were."""

import importlib.util
import json
import sys

import pytest
import torch
from support.diffusers_loops import given_noise
from support.networks import random_unet
from torch.testing import assert_close

import ddpm_fast as df
from ddpm_fast.errors import InputError
from ddpm_fast.formats.diffusers.export import chain_difference, export_diffusers
from ddpm_fast.formats.diffusers.folder import read_folder

absent = importlib.util.find_spec("diffusers") is None


def with_diffusers(test):
    """Marks a test that needs diffusers itself."""
    return pytest.mark.peers(pytest.mark.skipif(absent, reason="diffusers is not installed")(test))


SMALL = {"image_size": 8, "model_channels": 8, "channel_mult": (1, 2), "norm_groups": 4}
EPS = df.GaussianDiffusion(df.Schedule.linear(50))
SHORT = df.GaussianDiffusion(df.Schedule.linear(25), variance="fixed_small")
# Each kind of diffusion that DDPMScheduler can be.
DIFFUSIONS = {
    "linear, eps": df.GaussianDiffusion(df.Schedule.linear(1000), variance="fixed_small"),
    "cosine, v, large": df.GaussianDiffusion(df.Schedule.cosine(100), "v", "fixed_large"),
    "scaled linear, x0": df.GaussianDiffusion(df.Schedule.scaled_linear(60), "x0"),
    "sigmoid, learned": df.GaussianDiffusion(df.Schedule.sigmoid(40), "eps", "learned_range", "hybrid"),
    "zero terminal SNR": df.GaussianDiffusion(df.Schedule.linear(100).zero_terminal_snr(), "v", "fixed_small"),
    "betas": df.GaussianDiffusion(df.Schedule.from_betas([0.1, 0.2, 0.3]), "eps", "fixed_large"),
}
NETWORKS = {
    "plain": {},
    "not square": {"image_size": (8, 4), "in_channels": 1},
    "everything": {"attention_resolutions": (4,), "head_channels": 4, "scale_shift": True, "dropout": 0.1}
    | {"downsample_padding": "asymmetric", "norm_eps": 1e-6, "time_denominator": "half-1", "time_order": "sin|cos"},
    "classes": {"num_classes": 3, "head_channels": 4, "decoder_attention": (8,), "middle_attention": "none"},
    "classes without a null class": {"num_classes": 3, "null_class": False, "resample": "resblock"},
    "plain middle": {"middle_attention": "plain", "scale_shift": True, "channel_mult": (1, 1.5), "norm_groups": 2},
}


def network(name="plain", **options):
    return random_unet(**SMALL | NETWORKS[name] | options)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_as_it_was(name, tmp_path):
    model = network(name)
    back = read_folder(export_diffusers(model, EPS, tmp_path / "out"))
    assert back.unet == model.config
    state = model.state_dict()
    assert back.state.keys() == state.keys()
    assert all(torch.equal(back.state[key], state[key]) for key in state)


def test_what_a_network_was_told_of_augmentation_is_left_out(tmp_path):
    model = network("everything", augment_channels=9)
    back = read_folder(export_diffusers(model, EPS, tmp_path / "out"))
    again = df.UNet(back.unet).eval()
    again.load_state_dict(back.state)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    with torch.no_grad():
        assert back.unet.augment_channels == 0 and model.augment_embedding.weight.any()
        assert torch.equal(again(x, t), model(x, t))


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_a_diffusion_comes_back_as_it_was(name, tmp_path):
    diffusion = DIFFUSIONS[name]
    model = network(learned_variance=diffusion.objective.learned)
    back = read_folder(export_diffusers(model, diffusion, tmp_path / "out")).diffusion
    assert back.objective == diffusion.objective
    assert torch.equal(back.schedule.alphas_cumprod, diffusion.schedule.alphas_cumprod)
    assert back.schedule.name == diffusion.schedule.name.replace("sigmoid", "betas")


@pytest.mark.parametrize("name", DIFFUSIONS)
@with_diffusers
def test_each_step_is_ours(name, tmp_path):
    """From the same x_t, output and noise. The scheduler's own tables are float32, in which 1 - alpha_bar is coarse;
    with them in float64 its steps are ours to 1e-5, and as they are to 1e-4."""
    from diffusers import DDPMPipeline

    diffusion = DIFFUSIONS[name]
    learned = diffusion.objective.learned
    pipeline = DDPMPipeline.from_pretrained(
        export_diffusers(network(learned_variance=learned), diffusion, tmp_path / "out")
    )
    chain, T = pipeline.scheduler, diffusion.num_timesteps
    single = chain.alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    for t in sorted({0, 1, 2, 3, T // 2, T - 1} & set(range(T))):
        x0, eps, noise, other = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(4))
        x = diffusion.q_sample(x0.clamp(-1, 1), t, eps)
        target = {"eps": eps, "x0": x0.clamp(-1, 1), "v": diffusion.schedule.sqrt_alphas_cumprod[t].float() * eps}
        output = target[diffusion.objective.prediction] + 0.1 * other
        output = torch.cat([output, other.clamp(-1, 1)], dim=1) if learned else output
        p = diffusion.p_mean_variance(output, x, t)
        expected = p.mean + (0.5 * p.log_variance).exp() * noise if t else p.mean
        for table, tolerance in ((single, 1e-4), (diffusion.schedule.alphas_cumprod, 1e-5)):
            chain.alphas_cumprod = table
            with given_noise(iter([noise])):
                assert_close(chain.step(output, t, x).prev_sample, expected, rtol=0, atol=tolerance)


def test_heads_of_one_width_come_back_as_a_width(tmp_path):
    model = network(num_heads=2, channel_mult=(1, 1), attention_resolutions=(4,))
    assert read_folder(export_diffusers(model, EPS, tmp_path / "out")).unet.head_channels == 4


def test_the_folder_holds_what_diffusers_writes(tmp_path):
    folder = export_diffusers(network(), EPS, tmp_path / "new" / "out")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert files == ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", weights]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"


@pytest.mark.parametrize(
    ("model", "diffusion", "message"),
    [
        (network("classes"), EPS.respace(10), "respaced to 10 of 50"),
        (network(learned_variance=True), EPS, "learned_variance is True"),
        (network(learned_variance=True), df.GaussianDiffusion(EPS.schedule, "eps", "learned", "vlb"), "'learned'"),
        (network(condition_channels=1), EPS, "condition_channels is 1"),
        (network(timestep_scale=2.0), EPS, "timestep_scale is 2.0"),
        (torch.nn.Identity(), EPS, "the model is a Identity"),
        (network(), None, "the diffusion is a NoneType"),
    ],
)
def test_what_diffusers_cannot_have_is_refused_and_nothing_is_left(model, diffusion, message, tmp_path):
    with pytest.raises(InputError, match=message):
        export_diffusers(model, diffusion, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_what_is_there_already_stays(tmp_path):
    (tmp_path / "file").write_text("mine")
    for there in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="is there already"):
            export_diffusers(network(), EPS, there)
    assert (tmp_path / "file").read_text() == "mine"


def test_names_of_classes_come_back(tmp_path):
    folder = export_diffusers(network("classes"), EPS, tmp_path / "out", label_names=["a", "b", "c"])
    assert read_folder(folder).label_names == ["a", "b", "c"]
    with pytest.raises(InputError, match="2 names for 3 classes"):
        export_diffusers(network("classes"), EPS, tmp_path / "other", label_names=["a", "b"])


@with_diffusers
@pytest.mark.parametrize("name", ["not square", "classes"])
def test_the_whole_chain_is_measured(name, tmp_path):
    model = network(name)
    folder = export_diffusers(model, SHORT, tmp_path / "out")
    apart = chain_difference(model, SHORT, folder, n=2)
    assert apart.steps == 25
    assert 0 < apart.mean < apart.largest < 1e-3
    with torch.no_grad():
        model.conv_out.bias += 0.1
    assert chain_difference(model, SHORT, folder, steps=10).mean > 1e-2


def test_without_diffusers_a_chain_is_not_compared(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    model = network()
    assert chain_difference(model, EPS, export_diffusers(model, EPS, tmp_path / "out")) is None


@pytest.fixture
def class_pipeline(tmp_path, monkeypatch):
    """Makes the pipeline that diffusers loads from an exported network of the classes a, b and c."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def made(model):
        folder = export_diffusers(model, SHORT, tmp_path / "out", label_names=["a", "b", "c"])
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return made


@with_diffusers
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_pipeline_of_a_network_of_classes_samples_as_we_do(guidance, class_pipeline, monkeypatch):
    model = network("classes")
    pipeline = class_pipeline(model)
    keys = [df.NoiseKey.of(7, 2, stream=df.Stream.INITIAL)]
    keys += [df.NoiseKey.of(7, 2, step=i, stream=df.Stream.REVERSE) for i in range(SHORT.num_timesteps)]
    normals = (df.ops.normal(key, model.config.shape) for key in keys)
    monkeypatch.setattr(sys.modules[type(pipeline).__module__], "randn_tensor", lambda *_, **__: next(normals))
    with given_noise(normals):
        images = pipeline(class_labels=[2, "b"], guidance_scale=guidance, output_type="pt").images
    ours = df.sample(model, SHORT, 2, labels=torch.tensor([2, 1]), guidance=guidance, seed=7)
    assert_close(images, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


@with_diffusers
def test_the_pipeline_refuses_classes_that_there_are_not(class_pipeline):
    pipeline = class_pipeline(network("classes without a null class"))
    with pytest.raises(ValueError, match="class 3 is unknown; expected a number from 0 to 2 or one of a, b, c"):
        pipeline(class_labels=[3])
    with pytest.raises(ValueError, match="class 'd' is unknown"):
        pipeline(class_labels=["d"])
    with pytest.raises(ValueError, match="no null class"):
        pipeline(class_labels=[0], guidance_scale=2.0)
    assert pipeline(class_labels=["a"], num_inference_steps=2).images[0].size == (8, 8)
