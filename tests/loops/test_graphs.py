"""Sampling from replayed graphs gives the eager loop's images bit for bit. Recordings, which a machine without a GPU
can make, take the place of CUDA graphs (support/recording.py). What needs a GPU is in test_gpu_loops.py."""

import gc
import logging
import threading
import weakref

import pytest
import torch
from support.networks import random_unet
from support.recording import READS_BACK, DeviceGenerator, NoSync, RecordingGraph

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops import editing, graphs
from ddpm_fast.loops.sampling import sample
from ddpm_fast.nn import UNet, derived
from ddpm_fast.nn.derived import Derives
from ddpm_fast.schedule import Schedule

CPU = torch.device("cpu")
FIXED = GaussianDiffusion(Schedule.cosine(50), prediction="v", variance="fixed_small")
LEARNED = GaussianDiffusion(Schedule.cosine(50), prediction="v", variance="learned_range", loss="hybrid")


def network(learned_variance=False):
    return random_unet(
        image_size=8,
        in_channels=2,
        model_channels=8,
        channel_mult=(1, 2),
        num_classes=3,
        norm_groups=4,
        learned_variance=learned_variance,
    )


def both(recording, model, diffusion, n, **options):
    """The images of the eager loop and of the replayed one, and the captures and replays that the latter took."""
    eager = sample(model, diffusion, n, **options, cuda_graph=False)
    before = recording.captures, recording.replays
    replayed = sample(model, diffusion, n, **options)
    return eager, replayed, recording.captures - before[0], recording.replays - before[1]


def change(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


OPTIONS = {
    "plain": {},
    "guidance": {"guidance": 3.0},
    "guidance 0": {"guidance": 0},
    "rescaled guidance": {"guidance": 3.0, "guidance_rescale": 0.7},
    "dynamic threshold": {"guidance": 4.0, "dynamic_threshold": 0.9},
    "unclipped": {"clip": False},
}
SAMPLERS = ["ddpm", "ddim", "dpmpp_1", "dpmpp_2m", "dpmpp_2m_sde"]


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed variance", "learned variance"])
@pytest.mark.parametrize("word", OPTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_replayed_loop_is_the_eager_one_bit_for_bit(recording, sampler, word, learned, dtype):
    model, diffusion = network(learned).to(dtype), LEARNED if learned else FIXED
    options = {"sampler": sampler, "steps": 6, **OPTIONS[word]}
    first = {"labels": [0, 1, 2], "seed": 3, **options}
    eager, replayed, captures, replays = both(recording, model, diffusion, 3, **first)
    assert torch.equal(eager, replayed)
    assert (captures, replays) == (1, 4), "two rows run as a warm-up; the others are replayed"

    # The graph that is there already, for everything that may differ between two calls.
    second = {"labels": [2, 2, 0], "seed": 2**63 + 5, "first_sample_id": 2**40, **options}
    other, replayed, captures, replays = both(recording, model, diffusion, 3, **second)
    assert torch.equal(other, replayed) and not torch.equal(other, eager)
    assert (captures, replays) == (0, 6)
    change(model)
    changed, replayed, captures, replays = both(recording, model, diffusion, 3, **second)
    assert torch.equal(changed, replayed) and not torch.equal(changed, other)
    assert (captures, replays) == (0, 6)


def test_a_smaller_last_batch_and_other_steps_have_graphs_of_their_own(recording):
    model = network()
    options = {"labels": 1, "steps": 5, "batch_size": 3}
    eager, replayed, captures, replays = both(recording, model, FIXED, 8, **options)
    assert torch.equal(eager, replayed)
    # 3, 3 and 2 samples: the second batch is replayed from its first row on.
    assert (captures, replays) == (2, 3 + 5 + 3)
    assert both(recording, model, FIXED, 8, **options)[2:] == (0, 15)
    eager, replayed, captures, _ = both(recording, model, FIXED, 8, labels=1, steps=6, batch_size=3)
    assert torch.equal(eager, replayed) and captures == 2
    # The timesteps and coefficients are not in the graph: the same number of others needs no new one.
    eager, replayed, captures, _ = both(recording, model, FIXED, 8, **options, spacing="quadratic")
    assert torch.equal(eager, replayed) and captures == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_inpainting_with_its_jumps(recording, sampler, dtype):
    model = network().to(dtype)
    generator = torch.Generator().manual_seed(1)
    for n, replays in ((3, None), (3, 14 + 4)):  # the second time on graphs that are there
        images = torch.rand(n, 2, 8, 8, generator=generator) * 2 - 1
        mask = torch.rand(8, 8, generator=generator) < 0.5
        options = {"steps": 6, "resamplings": 3, "jump_length": 2, "labels": 2, "sampler": sampler}
        eager = editing.inpaint(model, FIXED, images, mask, **options, cuda_graph=False)
        before = recording.replays
        assert torch.equal(eager, editing.inpaint(model, FIXED, images, mask, **options))
        assert torch.equal(eager[:, :, mask], images[:, :, mask])
        assert recording.captures == 2, "one graph for rows that ask and paste, one for jumps"
        if replays is not None:
            assert recording.replays - before == replays


@pytest.mark.parametrize(
    "edit",
    [
        lambda model, images, **o: editing.image_to_image(model, FIXED, images, 0.7, steps=10, labels=1, **o),
        lambda model, images, **o: editing.interpolate(model, FIXED, *images[:2], 4, steps=10, **o),
        lambda model, images, **o: editing.interpolate(
            model, FIXED, *images[:2], 4, sampler="ddim", steps=8, labels=1, **o
        ),
        lambda model, images, **o: editing.encode(model, FIXED, images, 8, [0, 1, 2], **o),
        lambda model, images, **o: editing.decode(model, FIXED, 3 * images, 8, [0, 1, 2], **o),
    ],
    ids=["image_to_image", "interpolate", "interpolate, ddim", "encode", "decode"],
)
def test_editing(recording, edit):
    model = network()
    for seed in (1, 2):
        images = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        given = images.clone()
        eager = edit(model, images, cuda_graph=False)
        captured, before = recording.captures, recording.replays
        assert torch.equal(eager, edit(model, images))
        assert recording.replays > before and (recording.captures == captured) == (seed == 2)
        assert torch.equal(images, given), "the caller's images were written to"


class OwnNetwork(torch.nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.weight, self.own, self.gain = torch.nn.Parameter(torch.tensor(0.3)), forward, 1.0

    def forward(self, x, t):
        return self.own(self, x, t)


def drawn(model, **options):
    return sample(model, FIXED, 2, shape=(1, 3), steps=6, **options)


def test_the_recording_catches_what_python_changes_between_steps(recording):
    """The tests here can fail: a network that counts its calls is replayed with the count of its capture."""
    calls = []

    def counting(self, x, t):
        calls.append(1)
        return x * self.weight * (len(calls) % 6)

    eager = drawn(OwnNetwork(counting), cuda_graph=False)
    assert not torch.equal(eager, drawn(OwnNetwork(counting)))
    assert recording.captures == 1


def test_copying_from_the_host_or_waiting_for_the_device_stops_a_recording():
    for wait in (torch.Tensor.item, lambda x: torch.tensor(1.0) + x):
        with pytest.raises(RuntimeError, match=r"waits for the device|copies from the host"):
            RecordingGraph(graphs.Pool(CPU)).capture(lambda wait=wait: wait(torch.ones(())))


def test_weights_that_moved_and_attributes_that_changed_are_captured_anew(recording):
    model = OwnNetwork(lambda self, x, t: x * self.weight * self.gain)

    def move():
        model.weight = torch.nn.Parameter(torch.tensor(0.4))

    def set_gain():
        model.gain = 0.5

    for captures, what in enumerate((lambda: None, move, set_gain, model.double), 1):
        what()
        for _ in range(2):
            assert torch.equal(drawn(model, cuda_graph=False), drawn(model))
            assert recording.captures == captures


def test_a_change_of_torchs_settings_is_captured_anew(recording):
    model, before = OwnNetwork(lambda self, x, t: x * self.weight), torch.backends.cudnn.benchmark
    drawn(model)
    try:
        torch.backends.cudnn.benchmark = not before
        drawn(model)
    finally:
        torch.backends.cudnn.benchmark = before
    assert recording.captures == 2


class Doubled(Derives):
    """A network that derives twice its weight, and counts how often."""

    def __init__(self):
        super().__init__()
        self.weight, self.counts = torch.nn.Parameter(torch.tensor(0.3)), []

    def derive(self):
        self.counts.append(1)
        return (2 * self.weight,)

    def forward(self, x, t):
        return x * self.derived()[0]


def test_what_is_derived_from_weights_is_computed_once_a_loop_and_read_by_graphs(recording, monkeypatch):
    monkeypatch.setattr(derived, "is_fused", lambda parameter: True)  # as on a GPU
    model, images = Doubled(), torch.zeros(2, 1, 3)
    for loops, act in enumerate(
        (
            lambda: drawn(model, cuda_graph=False),
            lambda: drawn(model),
            lambda: drawn(model),
            lambda: drawn(model, batch_size=1),
            lambda: editing.encode(model, FIXED, images, 4),
            lambda: FIXED.bits_per_dim(model, images, steps=4),
        ),
        1,
    ):
        act()
        assert len(model.counts) == loops
    expected = drawn(OwnNetwork(lambda self, x, t: x * (2 * self.weight)))
    assert torch.equal(drawn(model), expected)
    change(model)
    captures = recording.captures
    changed = drawn(model)
    assert torch.equal(changed, drawn(model, cuda_graph=False)) and not torch.equal(changed, expected)
    assert recording.captures == captures


def test_few_graphs_are_kept_and_none_outlives_its_model(recording):
    model = network()
    for n in range(1, 8):
        sample(model, FIXED, n, steps=3)
    assert recording.captures == 7 and len(graphs._replays[model]._kept) == graphs.KEPT_REPLAYS
    sample(model, FIXED, 7, steps=3)
    assert recording.captures == 7
    sample(model, FIXED, 1, steps=3)
    assert recording.captures == 8
    replays, gone = weakref.ref(graphs._replays[model]), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and replays() is None


@pytest.mark.parametrize("options", [{}, {"sampler": "dpmpp_2m"}, {"dynamic_threshold": 0.5}], ids=str)
def test_on_step_gets_tensors_that_stay_and_does_not_change_the_images(recording, options):
    model, eager, replayed = network(), [], []
    images = [
        sample(model, FIXED, 2, steps=6, on_step=eager.append, cuda_graph=False, **options),
        sample(model, FIXED, 2, steps=6, on_step=replayed.append, **options),
    ]
    assert recording.replays == 4 and len(replayed) == 6
    images += [sample(model, FIXED, 2, steps=6, cuda_graph=cuda_graph, **options) for cuda_graph in (False, None)]
    assert all(torch.equal(images[0].view(torch.int32), other.view(torch.int32)) for other in images[1:])
    for a, b in zip(eager, replayed, strict=True):
        assert a[:3] == b[:3] and torch.equal(a.x, b.x) and torch.equal(a.x0, b.x0)
    assert not torch.equal(replayed[-1].x, replayed[-2].x) and not torch.equal(replayed[-1].x0, replayed[-2].x0)


def test_a_callback_may_sample_from_the_same_model(recording):
    model, inner = network(), []
    expected = [sample(model, FIXED, 2, steps=6, seed=seed, cuda_graph=False) for seed in (0, 1)]
    outer = sample(model, FIXED, 2, steps=6, on_step=lambda *_: inner.append(sample(model, FIXED, 2, steps=6, seed=1)))
    assert torch.equal(outer, expected[0])
    assert all(torch.equal(x, expected[1]) for x in inner) and recording.replays > 6


def test_another_thread_draws_without_the_graphs_that_are_in_use(recording):
    model, found = network(), []
    expected = [sample(model, FIXED, 2, steps=6, seed=seed, cuda_graph=False) for seed in (0, 1)]

    def other():
        found.append(sample(model, FIXED, 2, steps=6, seed=1))

    def on_step(step):
        if step.index == 4:
            before = recording.replays
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert recording.replays == before

    assert torch.equal(sample(model, FIXED, 2, steps=6, on_step=on_step), expected[0])
    assert torch.equal(found[0], expected[1])


def waiting(self, x, t):
    return x * self.weight * max(0.1, (t[0] / 50).item())


def test_a_network_that_cannot_be_captured_is_called_as_before(recording, caplog):
    model = OwnNetwork(waiting)
    with caplog.at_level(logging.INFO, "ddpm_fast.graphs"):
        assert torch.equal(drawn(model, cuda_graph=False), drawn(model))
        assert torch.equal(drawn(model, cuda_graph=False), drawn(model))
    assert "its capture failed" in caplog.text and "waits for the device" in caplog.text
    assert recording.captures == 2, "one that failed, and one that tells the generator so; they are not repeated"
    for asked in (model, OwnNetwork(waiting)):
        with pytest.raises(InputError, match=r"no graph can be captured: its capture failed.*Leave cuda_graph out"):
            drawn(asked, cuda_graph=True)
    sample(model, FIXED, 3, shape=(1, 3), steps=6)
    assert recording.captures == 4, "of a model that failed no other shape is tried"


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which pytest would take for its own."""


def interrupted(self, x, t):
    if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:  # while it is recorded
        raise Interrupted
    return x * self.weight


def test_random_numbers_and_other_graphs_go_on_after_a_capture_that_failed(recording):
    other = OwnNetwork(lambda self, x, t: x * self.weight)
    expected = drawn(other)
    for forward, failure in ((waiting, InputError), (interrupted, Interrupted)):
        with pytest.raises(failure):
            drawn(OwnNetwork(forward), cuda_graph=True)
        with DeviceGenerator(recording):
            assert torch.randn(3).isfinite().all()
            assert torch.nn.functional.dropout(torch.ones(8), 0.5).sum() >= 0
        before = recording.replays, recording.captures
        assert torch.equal(drawn(other), expected)
        assert (recording.replays - before[0], recording.captures - before[1]) == (6, 0)


def test_the_recording_keeps_the_generator_in_capture_after_a_failure(recording):
    """The test above can fail: without another capture nothing random and no replay works."""
    place = torch.zeros(1)
    graph = recording(None)
    graph.capture(place.zero_)
    with pytest.raises(RuntimeError, match="waits for the device"):
        recording(None).capture(place.item)
    for act in (graph.replay, lambda: torch.randn(3), lambda: torch.nn.functional.dropout(place, 0.5)):
        with DeviceGenerator(recording), pytest.raises(RuntimeError, match="outside graph capture"):
            act()


def test_a_network_seen_waiting_is_not_captured_at_all(recording, monkeypatch):
    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in READS_BACK:
                raise RuntimeError("called a synchronizing CUDA operation")
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(graphs, "_no_waiting", Watching)
    model = OwnNetwork(waiting)
    assert torch.equal(drawn(model, cuda_graph=False), drawn(model))
    assert recording.captures == 0
    with pytest.raises(InputError, match=r"the network waits for the device, in \.item"):
        drawn(OwnNetwork(waiting), cuda_graph=True)

    def broken(self, x, t):
        raise RuntimeError("of the network's own")

    with pytest.raises(RuntimeError, match="of the network's own"):
        drawn(OwnNetwork(broken))


def test_without_cuda_a_graph_that_is_asked_for_is_an_error_and_nothing_is_drawn():
    model, steps = network(), []
    options = {"steps": 3, "on_step": lambda *_: steps.append(1)}
    with pytest.raises(
        InputError, match=r"the network is on cpu, and CUDA graphs are for CUDA devices.*Leave cuda_graph out"
    ):
        sample(model, FIXED, 2, **options, cuda_graph=True)
    images = torch.zeros(2, 2, 8, 8)
    for edit in (editing.image_to_image, editing.encode, editing.decode):
        with pytest.raises(InputError, match="the network is on cpu"):
            edit(model, FIXED, images, cuda_graph=True)
    assert not steps
    assert torch.equal(*(sample(model, FIXED, 2, steps=3, cuda_graph=choice) for choice in (None, False)))


def test_reasons_on_a_gpu(monkeypatch):
    cuda, model = torch.device("cuda", 0), OwnNetwork(waiting)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert graphs.cannot_capture(cuda) == ""
    assert "on several devices, cpu" in graphs.cannot_capture(cuda, model)
    lazy = torch.nn.ParameterList([torch.nn.UninitializedParameter()])
    assert "of the type UninitializedParameter" in graphs.cannot_capture(cuda, lazy)
    model.register_forward_hook(lambda *_: None)
    assert "forward hooks" in graphs.cannot_capture(cuda, model)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
        assert "autocast is active" in graphs.cannot_capture(cuda)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "being captured already" in graphs.cannot_capture(cuda)


@pytest.mark.parametrize("word", OPTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_eager_loop_never_waits_for_the_device(monkeypatch, sampler, word):
    monkeypatch.setattr(UNet, "_check", lambda *_: None)  # looks at labels, on the CPU alone
    guard, steps = NoSync(), []

    def on_step(step):
        if not steps:
            guard.__enter__()
        steps.append(step.index)

    try:
        sample(network(), FIXED, 5, sampler=sampler, steps=4, labels=1, batch_size=3, on_step=on_step, **OPTIONS[word])
    finally:
        guard.__exit__(None, None, None)
    assert steps == [0, 1, 2, 3] * 2
