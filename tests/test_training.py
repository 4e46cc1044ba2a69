"""The training loop's promises: resuming is bit for bit, a stop saves, a non-finite loss stops without harm."""

import dataclasses
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ddpm_fast import checkpoint, train
from ddpm_fast.data import Dataset, batch_indices, flip_mask, load_dataset
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.nn import UNetConfig
from ddpm_fast.noise import NoiseKey, Stream, normals, uniform_integers
from ddpm_fast.schedule import Schedule
from ddpm_fast.training import TrainConfig, Trainer

CPU = torch.device("cpu")
TINY = [
    *("--data", "mnist5k", "--model-channels", "8", "--channel-mult", "1,2", "--num-res-blocks", "1"),
    *("--batch-size", "8", "--warmup", "5", "--sample-every", "0", "--device", "cpu"),
]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


def command(*arguments, check=True):
    """The train command run in this process: exit_code, stdout, stderr."""
    run = CliRunner().invoke(train.app, [str(a) for a in arguments], catch_exceptions=False)
    if check:
        assert run.exit_code == 0, run.stderr + run.stdout
    return run


def trainer(dataset=None, **options):
    """A small trainer with every source of randomness in use: dropout, dropped labels, flips."""
    network = UNetConfig(
        image_size=28, in_channels=1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(), num_classes=10, norm_groups=4, dropout=0.2,
    )  # fmt: skip
    config = TrainConfig(batch_size=8, warmup=5, flip=True, label_drop=0.3, **options)
    return Trainer(network, GaussianDiffusion(Schedule.cosine(100)), config, dataset or load_dataset("mnist5k"), CPU)


def weights(path):
    return checkpoint.read_training(path)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, precision):
    straight = trainer(precision=precision)
    for _ in range(20):
        straight.train_step()
    straight_path = straight.save(tmp_path / "straight", {})

    first = trainer(precision=precision)
    for _ in range(10):
        first.train_step()
    half = first.save(tmp_path / "halves", {})
    torch.rand(1000)  # whatever else used the global generator must not matter
    second = trainer(precision=precision)
    second.load(half)
    assert second.step == 10
    for _ in range(10):
        second.train_step()
    halves_path = second.save(tmp_path / "halves", {})

    a, b = weights(straight_path), weights(halves_path)
    assert a.keys() == b.keys() and any(name.startswith("optim.") for name in a)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    assert not torch.equal(a["model.conv_in.weight"], weights(half)["model.conv_in.weight"])


def test_command_trains_saves_and_resumes_to_the_same_weights(tmp_path):
    command(*TINY, "--steps", 6, "--out", tmp_path / "a")
    command(*TINY, "--steps", 3, "--out", tmp_path / "b")
    resumed = command("--data", "mnist5k", "--steps", 6, "--out", tmp_path / "b", "--resume")
    assert "Resuming at step 3" in resumed.stdout
    a, b = (weights(checkpoint.latest_checkpoint(tmp_path / name)) for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert list((tmp_path / "a" / "curves").iterdir()), "no TensorBoard curves"
    assert checkpoint.load_model(tmp_path / "a" / "model.safetensors").config["training"]["steps"] == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_first(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpm_fast.train", *TINY, "--steps", "99999", "--save-every", "1", "--out", tmp_path],
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while checkpoint.latest_checkpoint(tmp_path) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    state = checkpoint.latest_checkpoint(tmp_path)
    step = checkpoint.read_training(state)[1]["step"]
    assert f"Stopped at step {step}, saved" in output and "--resume" in output


def test_non_finite_loss_stops_with_the_step_named_and_the_last_good_checkpoint_kept(tmp_path):
    # At this learning rate the weights overflow within a few steps.
    run = command(
        *(*TINY, "--steps", 200, "--lr", 1e30, "--grad-clip", 1e30, "--save-every", 1, "--log-every", 1),
        *("--out", tmp_path, "--precision", "fp32"),
        check=False,
    )
    assert run.exit_code == 1
    state = checkpoint.latest_checkpoint(tmp_path)
    step = checkpoint.read_training(state)[1]["step"]
    assert f"step {step + 1} gave the loss" in run.stdout and state.name in run.stdout
    assert all(value.isfinite().all() for value in weights(state).values() if value.is_floating_point())


def test_loss_falls():
    t = trainer(lr=2e-3)
    losses = [t.train_step()[0].item() for _ in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_step_matches_the_algorithm_written_out_in_plain_torch():
    # One step of Ho et al. 2020, alg. 1 with AdamW by hand, in fp32, from the same draws.
    subject = trainer()
    network = type(subject.model)(dataclasses.replace(subject.model.config, dropout=0.0))
    network.load_state_dict(subject.model.state_dict())
    subject.model = network
    parameters = [p.detach().clone().double() for p in network.parameters()]

    indices = batch_indices(0, 0, 8, len(subject.dataset))
    images, labels = subject.dataset.batch(indices)
    images = torch.where(flip_mask(0, 0, 8)[:, None, None, None], images.flip(-1), images)
    key = NoiseKey.of(0, 8, stream=Stream.TRAINING)
    steps = uniform_integers(NoiseKey.of(0, 8, stream=Stream.TIMESTEP), 100)
    dropped = uniform_integers(NoiseKey.of(0, 8, stream=Stream.LABEL), 2**24) < round(0.3 * 2**24)
    ab = subject.diffusion.schedule.alphas_cumprod.float()[steps].view(-1, 1, 1, 1)
    eps = normals(key, 784).view(8, 1, 28, 28)
    x_t = ab.sqrt() * (images.float() / 127.5 - 1) + (1 - ab).sqrt() * eps
    output = network(x_t, steps, labels.masked_fill(dropped, 10))
    expected = (output - eps).square().mean()
    gradients = torch.autograd.grad(expected, list(network.parameters()), allow_unused=True)
    norm = torch.stack([g.double().norm() for g in gradients if g is not None]).norm()

    subject.optimizer = torch.optim.AdamW(network.parameters(), lr=subject.config.lr, weight_decay=0.0)
    loss, norm_found = subject.train_step()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm_found.double(), norm, rtol=1e-4, atol=0)
    # AdamW's first step moves each weight by lr * g / (|g| + eps); warm-up makes lr a fifth of 2e-4.
    clip = min(1.0, 1.0 / (norm.item() + 1e-6))
    for before, gradient, after in zip(parameters, gradients, network.parameters(), strict=True):
        if gradient is not None:
            g = gradient.double() * clip
            torch.testing.assert_close(
                after.detach().double(), before - 2e-4 / 5 * g / (g.abs() + 1e-8), rtol=1e-4, atol=3e-6
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"grad_clip": -1.0}, "grad_clip is -1"),
        ({"label_drop": 1.5}, "label_drop is 1.5"),
        ({"precision": "fp8"}, "expected fp32 or bf16"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**options)


def test_dataset_that_does_not_fit_the_network():
    images = torch.zeros(4, 3, 28, 28, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"3x28x28.*1x28x28"):
        trainer(Dataset(images, None, None, "colour"))
    with pytest.raises(InputError, match="has 2 classes and the network 10"):
        trainer(Dataset(images[:, :1].contiguous(), torch.tensor([0, 1, 0, 1]), None, "two"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere", "--out", "OUT"], "there is no file or folder nowhere"),
        ([*TINY, "--out", "FILE"], "FILE"),
        ([*TINY, "--out", "OUT", "--resume"], "there is no checkpoint"),
        ([*TINY, "--out", "OUT", "--channel-mult", "1,x"], "expected integers separated by commas"),
        ([*TINY, "--out", "OUT", "--schedule", "quartic"], "linear, cosine"),
        ([*TINY, "--out", "OUT", "--schedule", "linear", "--timesteps", "10"], "T >= 21"),
        ([*TINY, "--out", "OUT", "--prediction", "noise"], "noise"),
        ([*TINY, "--out", "OUT", "--steps", "0"], "--steps is 0"),
        ([*TINY, "--out", "OUT", "--precision", "fp12"], "expected auto, fp32, bf16"),
        ([*TINY, "--out", "OUT", "--device", "cuda"], "cannot be used here"),
        ([*TINY, "--out", "OUT", "--image-size", "27"], "image_size 27"),
    ],
)
def test_bad_arguments_end_with_a_message_and_status_2(tmp_path, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "FILE").write_text("")
    places = {"OUT": str(tmp_path / "OUT"), "FILE": str(tmp_path / "FILE")}
    run = command(*(places.get(a, a) for a in arguments), check=False)
    assert run.exit_code == 2, run.stdout + run.stderr
    assert message in run.stderr and "Traceback" not in run.stderr


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path):
    command(*TINY, "--steps", 1, "--out", tmp_path)
    again = command(*TINY, "--steps", 1, "--out", tmp_path, check=False)
    assert again.exit_code == 2 and "holds a run already" in again.stderr
    other = command("--data", "mnist5k", "--lr", "0.5", "--out", tmp_path, "--resume", check=False)
    assert other.exit_code == 2 and "--lr 0.5 differs from the 0.0002" in other.stderr


@pytest.mark.parametrize(
    ("option", "classes"), [(None, 10), ("--classes", 10), ("--no-classes", 0)], ids=["if any", "yes", "no"]
)
def test_conditioning_follows_the_labels_unless_told_otherwise(tmp_path, option, classes):
    command(*TINY, "--steps", 1, "--out", tmp_path, *([option] if option else []))
    assert checkpoint.load_model(tmp_path / "model.safetensors").model.config.num_classes == classes


@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (64, 16), (32, 8), (50, 10), (6, 1), (2, 1)])
def test_norm_groups(channels, groups):
    assert train.norm_groups(channels) == groups


def test_broken_file_is_named_and_skipped_or_stops_the_run(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.new("L", (16, 16), 60 * i).save(pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"not a picture")
    tiny = [
        *("--data", pictures, "--model-channels", 8, "--channel-mult", "1,2", "--num-res-blocks", 1),
        *("--batch-size", 2, "--sample-every", 0, "--device", "cpu", "--steps", 1),
    ]
    run = command(*tiny, "--out", tmp_path / "run")
    assert "broken.png" in run.stdout and "4 images 1x16x16" in run.stdout
    strict = command(*tiny, "--out", tmp_path / "strict", "--strict", check=False)
    assert strict.exit_code == 2 and "broken.png" in strict.stderr
