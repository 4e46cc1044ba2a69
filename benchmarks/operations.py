"""What is measured: each operation of ddpm_fast with every way of computing it, on the CPU or a GPU.

The ways ("variants") of an operation do the same work on the same tensors: ddpm_fast's fused op on each of its
backends, the peer libraries, plain torch, and plain torch under torch.compile. A baseline called with a noise
tensor uses that, so that its result can be compared with float64 before anything is timed; called with None it draws
its own noise, in the way its own documentation's loop does, which is what is timed. Ours is compared as it is timed: it
draws from its key, and float64 is given what the key names.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast import peers
from ddpm_fast.ops import dispatch as backend
from ddpm_fast.samplers import ddpm_table

T = 1000
TIMESTEP = 500  # of the reverse step: every t > 0 costs the same
NOISE_SEED = 1
# Of the largest value. Plain torch rounds to bf16 after every operation, which costs it some of the 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}

Variant = Callable[[Tensor | None], tuple[Tensor, ...]]


class Case(NamedTuple):
    """One operation at one size. dtype: of x_0 and of what is made from it (uint8 x_0 makes float32). network: as it is
    around a U-Net in bf16, whose output is bf16 and channels_last and whose input is bf16."""

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    network: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        layout = " channels_last" * self.channels_last + " network" * self.network
        return f"{self.operation} {str(self.dtype).removeprefix('torch.')} {'x'.join(map(str, self.shape))}{layout}"


class Operation:
    """The inputs of a case on a device, its variants, and the result that float64 gives.

    baselines: what stands beside ours, and the method that computes it. bytes_per_element: what must be read and
    written however it is computed, each tensor once an op. normals: how many are drawn per element. grad: whether
    autograd is on while it is timed.
    """

    baselines: dict[str, str] = {  # noqa: RUF012
        peers.DIFFUSERS: "diffusers",
        peers.LUCIDRAINS: "lucidrains",
        "torch": "eager",
        "torch.compile": "compiled",
    }
    bytes_per_element: int
    normals = 1
    grad = False

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        self.memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
        self.generator = torch.Generator(device).manual_seed(0)
        self.compute_dtype = torch.float32 if case.dtype == torch.uint8 else case.dtype
        self.output_dtype = torch.bfloat16 if case.network else self.compute_dtype
        self.output_format = torch.channels_last if case.network else self.memory_format
        self.tolerance = TOLERANCE[self.output_dtype]  # the largest error that still counts as the same result
        self.key = self.new_key(0, df.Stream.TRAINING)

    @classmethod
    def labels(cls, ours: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(what is measured, what it is measured against): ours under the names of cases.OURS, and the baselines."""
        return ours, tuple(cls.baselines)

    def variant(self, label: str) -> Variant:
        return getattr(self, self.baselines.get(label, "ours"))

    @contextlib.contextmanager
    def running(self, label: str):
        """The backend and the gradient mode in which a variant is called."""
        chosen = df.use_backend(label) if label in backend.NAMES else contextlib.nullcontext()
        with chosen, torch.set_grad_enabled(self.grad):
            yield

    def replica(self) -> Operation:
        """The same case with the same values in memory of its own. What was compiled is shared."""
        made = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(made, name, value.detach().clone().requires_grad_(value.requires_grad))
        seed, ids, step = (tensor.clone() for tensor in (self.key.seed, self.key.sample_id, self.key.step))
        made.key = df.NoiseKey(seed, ids, step, self.key.stream)
        return made

    def randn(self, generator: torch.Generator) -> Tensor:
        z = torch.randn(self.case.shape, generator=generator, dtype=self.compute_dtype, device=self.device)
        return z.contiguous(memory_format=self.memory_format)

    def image(self) -> Tensor:
        options = {"generator": self.generator, "device": self.device}
        if self.case.dtype == torch.uint8:
            x = torch.randint(0, 256, self.case.shape, dtype=torch.uint8, **options)
        else:
            x = (torch.rand(self.case.shape, **options) * 2 - 1).to(self.case.dtype)
        return x.contiguous(memory_format=self.memory_format)

    def as_output(self, x: Tensor) -> Tensor:
        """A tensor as the network gives it."""
        return x.to(self.output_dtype).contiguous(memory_format=self.output_format)

    def draw(self, noise: Tensor | None) -> Tensor:
        """The baselines' own noise. In plain order always: torch's randn_like is 5x slower for channels_last."""
        return torch.randn(self.case.shape, dtype=self.compute_dtype, device=self.device) if noise is None else noise

    def new_key(self, seed: int, stream: int) -> df.NoiseKey:
        return df.NoiseKey.of(seed, self.case.shape[0], stream=stream, device=self.device)

    def next_samples(self) -> df.NoiseKey:
        """The key moved on to the next batch of training, in place: NoiseKey.of would wait for a GPU."""
        self.key.sample_id.add_(self.case.shape[0])
        return self.key

    def next_step(self) -> df.NoiseKey:
        """The key moved on to the sampler's next step, in place, as ddpm_fast.sample does."""
        self.key.step.add_(1)
        return self.key

    def drawing(self, formula: Callable) -> Callable:
        """torch.compile of formula(*inputs, noise), as run(noise, *inputs).

        On a GPU None is drawn inside, where inductor fuses it; its own generator on the CPU was four times slower than
        all of the plain variant, so that there the noise comes from outside.
        """
        shape, dtype, device = self.case.shape, self.compute_dtype, self.device

        def run(noise: Tensor | None, *inputs: Tensor):
            return formula(*inputs, torch.randn(shape, dtype=dtype, device=device) if noise is None else noise)

        compiled = freshly_compiled(run)
        if device.type == "cuda":
            return compiled
        return lambda noise, *inputs: compiled(self.draw(noise), *inputs)

    @functools.cached_property
    def scheduler(self):
        return scheduler()

    @functools.cached_property
    def lucid(self):
        """denoising-diffusion-pytorch's GaussianDiffusion around a network that answers with what it is given."""
        _, channels, *size = self.case.shape
        return peers.lucidrains_diffusion(GivenOutput(channels), tuple(size)).to(self.device)

    def error(self, label: str) -> float:
        """The largest deviation of a variant from expected(noise), in float64, over each result's largest value."""
        if label in self.baselines:
            noise = self.randn(torch.Generator(self.device).manual_seed(NOISE_SEED))
            results = self.variant(label)(noise)
        else:
            results = self.variant(label)(None)
            with df.use_backend("reference"):
                noise = df.ops.normal(self.key, self.case.shape[1:], memory_format=self.memory_format)
        pairs = zip(results, self.expected(noise), strict=True)
        errors = [(result.double() - truth).abs().max() / truth.abs().max() for result, truth in pairs]
        return float(torch.stack(errors).max())  # unlike Python's max, NaN if one of them is


class GivenOutput(nn.Module):
    """A network, as denoising-diffusion-pytorch knows them, that answers with the tensor "output", of so many groups of
    channels, in the state's dtype, and keeps the state that it was asked about as "x_t"."""

    self_condition = False

    def __init__(self, channels: int, groups: int = 1):
        super().__init__()
        self.channels, self.out_dim = channels, groups * channels
        self.tensors: dict[str, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor, x_self_cond: None = None) -> Tensor:
        self.tensors["x_t"] = x
        return self.tensors["output"].to(x.dtype)


def scheduler():
    """diffusers' scheduler with the same betas as Schedule.linear(1000)."""
    from diffusers import DDPMScheduler

    made = DDPMScheduler(num_train_timesteps=T, variance_type="fixed_small", clip_sample=True)
    made.set_timesteps(T)
    return made


def scaled(x0: Tensor) -> Tensor:
    """Pixels as the networks read them; images that are float already pass."""
    return x0.float() / 127.5 - 1 if x0.dtype == torch.uint8 else x0


def exact(x0: Tensor) -> Tensor:
    return x0.double() / 127.5 - 1 if x0.dtype == torch.uint8 else x0.double()


def per_sample_mean(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(1, x.ndim)))


def noised(x0: Tensor, t: Tensor, table: Tensor, noise: Tensor) -> Tensor:
    """q_sample in plain torch [Ho et al. 2020, eq. 4]; in float64 if the table is."""
    signal, sigma = table[t][:, :, None, None, None].unbind(1)
    x_t = signal * scaled(x0) + sigma * noise
    return x_t if table.dtype == torch.float64 else x_t.to(noise.dtype)


def noised_and_scored(x0: Tensor, t: Tensor, table: Tensor, output: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return noised(x0, t, table, noise), per_sample_mean((output - noise).square())


def stepped(x: Tensor, output: Tensor, row: Tensor, noise: Tensor) -> Tensor:
    """A row of ddpm_fast.samplers.ddpm_table in plain torch [Ho et al. 2020, alg. 2], in the state's dtype."""
    a_x, a_out, b_x, b_x0, _, sigma, clip, _ = row.unbind()
    x0 = (a_x * x + a_out * output.to(x.dtype)).clamp(-clip, clip)
    return b_x * x + b_x0 * x0 + sigma * noise


def freshly_compiled(formula):
    """torch.compile of a formula for one case. After eight recompilations of one function dynamo gives up and runs it
    uncompiled, which would make the baseline a straw man: so every case starts anew."""
    torch.compiler.reset()
    return torch.compile(formula, dynamic=False)


class QSample(Operation):
    """x_t from x_0: noise, then DDPMScheduler.add_noise or what takes its place."""

    def __init__(self, case: Case, device: torch.device):
        super().__init__(case, device)
        self.x0 = self.image()
        self.t = torch.randint(0, T, case.shape[:1], generator=self.generator, device=device)
        self.diffusion = df.GaussianDiffusion(df.Schedule.linear(T))
        self.exact_table = self.diffusion.schedule.q_sample_table().to(device)
        self.table = self.exact_table.float()
        self.bytes_per_element = self.x0.itemsize + self.output_dtype.itemsize

    @functools.cached_property
    def compiled_formula(self):
        dtype = self.output_dtype
        return self.drawing(lambda x0, t, table, noise: noised(x0, t, table, noise).to(dtype))

    def ours(self, noise: None) -> tuple[Tensor, ...]:
        return (self.diffusion.q_sample(self.x0, self.t, self.next_samples(), self.output_dtype),)

    def diffusers(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (self.scheduler.add_noise(scaled(self.x0), self.draw(noise), self.t).to(self.output_dtype),)

    def lucidrains(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (self.lucid.q_sample(scaled(self.x0), self.t, noise=self.draw(noise)).to(self.output_dtype),)

    def eager(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (noised(self.x0, self.t, self.table, self.draw(noise)).to(self.output_dtype),)

    def compiled(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (self.compiled_formula(noise, self.x0, self.t, self.table),)

    def expected(self, noise: Tensor) -> tuple[Tensor, ...]:
        return (noised(exact(self.x0), self.t, self.exact_table, noise.double()),)


class TrainingLoss(QSample):
    """All of a training step but the network: noise, x_t, each sample's loss, and its mean's gradient in the output."""

    grad = True

    def __init__(self, case: Case, device: torch.device):
        super().__init__(case, device)
        self.output = self.as_output(self.randn(self.generator)).requires_grad_()
        # x_0 twice; x_t; the output, what the forward keeps for the backward (written and read), the gradient
        self.bytes_per_element = 2 * self.x0.itemsize + self.compute_dtype.itemsize + 4 * self.output_dtype.itemsize

    @functools.cached_property
    def compiled_formula(self):
        return self.drawing(noised_and_scored)

    def with_gradient(self, x_t: Tensor, loss: Tensor) -> tuple[Tensor, ...]:
        return x_t, loss.detach(), *torch.autograd.grad(loss.mean(), self.output)

    def ours(self, noise: None) -> tuple[Tensor, ...]:
        key = self.next_samples()
        x_t = self.diffusion.q_sample(self.x0, self.t, key)
        return self.with_gradient(x_t, self.diffusion.training_losses(self.output, self.x0, self.t, key))

    def diffusers(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        z = self.draw(noise)
        x_t = self.scheduler.add_noise(scaled(self.x0), z, self.t)
        return self.with_gradient(x_t, per_sample_mean(F.mse_loss(self.output.to(z.dtype), z, reduction="none")))

    def lucidrains(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        tensors = self.lucid.model.tensors
        tensors["output"] = self.output
        loss = self.lucid.p_losses(scaled(self.x0), self.t, noise=self.draw(noise), loss_reduction="none")
        return self.with_gradient(tensors["x_t"], loss)

    def eager(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return self.with_gradient(*noised_and_scored(self.x0, self.t, self.table, self.output, self.draw(noise)))

    def compiled(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return self.with_gradient(*self.compiled_formula(noise, self.x0, self.t, self.table, self.output))

    def expected(self, noise: Tensor) -> tuple[Tensor, ...]:
        residual = self.output.detach().double() - noise.double()
        return *super().expected(noise), per_sample_mean(residual.square()), 2 * residual / self.case.elements


class ReverseStep(Operation):
    """x_{t-1} from x_t and the network's output, fixed_small variance, x_0 clipped: DDPMScheduler.step or its like.

    Around a network in bf16 the state stays in float32, and the network gets a copy of it.
    """

    def __init__(self, case: Case, device: torch.device):
        super().__init__(case, device)
        self.x, self.output = self.randn(self.generator), self.as_output(self.randn(self.generator))
        diffusion = df.GaussianDiffusion(df.Schedule.linear(T), variance="fixed_small")
        self.exact_table = ddpm_table(diffusion).coefficients.to(device)
        self.table = self.exact_table.float()
        self.row = T - 1 - TIMESTEP
        self.step = torch.tensor(self.row, device=device)
        self.key = self.new_key(0, df.Stream.REVERSE)
        self.bytes_per_element = 2 * self.x.itemsize + self.output.itemsize * (2 if case.network else 1)

    def with_copy(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x, x.to(self.output_dtype)) if self.case.network else (x,)

    @functools.cached_property
    def compiled_formula(self):
        return self.drawing(lambda x, output, row, noise: self.with_copy(stepped(x, output, row, noise)))

    def ours(self, noise: None) -> tuple[Tensor, ...]:
        model_dtype = self.output_dtype if self.case.network else None
        made = df.ops.reverse_step(
            *(self.x, self.output, self.table, self.step, self.next_step()), model_dtype=model_dtype
        )
        return (made.x, made.x_model) if self.case.network else (made.x,)

    def diffusers(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        # It takes no noise, but a generator in the same state draws the noise that error() made.
        generator = None if noise is None else torch.Generator(self.device).manual_seed(NOISE_SEED)
        t = self.scheduler.timesteps[self.row]
        return (self.scheduler.step(self.output, t, self.x, generator=generator).prev_sample,)

    def lucidrains(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        self.lucid.model.tensors["output"] = self.output
        if noise is None:
            return (self.lucid.p_sample(self.x, TIMESTEP)[0],)
        # It takes no noise and no generator: where it is compared, its randn_like gives what error() made.
        with mock.patch.object(torch, "randn_like", return_value=noise):
            return (self.lucid.p_sample(self.x, TIMESTEP)[0],)

    # A row by its number: the loops that are compared with count their steps on the host.
    def eager(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return self.with_copy(stepped(self.x, self.output, self.table[self.row], self.draw(noise)))

    def compiled(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return self.compiled_formula(noise, self.x, self.output, self.table[self.row])

    def expected(self, noise: Tensor) -> tuple[Tensor, ...]:
        row = self.exact_table[self.row]
        x = stepped(self.x.double(), self.output.double(), row, noise.double())
        return (x, x) if self.case.network else (x,)


class Normal(Operation):
    """Standard normals, written to a new tensor. Nothing is given, so they are held to N(0, 1) by their moments."""

    baselines: dict[str, str] = {"torch": "eager"}  # noqa: RUF012

    def __init__(self, case: Case, device: torch.device):
        super().__init__(case, device)
        self.tolerance = 6.0  # standard errors
        self.bytes_per_element = self.compute_dtype.itemsize

    def ours(self, noise: None) -> tuple[Tensor, ...]:
        return (df.ops.normal(self.next_step(), self.case.shape[1:], dtype=self.compute_dtype),)

    def eager(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (self.draw(noise),)

    def error(self, label: str) -> float:
        z = self.variant(label)(None)[0].double()
        return max(abs(float(z.mean())), abs(float(z.square().mean()) - 1) / 2**0.5) * self.case.elements**0.5


class Copy(Operation):
    """The ceiling: a read and a write of every element, into a tensor that exists and into a new one."""

    baselines: dict[str, str] = {"copy_": "into", "clone": "anew"}  # noqa: RUF012
    normals = 0

    def __init__(self, case: Case, device: torch.device):
        super().__init__(case, device)
        self.source = self.image()
        self.target = torch.zeros_like(self.source)
        self.bytes_per_element = 2 * self.source.itemsize

    @classmethod
    def labels(cls, ours: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("copy_",), ("clone",)

    def into(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (self.target.copy_(self.source),)

    def anew(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (self.source.clone(),)

    def expected(self, noise: Tensor) -> tuple[Tensor, ...]:
        return (self.source.double(),)
