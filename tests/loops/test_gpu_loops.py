"""On a GPU, no loop waits for the device, and replayed CUDA graphs give the eager loops' numbers bit for bit."""

import gc

import pytest
import torch
import torch.nn.functional as F
from support import two_ranks
from support.networks import random_classifier, random_unet

from ddpm_fast.commands.training.averaged import Averaged
from ddpm_fast.commands.training.grid import Grids
from ddpm_fast.data import Dataset
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.loops import editing, graphs, training_step
from ddpm_fast.loops.metrics import Metrics
from ddpm_fast.loops.sampling import sample
from ddpm_fast.loops.training import TrainConfig, Trainer
from ddpm_fast.nn import UNetConfig
from ddpm_fast.schedule import Schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
CUDA = torch.device("cuda", 0)
FIXED = GaussianDiffusion(Schedule.cosine(50), prediction="v", variance="fixed_small")
LEARNED = GaussianDiffusion(Schedule.cosine(50), prediction="v", variance="learned_range", loss="hybrid")
SAMPLERS = ["ddpm", "ddim", "dpmpp_1", "dpmpp_2m", "dpmpp_2m_sde"]
OPTIONS = {
    "plain": {},
    "guidance": {"guidance": 3.0, "guidance_rescale": 0.7},
    "dynamic threshold": {"guidance": 4.0, "dynamic_threshold": 0.9},
}


@pytest.fixture
def replays(monkeypatch):
    """How often a graph was replayed so far."""
    count = 0

    class Counted(graphs.CudaGraph):
        def replay(self):
            nonlocal count
            count += 1
            super().replay()

    monkeypatch.setattr(graphs, "CudaGraph", Counted)
    return lambda: count


@pytest.fixture
def no_sync():
    """Called, makes whatever waits for the GPU an error for the rest of the test."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@pytest.fixture(autouse=True)
def same_kernels_every_time():
    """cuDNN's backward passes may add in any order otherwise."""
    cudnn = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, True
    yield
    cudnn.deterministic = before


def network(learned_variance=False, dtype=torch.float32):
    model = random_unet(
        image_size=16,
        in_channels=3,
        model_channels=32,
        channel_mult=(1, 2),
        attention_resolutions=(8,),
        num_classes=3,
        norm_groups=8,
        learned_variance=learned_variance,
    )
    return model.to(CUDA, dtype)


def test_the_guard_against_waiting_works(no_sync):
    x = torch.ones(3, device=CUDA)
    no_sync()
    with pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


# Sampling


@pytest.mark.pairwise
@pytest.mark.parametrize("cuda_graph", [False, None], ids=["eager", "graph"])
@pytest.mark.parametrize("word", OPTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_never_waits(no_sync, sampler, word, cuda_graph):
    model = network(dtype=torch.bfloat16)
    options = {"sampler": sampler, "steps": 5, "batch_size": 2, "labels": 1, **OPTIONS[word], "cuda_graph": cuda_graph}
    sample(model, FIXED, 6, **options)  # compiles, captures
    sample(model, FIXED, 6, **options, on_step=lambda step: no_sync())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("sampler", "learned"), [("ddpm", False), ("ddpm", True), ("dpmpp_2m", False)])
def test_a_classifiers_gradient_is_replayed_with_the_row_bit_for_bit(replays, no_sync, sampler, learned, dtype):
    model, diffusion = network(learned, dtype), LEARNED if learned else FIXED
    fields = {"image_size": 16, "model_channels": 32, "channel_mult": (1, 2), "norm_groups": 8}
    classifier = random_classifier(**fields).to(CUDA, dtype)
    given = {"sampler": sampler, "steps": 6, "labels": [0, 2], "classifier": classifier, "classifier_scale": 2.0}
    eager = sample(model, diffusion, 2, **given, cuda_graph=False)
    assert torch.equal(sample(model, diffusion, 2, **given, cuda_graph=True), eager) and replays() == 4
    assert torch.equal(sample(model, diffusion, 2, **given, on_step=lambda step: no_sync()), eager)
    assert not torch.equal(eager, sample(model, diffusion, 2, **given | {"classifier_scale": 0.0}))


def test_an_upsamplers_image_is_read_by_the_graph(replays):
    model = random_unet(image_size=16, model_channels=32, channel_mult=(1, 2), norm_groups=8, condition_channels=3)
    model.to(CUDA)
    for condition in torch.linspace(-1, 1, 2 * 2 * 3 * 64).view(2, 2, 3, 8, 8):
        eager = sample(model, FIXED, 2, steps=6, condition=condition, cuda_graph=False)
        assert torch.equal(sample(model, FIXED, 2, steps=6, condition=condition), eager)
    assert replays() == 4 + 6


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed variance", "learned variance"])
@pytest.mark.parametrize("word", OPTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_from_a_graph_is_the_eager_loop_bit_for_bit(replays, sampler, word, learned, dtype):
    model, diffusion = network(learned, dtype), LEARNED if learned else FIXED
    options = {"sampler": sampler, "steps": 6, "batch_size": 4, **OPTIONS[word]}
    calls = [
        {"labels": [0, 1, 2, 0, 1, 2, 0], "seed": 3},
        {"labels": [2, 2, 2, 1, 1, 0, 0], "seed": 2**63 + 5, "first_sample_id": 2**40},
    ]
    eager = [sample(model, diffusion, 7, **call, **options, cuda_graph=False) for call in calls]
    assert replays() == 0 and not torch.equal(*eager)
    for call, expected, count in zip(calls, eager, (4 + 4, 6 + 6), strict=True):
        before = replays()
        assert torch.equal(sample(model, diffusion, 7, **call, **options, cuda_graph=True), expected)
        assert replays() - before == count
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    changed = sample(model, diffusion, 7, **calls[0], **options, cuda_graph=False)
    assert not torch.equal(changed, eager[0])
    assert torch.equal(sample(model, diffusion, 7, **calls[0], **options), changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inpainting_from_graphs(replays, dtype):
    model = network(dtype=dtype)
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1
        mask = torch.rand(16, 16, generator=generator) < 0.5
        options = {"steps": 6, "resamplings": 3, "jump_length": 2, "labels": 2, "sampler": "dpmpp_2m_sde"}
        eager = editing.inpaint(model, FIXED, images, mask, **options, cuda_graph=False)
        before = replays()
        assert torch.equal(editing.inpaint(model, FIXED, images, mask, **options, cuda_graph=True), eager)
        assert replays() > before


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_a_compiled_network_in_a_graph(replays, guidance):
    """The graph gives the compiled network's images bit for bit, and these are the network's to rounding."""
    model = network()
    options = {"steps": 8, "labels": [0, 1, 2], "guidance": guidance}
    plain = sample(model, FIXED, 3, **options)
    eager = sample(model, FIXED, 3, **options, compile=True, cuda_graph=False)
    before = replays()
    for count in (6, 6 + 8):
        assert torch.equal(sample(model, FIXED, 3, **options, compile=True, cuda_graph=True), eager)
        assert replays() - before == count
    torch.testing.assert_close(eager, plain, rtol=0, atol=2e-2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    changed = sample(model, FIXED, 3, **options)
    torch.testing.assert_close(sample(model, FIXED, 3, **options, compile=True), changed, rtol=0, atol=2e-2)
    assert not torch.allclose(changed, plain, rtol=0, atol=2e-2)


def test_a_graph_on_another_stream_waits_for_the_one_before(replays):
    model, stream = network(), torch.cuda.Stream(CUDA)
    eager = [sample(model, FIXED, 4, steps=20, seed=seed, cuda_graph=False) for seed in range(4)]
    found = []
    for seed in range(4):
        with torch.cuda.stream(stream if seed % 2 else torch.cuda.current_stream(CUDA)):
            found.append(sample(model, FIXED, 4, steps=20, seed=seed))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True)) and replays() > 0


class OwnNetwork(torch.nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.weight, self.own = torch.nn.Parameter(torch.tensor(0.3)), forward
        self.to(CUDA)

    def forward(self, x, t):
        return self.own(self, x, t)


def reading_back(self, x, t):
    return x * self.weight * max(0.1, (t[0] / 50).item())


def synchronizing(self, x, t):
    torch.cuda.synchronize()
    return x * self.weight


def failing_in_capture(self, x, t):
    """Waits where nothing watches it, so that CUDA itself ends the capture."""
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(CUDA).synchronize()
    return x * self.weight


@pytest.mark.parametrize("forward", [reading_back, synchronizing])
def test_a_network_that_waits_is_called_as_before_and_leaves_others_their_graphs(replays, forward):
    options, stream = {"steps": 8, "shape": (3, 4)}, torch.cuda.current_stream(CUDA)
    model = OwnNetwork(forward)
    eager = sample(model, FIXED, 2, **options, cuda_graph=False)
    for _ in range(2):
        assert torch.equal(sample(model, FIXED, 2, **options), eager)
    with pytest.raises(InputError, match="no graph can be captured"):
        sample(OwnNetwork(forward), FIXED, 2, **options, cuda_graph=True)
    assert replays() == 0 and torch.cuda.current_stream(CUDA) == stream
    other = OwnNetwork(lambda self, x, t: x * self.weight)
    assert torch.equal(
        sample(other, FIXED, 2, **options, cuda_graph=True), sample(other, FIXED, 2, **options, cuda_graph=False)
    )
    assert replays() == 6


@pytest.mark.parametrize("random", [torch.randn, lambda *size, device: F.dropout(torch.ones(size, device=device))])
def test_random_numbers_and_other_graphs_go_on_after_a_capture_that_failed(replays, random):
    """The random numbers are those that they would have been without the failure."""
    options = {"steps": 8, "shape": (3, 4)}
    other = OwnNetwork(lambda self, x, t: x * self.weight)
    expected = sample(other, FIXED, 2, **options, cuda_graph=True)
    torch.manual_seed(3)
    numbers = [random(64, device=CUDA) for _ in range(2)]

    torch.manual_seed(3)
    assert torch.equal(random(64, device=CUDA), numbers[0])
    with pytest.raises(InputError, match="its capture failed"):
        sample(OwnNetwork(failing_in_capture), FIXED, 2, **options, cuda_graph=True)
    assert torch.equal(random(64, device=CUDA), numbers[1])
    before = replays()
    assert torch.equal(sample(other, FIXED, 2, **options, cuda_graph=True), expected)
    assert replays() - before == 8
    torch.cuda.empty_cache()


def test_training_goes_on_after_a_capture_that_failed(replays):
    """With dropout, in a graph whose replays take their random numbers from the generator that was in the capture."""
    subjects = [trainer(None), trainer(False)]
    for step in range(8):
        if step == 5:
            with pytest.raises(InputError, match="its capture failed"):
                sample(OwnNetwork(failing_in_capture), FIXED, 2, steps=4, shape=(3, 4), cuda_graph=True)
        replayed, eager = (torch.stack(subject.train_step()) for subject in subjects)
        assert replayed.isfinite().all()
        torch.testing.assert_close(replayed, eager, rtol=1e-3, atol=1e-5)
    assert replays() == 6


def test_autocast_is_eager_and_says_so():
    model = network()
    with torch.autocast("cuda", torch.bfloat16):
        expected = sample(model, FIXED, 2, steps=5, cuda_graph=False)
        assert torch.equal(sample(model, FIXED, 2, steps=5), expected)
        with pytest.raises(InputError, match="autocast is active"):
            sample(model, FIXED, 2, steps=5, cuda_graph=True)


def test_graphs_give_their_memory_back():
    allocated = []
    for _ in range(4):
        model = network()
        for n in range(1, 10):
            sample(model, FIXED, n, steps=4, cuda_graph=True)
        del model
        gc.collect()
        allocated.append(torch.cuda.memory_allocated(CUDA))
    # The first time cuBLAS makes its workspaces, which stay.
    assert max(allocated[1:]) - allocated[0] < 2**20


# Training


KINDS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "learned variance, importance sampling": {
        "diffusion": GaussianDiffusion(Schedule.cosine(4), variance="learned_range", loss="hybrid"),
        "timestep_sampling": "loss_second_moment",
    },
    "bound, stratified": {
        "diffusion": GaussianDiffusion(Schedule.cosine(100), loss="rescaled_vlb"),
        "timestep_sampling": "stratified",
    },
    "two micro-batches": {"precision": "bf16", "timestep_sampling": "loss_second_moment", "micro_batch": 4},
}


def trainer(cuda_graph, diffusion=None, compile=False, **options):
    """With every source of randomness in use: dropout, dropped labels, flips."""
    diffusion = diffusion or GaussianDiffusion(Schedule.cosine(100))
    config = TrainConfig(**{"batch_size": 8, "warmup": 5, "flip": True, "label_drop": 0.3, **options})
    network = UNetConfig(
        image_size=16, in_channels=3, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(), num_classes=3, norm_groups=8, dropout=0.2,
        learned_variance=diffusion.objective.learned,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8, generator=generator)
    dataset = Dataset(images, torch.arange(50) % 3, None, "random")
    return Trainer(network, diffusion, config, dataset, CUDA, cuda_graph, compile)


@pytest.mark.parametrize("cuda_graph", [False, None], ids=["eager", "graph"])
@pytest.mark.parametrize("word", KINDS)
def test_training_never_waits(no_sync, word, cuda_graph):
    subject, metrics = trainer(cuda_graph, **KINDS[word]), Metrics(0)
    for _ in range(4):  # makes tables, captures
        metrics.add(*subject.train_step())
    metrics.look(wait=True)
    no_sync()
    looks = []
    for _ in range(6):
        metrics.add(*subject.train_step())
        looks += metrics.look(wait=False)
    assert sum(look.steps for look in looks) >= 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_a_compiled_network_in_a_graph(replays, precision):
    """With dropout, for which the compiled network draws the same numbers."""
    plain, compiled = (trainer(None, precision=precision, compile=compile) for compile in (False, True))
    tolerance = 1e-2 if precision == "fp32" else 0.1
    for step in range(8):
        expected, found = (torch.stack(subject.train_step()) for subject in (plain, compiled))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0, msg=f"step {step}: {found}, {expected}")
    assert replays() == 2 * 6


def test_training_in_fp16_from_a_graph_skips_an_overflow(no_sync):
    """Nothing of it waits for the GPU: neither the look for an overflow, nor what follows from it."""
    subjects = [trainer(cuda_graph, precision="fp16") for cuda_graph in (False, True)]
    for _ in range(4):
        [subject.train_step() for subject in subjects]
    before = [[p.detach().clone() for p in subject.model.parameters()] for subject in subjects]
    scales = [subject.loss_scale.scale.fill_(2.0**60) for subject in subjects]
    no_sync()
    results = [torch.stack(subject.train_step()) for subject in subjects]
    halved = [scale.clone() for scale in scales]
    after = [[p.detach().clone() for p in subject.model.parameters()] for subject in subjects]
    for scale in scales:
        scale.fill_(1024.0)
    good = [torch.stack(subject.train_step()) for subject in subjects]
    torch.cuda.set_sync_debug_mode("default")
    for (loss, norm), scale in zip(results, halved, strict=True):
        assert loss.isfinite() and not norm.isfinite() and scale == 2.0**59
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    torch.testing.assert_close(good[1], good[0], rtol=1e-2, atol=0)
    for subject, old in zip(subjects, after, strict=True):
        assert not torch.equal(next(subject.model.parameters()), old[0])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_with_copies_of_the_weights_is_that_of_autocast(monkeypatch, precision):
    """But for the order of sums: a library may take another algorithm for a weight that is cast and so packed. On a CPU
    it is the same bits (test_working_weights.py)."""
    found = []
    for copies in (True, False):
        monkeypatch.setattr(training_step, "copies_pay", lambda device, copies=copies: copies)
        subject = trainer(None, precision=precision)
        found.append(torch.stack([torch.stack(subject.train_step()) for _ in range(6)]))
    torch.testing.assert_close(*found, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_grids_of_a_run_are_drawn_from_one_graph(replays, tmp_path, precision):
    subject = trainer(None, precision=precision)
    grids = Grids(subject, Averaged(subject), tmp_path, pytest.fail)
    for grid, count in enumerate((2 + 48, 2 + 48 + 4 + 50)):  # 50 rows each, of which the first two warm up
        for _ in range(4):
            subject.train_step()
        grids.draw(lambda: None)
        assert replays() == count
        assert len(list(tmp_path.glob("samples-*.png"))) == grid + 1
    memory = torch.cuda.memory_allocated(CUDA)
    del grids
    gc.collect()
    assert torch.cuda.memory_allocated(CUDA) < memory, "the network of the grids outlives them"


@pytest.mark.parametrize("word", KINDS)
def test_training_from_a_graph_is_the_eager_one_bit_for_bit(replays, tmp_path, word):
    subjects = [trainer(cuda_graph, **KINDS[word]) for cuda_graph in (False, False, True)]
    for step in range(12):
        (first, again, replayed) = (torch.stack(subject.train_step()) for subject in subjects)
        if not torch.equal(first, again):
            pytest.skip(f"two eager runs differ at step {step}: a kernel here does not add in one order")
        assert torch.equal(first, replayed), step
    assert replays() == 10 * (3 if "micro_batch" in KINDS[word] else 1)
    states = [subject.save(tmp_path / str(i), {}) for i, subject in enumerate(subjects)]
    eager, again, graph = (checkpoint.read_training(state)[0] for state in states)
    assert eager.keys() == graph.keys()
    for name, value in eager.items():
        assert not torch.equal(value, again[name]) or torch.equal(value, graph[name]), name

    # The average can be sampled from in between, and a state loaded: the next steps are the same.
    sample(subjects[2].averaged_model(), subjects[2].diffusion, 2, steps=4)
    subjects[2].load(states[0])
    for _ in range(4):
        assert torch.equal(*(torch.stack(subject.train_step()) for subject in (subjects[0], subjects[2])))
    assert replays() > 10


def test_two_processes_on_one_gpu_train_what_one_does(tmp_path):
    """To rounding: a library's gradient of a convolution need not have the same bits twice."""
    two_ranks.start(tmp_path, "cuda")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in two_ranks.ON_A_GPU:
        parts = two_ranks.TRAININGS[name].get("micro_batch", two_ranks.BATCH // 2)
        alone = two_ranks.train(name, micro_batch=parts, device=CUDA)
        precise = {"rtol": 1e-3, "atol": 1e-5} if "bf16" not in name else {"rtol": 0.1, "atol": 1e-2}
        for one in found:
            torch.testing.assert_close(one[name]["metrics"], alone["metrics"], **precise)
            for key, value in alone["state"].items():
                if key.startswith(("model.", "ema.")):
                    torch.testing.assert_close(one[name]["state"][key], value, **precise)
