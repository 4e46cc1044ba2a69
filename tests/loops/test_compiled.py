"""Networks called through torch.compile give the same images and weights to rounding, by the same names.

Backends that need no compiler take inductor's place: one that runs what was traced, and "aot_eager", which also splits
it into PyTorch's smallest operations and makes the backward pass. test_gpu_loops.py has inductor itself.
"""

import gc
import weakref

import pytest
import torch
from support.networks import random_unet
from support.train_command import command, meta, pictures, start, weights
from typer.testing import CliRunner

from ddpm_fast.commands import sample as sample_command
from ddpm_fast.data import Dataset
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops import compiled, editing
from ddpm_fast.loops.sampling import sample
from ddpm_fast.loops.training import MODEL_NAME, TrainConfig, Trainer
from ddpm_fast.nn import UNetConfig
from ddpm_fast.schedule import Schedule

CPU = torch.device("cpu")
DIFFUSION = GaussianDiffusion(Schedule.cosine(50), prediction="v", variance="learned_range", loss="hybrid")


@pytest.fixture
def use(monkeypatch):
    """use(backend) compiles with this backend from here on."""
    real = torch.compile
    compiled.check_compiler.cache_clear()

    def use(backend):
        def compile(function, *, dynamic, options):
            assert options == {"fallback_random": True}
            return real(function, dynamic=dynamic, backend=backend)

        monkeypatch.setattr(torch, "compile", compile)

    yield use
    compiled.check_compiler.cache_clear()


@pytest.fixture
def traced(use):
    """The graphs that were traced so far, without the one that tries whether anything can be compiled."""
    found = []

    def run_as_it_is(graph, inputs):
        found.append(graph)
        return graph.forward

    use(run_as_it_is)
    compiled.check_compiler(CPU)
    found.clear()
    return found


class OwnNetwork(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t):
        return x * self.weight * torch.cos(t)[:, None, None]


def drawn(model, n=2, **options):
    return sample(model, GaussianDiffusion(Schedule.cosine(50)), n, shape=(1, 3), steps=6, **options)


def test_images_are_the_same_to_rounding_and_nothing_is_left_at_the_model(use):
    use("aot_eager")
    # Tracing takes a second for each few blocks, so there is one level, with attention in the middle.
    model = random_unet(
        image_size=8, in_channels=2, model_channels=8, channel_mult=(1,), num_classes=3, norm_groups=4,
        learned_variance=True,
    )  # fmt: skip
    before = list(model.state_dict()), {name: vars(module).copy() for name, module in model.named_modules()}
    options = {"steps": 4, "labels": [0, 1, 2], "guidance": 3.0, "guidance_rescale": 0.5}
    expected = sample(model, DIFFUSION, 3, **options)
    found = sample(model, DIFFUSION, 3, **options, compile=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert before == (list(model.state_dict()), {name: vars(module) for name, module in model.named_modules()})
    assert torch.equal(sample(model, DIFFUSION, 3, **options), expected), "without compile it is called as ever"


def test_many_batch_sizes_are_compiled_once_each(traced):
    """PyTorch gives up on a function at the ninth compilation."""
    model, sizes = OwnNetwork(), range(1, 13)
    for _ in range(2):
        for n in sizes:
            torch.testing.assert_close(drawn(model, n, compile=True), drawn(model, n))
        assert len(traced) == len(sizes)


def test_what_was_compiled_goes_with_its_model(traced):
    model = OwnNetwork()
    drawn(model, compile=True)
    gone, kept = weakref.ref(model), len(compiled._compiled)
    del model
    gc.collect()
    assert gone() is None and len(compiled._compiled) == kept - 1


def test_weights_that_change_are_seen(traced):
    model = OwnNetwork()
    drawn(model, compile=True)
    with torch.no_grad():
        model.weight.mul_(0.5)
    torch.testing.assert_close(drawn(model, compile=True), drawn(model))
    assert len(traced) == 1
    torch.testing.assert_close(drawn(model.double(), compile=True), drawn(model))


def test_graphs_of_the_compiled_network_are_others(recording, traced):
    """Only counted here: PyTorch compiles nothing and calls nothing compiled while its operations are recorded, so that
    this recording holds the network as it is."""
    model = OwnNetwork()
    plain = drawn(model)
    before = recording.captures, recording.replays
    for replays in (4, 10):
        torch.testing.assert_close(drawn(model, compile=True), plain)
        assert (recording.captures - before[0], recording.replays - before[1]) == (1, replays)
    assert torch.equal(drawn(model), plain)
    assert recording.captures - before[0] == 1, "the graph of the network as it is was kept"


def test_editing_takes_it_too(traced):
    model, images = OwnNetwork(), torch.zeros(2, 1, 3)
    diffusion = GaussianDiffusion(Schedule.cosine(50))
    found = editing.encode(model, diffusion, images, 3, compile=True)
    torch.testing.assert_close(found, editing.encode(model, diffusion, images, 3))
    assert len(traced) == 1


# What cannot be compiled


def without_a_compiler(graph, inputs):
    raise RuntimeError("No working C++ compiler found")


def test_a_missing_compiler_is_found_before_anything_is_done(use):
    use(without_a_compiler)
    steps = []
    for act in (
        lambda: drawn(OwnNetwork(), compile=True, on_step=steps.append),
        lambda: trainer(compile=True),
    ):
        with pytest.raises(InputError, match=r"compile is on.*No working C\+\+ compiler found.*go without compile"):
            act()
    assert not steps


def test_a_network_that_cannot_be_compiled_says_so_at_its_first_row(traced, use):
    use(without_a_compiler)  # not asked about the device again
    with pytest.raises(InputError, match=r"torch\.compile failed"):
        drawn(OwnNetwork(), compile=True)


def test_other_errors_stay_what_they_are(traced):
    class Broken(OwnNetwork):
        def forward(self, x, t):
            raise NotImplementedError("of the network's own")

    with pytest.raises(NotImplementedError, match="of the network's own"):
        drawn(Broken(), compile=True)


# Training


def trainer(**options):
    diffusion = GaussianDiffusion(Schedule.cosine(100))
    network = UNetConfig(
        image_size=8, in_channels=3, model_channels=8, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), num_classes=3, norm_groups=4, dropout=0.3,
    )  # fmt: skip
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = Dataset(images, torch.arange(20) % 3, None, "random")
    return Trainer(network, diffusion, TrainConfig(batch_size=8, warmup=2, label_drop=0.3), dataset, CPU, **options)


def test_training_is_the_same_to_rounding(use, tmp_path):
    """With dropout: the compiled network draws the same numbers for it."""
    use("aot_eager")
    subjects = trainer(), trainer(compile=True)
    for _ in range(4):
        torch.testing.assert_close(*(torch.stack(subject.train_step()) for subject in subjects), rtol=1e-4, atol=1e-5)
    a, b = (weights(subject.save(tmp_path / str(i), {}).parent) for i, subject in enumerate(subjects))
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max().item() for name in a if name.startswith("model.")) < 1e-4


def test_the_commands_take_it_and_a_run_may_be_resumed_without_it(traced, tmp_path):
    data, out = pictures(tmp_path / "data", ["cat"]), tmp_path / "out"
    start(data, out, "--steps=2", "--compile")
    compiled_so_far = len(traced)
    assert compiled_so_far > 0 and meta(out)["arguments"]["compile"]
    command("--out", out, "--resume", "--steps=3", "--no-compile")
    assert len(traced) == compiled_so_far and not meta(out)["arguments"]["compile"]
    command("--out", out, "--resume", "--steps=4", "--compile")
    assert len(traced) > compiled_so_far and meta(out)["step"] == 4

    compiled_so_far = len(traced)
    for option in ([], ["--compile"]):
        arguments = ["--model", out / MODEL_NAME, "--n=2", "--steps=2", "--device=cpu", "--out", tmp_path / "x.png"]
        run = CliRunner().invoke(sample_command.app, [*map(str, arguments), *option], catch_exceptions=False)
        assert run.exit_code == 0 and len(traced) == compiled_so_far + len(option)
