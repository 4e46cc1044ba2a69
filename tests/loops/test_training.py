"""The training loop's promises: resuming is bit for bit, a stop saves, a non-finite loss stops without harm."""

import dataclasses
import itertools
import math

import pytest
import torch
from PIL import Image
from support.recording import NoSync
from typer.testing import CliRunner

from ddpm_fast.commands import train
from ddpm_fast.commands.training import setup as training_setup
from ddpm_fast.data import Dataset, batch_indices, flip_mask, load_dataset
from ddpm_fast.data import examples as examples_module
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.loops import metrics as metrics_module
from ddpm_fast.loops.metrics import Look, Metrics, NonFiniteLoss
from ddpm_fast.loops.timesteps import TIMESTEP_SAMPLINGS
from ddpm_fast.loops.train_config import TrainConfig, warmup_for
from ddpm_fast.loops.training import Trainer
from ddpm_fast.nn import EMA, UNet, UNetConfig
from ddpm_fast.noise import NoiseKey, Stream, normals, uniform_integers
from ddpm_fast.schedule import Schedule

CPU = torch.device("cpu")
TINY = [
    "--data=mnist5k",
    "--model-channels=8",
    "--channel-mult=1,2",
    "--num-res-blocks=1",
    "--batch-size=8",
    "--warmup=5",
    "--sample-every=0",
    "--device=cpu",
]
DIVERGING = ["--steps=200", "--lr=1e30", "--grad-clip=1e30", "--precision=fp32"]


pytestmark = pytest.mark.usefixtures("wide_terminal")


def command(*arguments, check=True):
    """The train command run in this process: exit_code, stdout, stderr."""
    run = CliRunner().invoke(train.app, [str(a) for a in arguments], catch_exceptions=False)
    if check:
        assert run.exit_code == 0, run.stderr + run.stdout
    return run


def small_network(learned_variance=False):
    return UNetConfig(
        image_size=28, in_channels=1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(), num_classes=10, norm_groups=4, dropout=0.2, learned_variance=learned_variance,
    )  # fmt: skip


def trainer(dataset=None, diffusion=None, cuda_graph=None, **options):
    """A small trainer with every source of randomness in use, dropout, dropped labels, flips, and averages of both
    kinds."""
    diffusion = diffusion or GaussianDiffusion(Schedule.cosine(100))
    plain = {"batch_size": 8, "warmup": 5, "flip": True, "label_drop": 0.3, "average_widths": (0.05, 0.1)}
    config = TrainConfig(**plain | options)
    network = small_network(diffusion.objective.learned)
    if config.augmentation is not None:
        network = dataclasses.replace(network, augment_channels=config.augmentation.channels)
    return Trainer(network, diffusion, config, dataset or load_dataset("mnist5k"), CPU, cuda_graph)


def learned_variance(T):
    """A diffusion so short that every timestep soon has its ten losses."""
    return GaussianDiffusion(Schedule.cosine(T), variance="learned_range", loss="hybrid")


def weights(path):
    return checkpoint.read_training(path)[0]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="fp32"),
        pytest.param({"precision": "bf16"}, id="bf16"),
        pytest.param({"augment": "yflip,small:0.5"}, id="augmented"),
        pytest.param(
            {"diffusion": learned_variance(4), "timestep_sampling": "loss_second_moment"},
            id="learned variance, importance sampling",
        ),
    ],
)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, options):
    straight = trainer(**options)
    for _ in range(20):
        straight.train_step()
    straight_path = straight.save(tmp_path / "straight", {})

    first = trainer(**options)
    for _ in range(10):
        first.train_step()
    half = first.save(tmp_path / "halves", {})
    torch.rand(1000)  # whatever else used the global generator must not matter
    second = trainer(**options)
    second.load(half)
    assert second.step == 10
    for _ in range(10):
        second.train_step()
    halves_path = second.save(tmp_path / "halves", {})

    a, b = weights(straight_path), weights(halves_path)
    assert a.keys() == b.keys() and {name.split(".")[0] for name in a} >= {"optim", "average"}
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    assert not torch.equal(a["model.conv_in.weight"], weights(half)["model.conv_in.weight"])
    if "timestep_sampling" in options:
        assert (weights(half)["timesteps.counts"] >= 10).all(), "the draws were still uniform"
        assert not torch.equal(a["timesteps.history"], weights(half)["timesteps.history"])


KINDS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "weight decay, unconditional": {"weight_decay": 0.1, "label_drop": 0.0},
    "stratified, v, min_snr": {
        "diffusion": GaussianDiffusion(Schedule.cosine(100), prediction="v", loss_weighting="min_snr"),
        "timestep_sampling": "stratified",
    },
    "learned variance, importance sampling": {
        "diffusion": learned_variance(4),
        "timestep_sampling": "loss_second_moment",
    },
    "augmented": {"augment": "yflip,small:0.5"},
    "bound": {"diffusion": GaussianDiffusion(Schedule.cosine(100), loss="rescaled_vlb")},
    "two micro-batches, importance sampling": {
        "diffusion": learned_variance(4),
        "timestep_sampling": "loss_second_moment",
        "micro_batch": 4,
    },
}


@pytest.mark.parametrize("word", KINDS)
def test_replayed_steps_are_the_eager_ones_bit_for_bit(recording, tmp_path, word):
    """With a recording in the place of a CUDA graph (recording.py): dropout, warm-up, flips and dropped labels are all
    in use, and the learning rate, the average's decay and everything drawn differ from step to step."""
    eager, replayed = trainer(**KINDS[word], cuda_graph=False), trainer(**KINDS[word])
    graphs = 3 if "micro_batch" in KINDS[word] else 1  # the first micro-batch, the second, the update
    for _ in range(12):
        found, expected = replayed.train_step(), eager.train_step()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (recording.captures, recording.replays) == (graphs, 10 * graphs)
    paths = [one.save(tmp_path / name, {}) for one, name in ((eager, "eager"), (replayed, "replayed"))]
    a, b = map(weights, paths)
    assert a.keys() == b.keys() and {name.split(".")[0] for name in a} >= {"model", "ema", "average", "optim"}
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    assert (a["optim.conv_in.weight.step"], eager.step, replayed.step) == (12, 12, 12)

    # Resumed, the state is in other tensors: the graph of before must not be used on them.
    replayed.load(paths[0])
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(replayed.train_step(), eager.train_step(), strict=True))
    assert (recording.captures, recording.replays) == (2 * graphs, 12 * graphs)


def test_the_recording_catches_what_python_changes_between_steps(recording, monkeypatch):
    """The test above can fail: a learning rate of Python's is replayed as it was at the capture."""
    eager, replayed = trainer(cuda_graph=False), trainer()
    for subject in (eager, replayed):

        def compute(of=subject, whole=subject._compute):
            of.config = dataclasses.replace(of.config, lr=1e-3 * (of.step + 1))
            whole()

        monkeypatch.setattr(subject, "_compute", compute)
    for _ in range(5):
        eager.train_step()
        replayed.train_step()
    assert recording.replays == 3
    assert not torch.equal(eager.model.conv_in.weight, replayed.model.conv_in.weight)


def test_metrics_of_a_step_are_not_overwritten_by_the_next(recording):
    subject = trainer()
    kept = [subject.train_step() for _ in range(6)]
    assert len({loss.item() for loss, _ in kept}) == len({norm.item() for _, norm in kept}) == 6


def test_a_graph_that_is_asked_for_where_there_is_none():
    with pytest.raises(InputError, match="on cpu, and CUDA graphs are for CUDA devices"):
        trainer(cuda_graph=True)


def test_a_step_that_cannot_be_captured_goes_on_as_before(recording, monkeypatch):
    def waits(self, step):
        int(step)

    eager = trainer(cuda_graph=False)
    for _ in range(4):
        eager.train_step()
    update = EMA.update
    monkeypatch.setattr(EMA, "update", lambda self, step, keep: (waits(self, step), update(self, step)))
    subject = trainer()
    for _ in range(4):
        subject.train_step()
    # The second capture lets the generator know that the first one is over.
    assert (recording.captures, recording.replays) == (2, 0)
    assert torch.equal(subject.model.conv_in.weight, eager.model.conv_in.weight)
    asked = trainer(cuda_graph=True)
    asked.train_step()
    asked.train_step()
    with pytest.raises(InputError, match=r"no graph can be captured: its capture failed \(aten.*waits for the device"):
        asked.train_step()


@pytest.mark.parametrize("word", KINDS)
def test_a_step_never_waits_for_the_device(monkeypatch, word):
    monkeypatch.setattr(UNet, "_check", lambda *_: None)  # looks at labels, on the CPU alone
    subject = trainer(**KINDS[word])
    subject.train_step()  # makes the tables
    monkeypatch.setattr(subject, "_load_batch", lambda number: None)  # runs on the host
    with NoSync():
        subject.train_step()


def overflowing(subject):
    """Let the next gradient of the trainer overflow fp16, and its loss not."""
    subject.loss_scale.scale.fill_(2.0**60)


def test_a_step_whose_gradient_overflows_changes_nothing_but_the_scale(tmp_path):
    """Beside a run that sees the same batches without an overflow: what the next step starts from, and what is
    remembered of the losses."""
    options = {"precision": "fp16", "diffusion": learned_variance(4), "timestep_sampling": "loss_second_moment"}
    subject, other = trainer(**options), trainer(**options)
    for _ in range(3):
        subject.train_step()
        other.train_step()
    before = weights(subject.save(tmp_path / "before", {}))
    overflowing(subject)
    loss, norm = subject.train_step()
    expected, norm_there = other.train_step()
    assert torch.equal(loss, expected) and loss.isfinite()
    assert not norm.isfinite() and norm_there.isfinite()
    after = weights(subject.save(tmp_path / "after", {}))
    assert subject.step == 4
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"timesteps.history", "timesteps.counts", "loss_scale.scale", "loss_scale.good_steps"}
    assert after["loss_scale.scale"] == 2.0**59 and after["loss_scale.good_steps"] == 0
    assert torch.equal(subject.timestep_sampler.history, other.timestep_sampler.history)


def test_fp16_is_replayed_and_resumed_bit_for_bit(recording, tmp_path):
    """As above, with an overflow while a graph is replayed, whose smaller scale the resumed run must begin with."""
    eager, replayed = trainer(precision="fp16", cuda_graph=False), trainer(precision="fp16")
    for step in range(5):
        for subject in (eager, replayed):
            if step == 3:
                overflowing(subject)
        found, expected = replayed.train_step(), eager.train_step()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert (recording.captures, recording.replays) == (1, 3)
    path = replayed.save(tmp_path, {})
    resumed = trainer(precision="fp16")
    resumed.load(path)
    assert resumed.loss_scale.scale == 2.0**58
    resumed.loss_scale.scale.mul_(2.0**-44)
    eager.loss_scale.scale.mul_(2.0**-44)
    assert all(torch.equal(a, b) for a, b in zip(resumed.train_step(), eager.train_step(), strict=True))
    for name, value in eager.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_fp16_trains_as_fp32_does_where_nothing_overflows():
    losses = {}
    for precision in ("fp32", "fp16"):
        subject = trainer(precision=precision, lr=1e-3)
        losses[precision] = torch.stack([torch.stack(subject.train_step()) for _ in range(6)])
    torch.testing.assert_close(losses["fp16"], losses["fp32"], rtol=2e-2, atol=0)


@pytest.mark.parametrize("first", ["fp32", "fp16"])
def test_a_run_may_change_between_fp32_and_fp16(tmp_path, first):
    before = trainer(precision=first)
    before.train_step()
    subject = trainer(precision={"fp32": "fp16", "fp16": "fp32"}[first])
    subject.load(before.save(tmp_path, {}))
    loss, norm = subject.train_step()
    assert loss.isfinite() and norm.isfinite()


def test_command_trains_saves_and_resumes_to_the_same_weights(tmp_path):
    command(*TINY, "--steps", 6, "--out", tmp_path / "a")
    command(*TINY, "--steps", 3, "--out", tmp_path / "b")
    resumed = command("--data", "mnist5k", "--steps", 6, "--out", tmp_path / "b", "--resume", "--no-cuda-graph")
    assert "Resuming at step 3" in resumed.stdout
    a, b = (weights(checkpoint.latest_checkpoint(tmp_path / name)) for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert list((tmp_path / "a" / "curves").iterdir()), "no TensorBoard curves"
    assert checkpoint.load_model(tmp_path / "a" / "model.safetensors").config["training"]["steps"] == 6


def test_non_finite_loss_stops_with_the_step_named_and_the_state_that_gave_it_put_aside(tmp_path):
    # At this learning rate the weights overflow within a few steps.
    run = command(*TINY, *DIVERGING, "--save-every", 1, "--log-every", 1, "--out", tmp_path, check=False)
    assert run.exit_code == 1
    bad = max(tmp_path.glob("step-*.diverged"))
    step = checkpoint.read_training(bad)[1]["step"]
    assert f"step {step + 1} gave the loss" in run.stdout and bad.name in run.stdout
    assert all(value.isfinite().all() for value in weights(bad).values() if value.is_floating_point())
    good = checkpoint.latest_checkpoint(tmp_path)
    assert (good.name if good else "No good state had been saved") in run.stdout


class Arriving:
    """An event that comes to pass when it is waited for."""

    waited = 0

    def query(self):
        return False

    def synchronize(self):
        Arriving.waited += 1


@pytest.fixture
def late(monkeypatch):
    """Numbers that, as from a GPU, are not there at the look at which they are sent."""
    monkeypatch.setattr(metrics_module, "send", lambda numbers: (numbers, Arriving()))
    monkeypatch.setattr(Arriving, "waited", 0)


def test_metrics_are_read_at_the_next_look_or_when_they_must_be(late):
    metrics = Metrics(step=40)
    for i in range(3):
        metrics.add(torch.tensor(float(i)), torch.tensor(2.0 * i))
    assert metrics.look(wait=False) == []
    metrics.add(torch.tensor(5.0), torch.tensor(7.0))
    assert metrics.look(wait=False) == [Look(43, 3, 1.0, 2.0)]
    metrics.add(torch.tensor(6.0), torch.tensor(8.0))
    assert metrics.look(wait=True) == [Look(44, 1, 5.0, 7.0), Look(45, 1, 6.0, 8.0)]
    assert metrics.look(wait=True) == [] and Arriving.waited == 3


@pytest.mark.parametrize("bad", ["loss", "norm"])
def test_late_metrics_name_the_first_bad_step_before_anything_is_saved(late, bad):
    def run(wait_at):
        metrics = Metrics(step=10)
        for step in range(11, 20):
            numbers = {"loss": 1.0, "norm": 1.0} | ({bad: math.inf} if step >= 14 else {})
            metrics.add(torch.tensor(numbers["loss"]), torch.tensor(numbers["norm"]))
            if step % 3 == 0:
                metrics.look(wait=step == wait_at)

    with pytest.raises(NonFiniteLoss, match="step 14 gave"):
        run(wait_at=15)
    with pytest.raises(NonFiniteLoss, match="step 14 gave"):
        run(wait_at=None)


def test_a_late_non_finite_loss_stops_the_command_with_nothing_saved_of_it(late, tmp_path):
    run = command(*TINY, *DIVERGING, "--save-every", 100, "--log-every", 2, "--out", tmp_path, check=False)
    assert run.exit_code == 1 and "gave the loss" in run.stdout
    assert checkpoint.latest_checkpoint(tmp_path) is None and not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("steps", [100, 1000, 10_000])
def test_the_average_fits_runs_of_any_length(steps):
    """The weights that it is made of are on average a tenth of the run old."""
    decay_at = EMA(torch.nn.Linear(1, 1), TrainConfig.ema_decay).decay_at
    share, age = 1.0, 0.0
    for back in range(steps):
        decay = decay_at(steps - 1 - back)
        age += share * (1 - decay) * back
        share *= decay
    assert age == pytest.approx(steps / 10, rel=0.01) and share < 1e-12


def test_with_another_batch_size_the_examples_and_the_noise_go_on_where_they_were(tmp_path, monkeypatch):
    first = trainer(batch_size=8)
    for _ in range(3):
        first.train_step()
    path = first.save(tmp_path, {})
    second = trainer(batch_size=5)
    second.load(path)
    asked = []
    monkeypatch.setattr(examples_module, "batch_indices", lambda *of: (asked.append(of[1:3]), batch_indices(*of))[1])
    keys = []
    q_sample = second.diffusion.q_sample
    monkeypatch.setattr(
        second.diffusion, "q_sample", lambda x, t, key: (keys.append(key.sample_id.tolist()), q_sample(x, t, key))[1]
    )
    for _ in range(2):
        second.train_step()
    assert asked == [(24, 5), (29, 5)] and keys == [[*range(24, 29)], [*range(29, 34)]]
    third = trainer(batch_size=5)
    third.load(second.save(tmp_path, {}))
    third.train_step()
    assert asked[-1] == (34, 5)


def test_loss_falls():
    t = trainer(lr=2e-3)
    losses = [t.train_step()[0].item() for _ in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_loss_falls_with_a_learned_variance_and_importance_sampling():
    digits = load_dataset("mnist5k")
    few = Dataset(digits.images[:4], digits.labels[:4], [str(digit) for digit in range(10)], "four digits")
    t = trainer(few, learned_variance(10), lr=2e-3, timestep_sampling="loss_second_moment")
    losses = [t.train_step()[0].item() for _ in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert len(set(t.timestep_sampler.probabilities().tolist())) == 10, "the draws were uniform throughout"


def test_importance_weights_the_loss_and_remembers_it_unweighted(monkeypatch):
    subject = trainer(timestep_sampling="loss_second_moment")
    history = torch.linspace(0.1, 3, 100)[:, None].repeat(1, 10)
    subject.timestep_sampler.load_state_dict({"history": history, "counts": torch.full((100,), 10)})
    drawn, drawn_weights, *_ = subject.timestep_sampler.sample(NoiseKey.of(0, 8, stream=Stream.TIMESTEP))
    seen = {}

    def training_losses(output, x0, t, noise):
        seen["t"], seen["losses"] = t, subject_losses(output, x0, t, noise)
        return seen["losses"]

    subject_losses = subject.diffusion.training_losses
    monkeypatch.setattr(subject.diffusion, "training_losses", training_losses)
    loss, _ = subject.train_step()
    assert torch.equal(seen["t"], drawn) and drawn_weights.std() > 0.1
    expected = sum(w * value for w, value in zip(drawn_weights.tolist(), seen["losses"].tolist(), strict=True)) / 8
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for t in set(drawn.tolist()):
        of_t = seen["losses"][drawn == t].detach()
        assert torch.equal(subject.timestep_sampler.history[t, : len(of_t)], of_t)


def allowed(prediction, variance, loss, weighting):
    learned, bound = variance.startswith("learned"), loss.endswith("vlb")
    return not (learned and loss == "simple") and not (bound and weighting != "none")


NAMES = (
    ("eps", "x0", "v"),
    ("fixed_small", "fixed_large", "learned", "learned_range"),
    ("simple", "hybrid", "vlb", "rescaled_vlb"),
    ("none", "snr", "truncated_snr", "min_snr"),
)
# Each with one way of drawing timesteps, in turn.
ALLOWED = (names for names in itertools.product(*NAMES) if allowed(*names))
CHOICES = [(*names, way) for names, way in zip(ALLOWED, itertools.cycle(TIMESTEP_SAMPLINGS), strict=False)]


@pytest.mark.pairwise
@pytest.mark.parametrize(("prediction", "variance", "loss", "weighting", "sampling"), CHOICES)
def test_every_allowed_combination_takes_a_finite_step(prediction, variance, loss, weighting, sampling):
    schedules = [Schedule.linear(30)] + [Schedule.cosine(30).zero_terminal_snr()] * (prediction != "eps")
    images = torch.arange(2 * 64, dtype=torch.uint8).view(2, 1, 8, 8)
    for schedule in schedules:
        diffusion = GaussianDiffusion(schedule, prediction, variance, loss, weighting)
        learned = diffusion.objective.learned
        network = UNetConfig(
            image_size=8, in_channels=1, model_channels=4, channel_mult=(1,), num_res_blocks=1,
            attention_resolutions=(), norm_groups=1, learned_variance=learned,
        )  # fmt: skip
        config = TrainConfig(batch_size=64, warmup=0, timestep_sampling=sampling)
        subject = Trainer(network, diffusion, config, Dataset(images, None, None, "two"), CPU)
        value, norm = subject.train_step()
        assert value.isfinite() and norm.isfinite() and value > 0 and norm > 0
        assert all(p.isfinite().all() for p in subject.model.parameters())
        last = list(subject.model.parameters())[-1].grad  # of each output channel's bias
        assert last.shape == (2 if learned else 1,)
        if learned:
            assert last[1] != 0, "the variance is not trained"


def test_step_matches_the_algorithm_written_out_in_plain_torch():
    # One step of Ho et al. 2020, alg. 1 with AdamW by hand, in fp32, from the same draws.
    subject = trainer(timestep_sampling="uniform")
    network = type(subject.model)(dataclasses.replace(subject.model.config, dropout=0.0))
    network.load_state_dict(subject.model.state_dict())
    subject.model = subject._network = network
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
    # AdamW's first step moves each weight by lr * g / (|g| + eps); warm-up makes lr a fifth of 1e-3.
    clip = min(1.0, 1.0 / (norm.item() + 1e-6))
    for before, gradient, after in zip(parameters, gradients, network.parameters(), strict=True):
        if gradient is not None:
            g = gradient.double() * clip
            torch.testing.assert_close(
                after.detach().double(), before - 1e-3 / 5 * g / (g.abs() + 1e-8), rtol=1e-4, atol=3e-6
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"grad_clip": -1.0}, "grad_clip is -1"),
        ({"label_drop": 1.5}, "label_drop is 1.5"),
        ({"precision": "fp8"}, "expected one of fp32, bf16, fp16"),
        ({"timestep_sampling": "all"}, "'all'; expected one of uniform, stratified, loss_second_moment"),
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


def test_a_network_that_gets_a_second_image_is_not_trained():
    images = Dataset(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), None, None, "grey")
    network = UNetConfig(28, 1, 8, (1, 2), 1, (), norm_groups=4, condition_channels=1)
    with pytest.raises(InputError, match=r"gets a second image of 1 channels .*: such a network can only be sampled"):
        Trainer(network, GaussianDiffusion(Schedule.cosine(9)), TrainConfig(batch_size=2), images, "cpu")


@pytest.mark.parametrize("network_learns", [True, False])
def test_network_whose_output_does_not_fit_the_variance(network_learns):
    diffusion = GaussianDiffusion(Schedule.cosine(100)) if network_learns else learned_variance(100)
    message = rf"variance is '{diffusion.objective.variance}'.*{network_learns}.*learned_variance={not network_learns}"
    with pytest.raises(InputError, match=message):
        Trainer(small_network(network_learns), diffusion, TrainConfig(), load_dataset("mnist5k"), CPU)


def test_state_of_another_timestep_sampling_is_refused_with_nothing_changed(tmp_path):
    path = trainer(timestep_sampling="loss_second_moment", seed=1).save(tmp_path, {})
    other = trainer()
    before = other.model.conv_in.weight.clone()
    with pytest.raises(InputError, match="timestep sampling"):
        other.load(path)
    assert torch.equal(other.model.conv_in.weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere", "--out", "OUT"], "/nowhere; give a folder of images"),
        ([*TINY, "--out", "FILE"], "FILE"),
        ([*TINY, "--out", "OUT", "--resume"], "there is no checkpoint"),
        ([*TINY, "--out", "OUT", "--channel-mult", "1,x"], "expected numbers separated by commas"),
        ([*TINY, "--out", "OUT", "--schedule", "quartic"], "linear, cosine"),
        ([*TINY, "--out", "OUT", "--schedule", "linear", "--timesteps", "10"], "T >= 21"),
        ([*TINY, "--out", "OUT", "--prediction", "noise"], "noise"),
        ([*TINY, "--out", "OUT", "--prediction", "eps", "--zero-terminal-snr"], "Choose prediction = 'v'"),
        ([*TINY, "--out", "OUT", "--variance", "learned", "--loss", "simple"], "choose loss = 'hybrid'"),
        ([*TINY, "--out", "OUT", "--loss", "vlb", "--loss-weighting", "min_snr"], "choose loss_weighting = 'none'"),
        ([*TINY, "--out", "OUT", "--timestep-sampling", "even"], "uniform, stratified, loss_second_moment"),
        ([*TINY, "--out", "OUT", "--steps", "0"], "--steps is 0"),
        ([*TINY, "--out", "OUT", "--precision", "fp12"], "expected auto, fp32, bf16"),
        ([*TINY, "--out", "OUT", "--device", "cuda"], "cannot be used here"),
        ([*TINY, "--out", "OUT", "--cuda-graph"], "on cpu, and CUDA graphs are for CUDA devices"),
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
    other = command("--lr", "0.5", "--out", tmp_path, "--resume", check=False)
    assert other.exit_code == 2 and "--lr 0.5 differs from the 0.001" in other.stderr


def test_resuming_needs_neither_the_data_again_nor_minds_how_the_precision_was_said(tmp_path):
    command(*TINY, "--precision", "auto", "--steps", 1, "--out", tmp_path)
    again = command(*TINY, "--precision", "auto", "--steps", 2, "--out", tmp_path, "--resume")
    assert "Resuming at step 1" in again.stdout
    assert "Resuming at step 2" in command("--steps", 3, "--out", tmp_path, "--resume").stdout
    new = command("--steps", 1, "--out", tmp_path / "new", check=False)
    assert new.exit_code == 2 and "--data is missing" in new.stderr


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ((), "simple"),
        (("--variance", "learned_range"), "hybrid"),
        (("--variance", "learned_range", "--loss", "rescaled_vlb"), "rescaled_vlb"),
        (("--loss", "vlb"), "vlb"),
    ],
    ids=["plain", "learned variance", "learned variance and a loss", "a loss"],
)
def test_loss_follows_the_variance_unless_told_otherwise(tmp_path, options, loss):
    command(*TINY, *options, "--steps", 1, "--out", tmp_path)
    config = checkpoint.load_model(tmp_path / "model.safetensors").config
    assert config["diffusion"]["loss"] == loss
    assert config["unet"]["learned_variance"] == ("--variance" in options)
    assert checkpoint.read_training(checkpoint.latest_checkpoint(tmp_path))[1]["arguments"]["loss"] == loss


def test_command_passes_the_choices_on(tmp_path):
    choices = {"prediction": "v", "variance": "learned", "loss": "hybrid", "loss_weighting": "truncated_snr"}
    options = [part for name, value in choices.items() for part in (f"--{name.replace('_', '-')}", value)]
    more = ["--schedule", "sigmoid", "--zero-terminal-snr", "--timestep-sampling", "stratified", "--timesteps", 50]
    command(*TINY, *options, *more, "--steps", 1, "--out", tmp_path)
    model = checkpoint.load_model(tmp_path / "model.safetensors")
    assert {name: model.config["diffusion"][name] for name in choices} == choices
    expected = Schedule.sigmoid(50).zero_terminal_snr()
    assert torch.equal(model.diffusion.schedule.betas, expected.betas)
    assert model.config["training"]["timestep_sampling"] == "stratified"


def test_what_is_not_given_fits_the_run(tmp_path):
    tiny = [option for option in TINY if not option.startswith("--warmup")]
    command(*tiny, "--steps", 24, "--out", tmp_path)
    state = checkpoint.read_training(checkpoint.latest_checkpoint(tmp_path))[1]
    chosen = {"lr": 1e-3, "warmup": 2, "lr_schedule": "constant", "timestep_sampling": "stratified"}
    for told in (state["arguments"], state["training"]):
        assert {name: told[name] for name in chosen} == chosen
    command("--data", "mnist5k", "--out", tmp_path, "--resume", "--steps", 90)
    assert checkpoint.read_training(checkpoint.latest_checkpoint(tmp_path))[1]["training"]["warmup"] == 2
    assert [warmup_for(steps) for steps in (1, 9, 10, 500, 5000, 10**6)] == [0, 0, 1, 50, 500, 500]


def test_run_older_than_an_option_resumes_with_its_default_of_then(tmp_path):
    then = (*TINY, "--timestep-sampling", "uniform")
    command(*then, "--steps", 6, "--out", tmp_path / "straight")
    out = tmp_path / "old"
    command(*then, "--steps", 3, "--out", out)
    state = checkpoint.latest_checkpoint(out)
    tensors, meta = checkpoint.read_training(state)
    assert not any(name.startswith("timesteps.") for name in tensors)
    for name in ("zero_terminal_snr", "loss", "loss_weighting", "timestep_sampling"):
        del meta["arguments"][name]
    checkpoint.save_training(state, tensors, meta)

    resume = ["--data", "mnist5k", "--out", out, "--resume", "--steps", 6]
    other = command(*resume, "--timestep-sampling", "stratified", check=False)
    assert other.exit_code == 2 and "--timestep-sampling stratified differs from the uniform" in other.stderr
    command(*resume)
    a, b = (weights(checkpoint.latest_checkpoint(folder)) for folder in (tmp_path / "straight", out))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("options", "classes"), [([], 10), (["--classes"], 10), (["--no-classes"], 0)], ids=["if any", "yes", "no"]
)
def test_conditioning_follows_the_labels_unless_told_otherwise(tmp_path, options, classes):
    command(*TINY, "--steps", 1, "--out", tmp_path, *options)
    assert checkpoint.load_model(tmp_path / "model.safetensors").model.config.num_classes == classes


@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (64, 16), (32, 8), (50, 10), (6, 1), (2, 1)])
def test_norm_groups(channels, groups):
    assert training_setup.norm_groups(channels) == groups


def test_broken_file_is_named_and_skipped_or_stops_the_run(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.new("L", (16, 16), 60 * i).save(pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"not a picture")
    tiny = [*TINY, f"--data={pictures}", "--batch-size=2", "--steps=1"]
    run = command(*tiny, "--out", tmp_path / "run")
    assert "broken.png" in run.stdout and "4 images 1x16x16" in run.stdout
    strict = command(*tiny, "--out", tmp_path / "strict", "--strict", check=False)
    assert strict.exit_code == 2 and "broken.png" in strict.stderr
