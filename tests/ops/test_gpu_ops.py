"""What only a GPU can show of its two backends: the CPU's bits for large inputs, the caller's stream and device, CUDA
graphs, no waiting for the device, sizes beyond 32 bits, and clear errors. On a GPU, test_ops*.py also test the ops'
numbers there.
"""

import math

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.objective import Objective
from ddpm_fast.ops import (
    LabelDrop,
    diffusion_loss,
    draw_timesteps,
    dropout,
    hybrid_loss,
    normal,
    q_sample,
    record_losses,
    reverse_step,
    use_backend,
    vlb_terms,
)
from ddpm_fast.schedule import Schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SCHEDULE = Schedule.cosine(1000)
TABLES = {
    "q": SCHEDULE.q_sample_table().float(),
    "loss": Objective("v").loss_table(SCHEDULE).float(),
    "hybrid": Objective("v", "learned_range", "hybrid").hybrid_table(SCHEDULE).float(),
    "bound": Objective("v", "learned_range", "vlb").bound_table(SCHEDULE, True, "exact").float(),
    "step": torch.tensor([[1.25, -0.75, 0.5, 0.4, 0.0, 0.2, 1.0, 0.35], [0.9, -0.3, 0.3, 0.7, 0.2, 0.1, 1.0, 0.0]]),
}


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    with use_backend(request.param):
        yield request.param


class Batch:
    """Operands of every op on a device, from the CPU's generator."""

    def __init__(self, device, shape=(16, 3, 32, 32), output=torch.bfloat16, channels_last=True):
        generator = torch.Generator().manual_seed(0)
        n, c, *rest = shape
        format_ = torch.channels_last if channels_last else torch.contiguous_format

        def made(x, memory_format=torch.contiguous_format):
            return x.contiguous(memory_format=memory_format).to(device, memory_format=torch.preserve_format)

        self.x0 = made(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))
        self.x = made(torch.randn(shape, generator=generator), format_)
        self.before = made(torch.randn(shape, generator=generator), format_)
        self.output = made(torch.randn((n, 2 * c, *rest), generator=generator).to(output), format_)
        self.t = torch.randint(0, 1000, (n,), generator=generator).to(device)
        self.t[0] = 0
        self.tables = {name: table.to(device) for name, table in TABLES.items()}
        self.key = NoiseKey.of(5, n, first_sample_id=2**34, step=3, device=device)
        self.step = torch.tensor(0, device=device)
        # Sums of these are exact in any order, so that the table is the same one everywhere.
        self.probabilities = (torch.arange(1000, device=device) % 3).double() / 1024

    def run(self) -> list[torch.Tensor]:
        """Every op once. The sums last."""
        narrow = self.output[:, : self.x.shape[1]].contiguous(memory_format=torch.channels_last).requires_grad_()
        wide = self.output.detach().clone().requires_grad_()
        with torch.enable_grad():
            losses = diffusion_loss(narrow, self.x0, self.t, self.tables["loss"], self.key)
            hybrid = hybrid_loss(wide, self.x0, self.t, self.tables["hybrid"], self.key)
            terms = vlb_terms(wide, self.x0, self.t, self.tables["bound"], self.key)
            gradients = [
                *torch.autograd.grad(losses.sum(), narrow),
                *torch.autograd.grad(hybrid.sum() + terms.bits_per_dim.sum(), wide),
            ]
        step = reverse_step(
            self.x,
            self.output,
            self.tables["step"],
            self.step,
            self.key,
            x0_previous=self.before,
            return_x0=True,
            model_dtype=torch.bfloat16,
        )
        history, counts = torch.zeros_like(self.tables["q"][:, :1]), torch.zeros_like(self.t[:1]).repeat(1000)
        drop = LabelDrop(self.t, 0.5, 1000)
        drawn = [
            draw_timesteps(self.key, 1000, parts=7, network_timesteps=counts + 5, label_drop=drop),
            draw_timesteps(self.key, 1000, probabilities=self.probabilities, label_drop=drop),
        ]
        record_losses(history, counts, self.t, losses.detach() * 0 + 1)
        return [
            normal(self.key, self.x.shape[1:]),
            q_sample(self.x0, self.t, self.tables["q"], self.key, torch.bfloat16),
            dropout(self.x, self.key, 5, 0.3),
            dropout(self.output, self.key, 5, 0.3),
            *step,
            *(x for results in drawn for x in results),
            history,
            counts,
            *gradients,
            *(x.detach() for x in (losses, hybrid, *terms)),
        ]


SUMS = 4


def test_normals_are_the_cpus_bit_for_bit(gpu_backend):
    for seed, stream in ((1, 0), (2**63 + 12345, 7)):
        there = normal(NoiseKey.of(seed, 4, first_sample_id=2**40, step=9, stream=stream, device="cuda"), (2**24 + 3,))
        with use_backend("cpu"):
            here = normal(NoiseKey.of(seed, 4, first_sample_id=2**40, step=9, stream=stream), (2**24 + 3,))
        assert torch.equal(there.cpu().view(torch.int32), here.view(torch.int32))


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_op_is_the_cpus(gpu_backend, channels_last):
    there = Batch("cuda", channels_last=channels_last).run()
    with use_backend("cpu"):
        here = Batch("cpu", channels_last=channels_last).run()
    for i, (one, other) in enumerate(zip(there, here, strict=True)):
        assert one.dtype == other.dtype
        if i < len(here) - SUMS and one.dtype in (torch.float32, torch.int64):
            assert torch.equal(one.cpu(), other), i
        else:  # sums in another order; a gradient's factor is one of them, rounded to bf16
            torch.testing.assert_close(one.cpu(), other, rtol=2e-5 if one.dtype == torch.float32 else 2**-7, atol=1e-12)


def test_a_loss_is_the_same_every_time(gpu_backend):
    batch = Batch("cuda", (8, 3, 160, 160))
    first = batch.run()
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(batch.run(), first, strict=True))


def test_the_callers_stream_is_used(gpu_backend):
    batch = Batch("cuda", (16, 3, 64, 64))
    expected = batch.run()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what runs on another stream would be done before this
        batch.step.fill_(1)
        late = reverse_step(batch.x, batch.output, batch.tables["step"], batch.step, batch.key).x
    torch.cuda.synchronize()
    assert not torch.equal(late, expected[2])
    assert torch.equal(late, reverse_step(batch.x, batch.output, batch.tables["step"], batch.step, batch.key).x)


def test_a_graph_holds_every_op_and_follows_the_device_step(gpu_backend):
    batch = Batch("cuda")
    batch.run()  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        batch.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = batch.run()
    for step, row in ((3, 0), (4, 1), (7, 0)):
        batch.key.step.fill_(step)
        batch.step.fill_(row)
        graph.replay()
        for one, other in zip(captured, batch.run(), strict=True):
            assert torch.equal(one, other)


def test_nothing_waits_for_the_gpu(gpu_backend):
    batch = Batch("cuda")
    batch.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("t", [-1, 1000, 2**62])
def test_an_index_outside_the_table_gives_nan(gpu_backend, t):
    batch = Batch("cuda", (2, 3, 8, 8))
    batch.t[1] = t
    x_t = q_sample(batch.x0, batch.t, batch.tables["q"], batch.key)
    loss = hybrid_loss(batch.output, batch.x0, batch.t, batch.tables["hybrid"], batch.key)
    assert x_t[1].isnan().all() and not x_t[0].isnan().any()
    assert loss.isnan().tolist() == [False, True]


def test_more_than_2_to_the_31_elements(gpu_backend):
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    shape = (1, 3, 26755, 26755)
    output = torch.zeros(shape, dtype=torch.float16, device="cuda")
    x0 = torch.full(shape, 128, dtype=torch.uint8, device="cuda")
    output.view(-1)[-2] = 256.0
    table = torch.tensor([[0.0, 0.0, 1.0]], device="cuda")
    key = NoiseKey.of(0, 1, device="cuda")
    loss = diffusion_loss(output, x0, torch.zeros(1, dtype=torch.int64, device="cuda"), table, key)
    assert output.numel() > 2**31
    assert loss.item() == pytest.approx(65536 / output.numel(), rel=1e-6)


def test_the_default_is_the_cuda_backend():
    assert ops.active_backend("reverse_step", "cuda", torch.float32) == "cuda"
    assert ops.active_backend("reverse_step", "cuda", torch.float64) == "reference"


def test_tensors_in_two_places_are_refused(gpu_backend):
    batch, key = Batch("cuda", (2, 3, 8, 8)), NoiseKey.of(0, 2)
    with pytest.raises(InputError, match="table is on cpu and the images on cuda:0; move it there once"):
        q_sample(batch.x0, batch.t, TABLES["q"], batch.key)
    with pytest.raises(InputError, match="the NoiseKey is on cpu and the images on cuda:0"):
        q_sample(batch.x0, batch.t, batch.tables["q"], key)
    with pytest.raises(InputError, match="t is on cpu and the images on cuda:0"):
        q_sample(batch.x0, batch.t.cpu(), batch.tables["q"], batch.key)
    with pytest.raises(InputError, match=r"step is torch.int64 .* on cpu; expected an int64 scalar tensor on cuda:0"):
        reverse_step(batch.x, batch.output, batch.tables["step"], torch.tensor(0), batch.key)


def test_float64_is_refused_by_name_and_computed_by_default(gpu_backend):
    batch = Batch("cuda", (2, 3, 8, 8))
    z = torch.zeros(2, 3, 8, 8, dtype=torch.float64, device="cuda")
    with pytest.raises(InputError, match=r"no torch.float64; use the reference backend"):
        q_sample(z, batch.t, batch.tables["q"], z)
    with use_backend(None):
        assert q_sample(z, batch.t, batch.tables["q"], z).dtype == torch.float64


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_device_that_is_not_current(gpu_backend):
    there = Batch("cuda:1").run()
    assert torch.cuda.current_device() == 0
    for one, other in zip(there, Batch("cuda:0").run(), strict=True):
        assert torch.equal(one.cpu(), other.cpu())


def test_compiled_with_the_ops_inside(gpu_backend):
    batch = Batch("cuda")

    @torch.compile(fullgraph=True)
    def both(x, output, step):
        x = reverse_step(x, output, batch.tables["step"], step, batch.key).x
        return x, x * math.pi

    expected = reverse_step(batch.x, batch.output, batch.tables["step"], batch.step, batch.key).x
    x, scaled = both(batch.x, batch.output, batch.step)
    assert torch.equal(x, expected)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(scaled, expected * math.pi)
