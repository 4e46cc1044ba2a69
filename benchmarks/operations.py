"""What is measured: each operation of ddpm_fast with every way of computing it.

The ways ("variants") of an operation do the same work on the same tensors: ddpm_fast's fused op, the peer library
diffusers, plain torch, and plain torch under torch.compile. A variant called with a noise tensor uses that, so that
its result can be compared with float64 before anything is timed; called with None it draws its own noise, in the way
its own documentation's loop does, which is what is timed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.samplers import ddpm_table

T = 1000
TIMESTEP = 500  # of the reverse step: every t > 0 costs the same
NOISE_SEED = 1
# Of the largest value. Plain torch rounds to bf16 after every operation, which costs it some of the 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.uint8: 1e-5, torch.bfloat16: 2**-6}

Variant = Callable[[Tensor | None], tuple[Tensor, ...]]


class Case(NamedTuple):
    """One operation at one size. dtype: of x_0 and of what is made from it (uint8 x_0 makes float32)."""

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        layout = " channels_last" if self.channels_last else ""
        return f"{self.operation} {str(self.dtype).removeprefix('torch.')} {'x'.join(map(str, self.shape))}{layout}"


class Operation:
    """The inputs of a case, its variants with the measured one first, and the result that float64 gives.

    bytes_per_element: what must be read and written however it is computed, each tensor once an op. normals: how many
    are drawn per element. grad: whether autograd is on while it is timed.
    """

    labels: tuple[str, ...] = ("ddpm_fast", "diffusers", "torch", "torch.compile")
    bytes_per_element: int
    normals = 1
    grad = False
    variants: dict[str, Variant]  # by label

    def __init__(self, case: Case):
        self.case = case
        self.memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
        self.generator = torch.Generator().manual_seed(0)
        self.compute_dtype = torch.float32 if case.dtype == torch.uint8 else case.dtype
        self.tolerance = TOLERANCE[case.dtype]  # the largest error that still counts as the same result
        self.calls = 0

    def randn(self, generator: torch.Generator) -> Tensor:
        z = torch.randn(self.case.shape, generator=generator, dtype=self.compute_dtype)
        return z.contiguous(memory_format=self.memory_format)

    def image(self) -> Tensor:
        if self.case.dtype == torch.uint8:
            x = torch.randint(0, 256, self.case.shape, generator=self.generator, dtype=torch.uint8)
        else:
            x = (torch.rand(self.case.shape, generator=self.generator) * 2 - 1).to(self.case.dtype)
        return x.contiguous(memory_format=self.memory_format)

    def draw(self, noise: Tensor | None) -> Tensor:
        """The baselines' own noise. In plain order always: torch's randn_like is 5x slower for channels_last."""
        return torch.randn(self.case.shape, dtype=self.compute_dtype) if noise is None else noise

    def next_key(self) -> df.NoiseKey:
        """A new training step's noise, named as ddpm_fast.training names it."""
        self.calls += 1
        n = self.case.shape[0]
        return df.NoiseKey.of(0, n, first_sample_id=self.calls * n, stream=df.Stream.TRAINING)

    @functools.cached_property
    def scheduler(self):
        return scheduler()

    def error(self, label: str) -> float:
        """The largest deviation of a variant from expected(noise), in float64, over each result's largest value."""
        noise = self.randn(torch.Generator().manual_seed(NOISE_SEED))
        pairs = zip(self.variants[label](noise), self.expected(noise), strict=True)
        errors = [(result.double() - truth).abs().max() / truth.abs().max() for result, truth in pairs]
        return float(torch.stack(errors).max())  # unlike Python's max, NaN if one of them is


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


def noised(x0: Tensor, t: Tensor, table: Tensor, noise: Tensor) -> Tensor:
    """q_sample in plain torch [Ho et al. 2020, eq. 4]; in float64 if the table is."""
    signal, sigma = table[t][:, :, None, None, None].unbind(1)
    x_t = signal * scaled(x0) + sigma * noise
    return x_t if table.dtype == torch.float64 else x_t.to(noise.dtype)


def noised_and_scored(x0: Tensor, t: Tensor, table: Tensor, noise: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    return noised(x0, t, table, noise), (output - noise).square().flatten(1).mean(1)


def stepped(x: Tensor, output: Tensor, row: Tensor, noise: Tensor) -> Tensor:
    """A row of ddpm_fast.samplers.ddpm_table in plain torch [Ho et al. 2020, alg. 2]."""
    a_x, a_out, b_x, b_x0, _, sigma, clip, _ = row.unbind()
    x0 = (a_x * x + a_out * output).clamp(-clip, clip)
    return b_x * x + b_x0 * x0 + sigma * noise


def freshly_compiled(formula):
    """torch.compile of a formula for one case. After eight recompilations of one function dynamo gives up and runs it
    uncompiled, which would make the baseline a straw man: so every case starts anew."""
    torch.compiler.reset()
    return torch.compile(formula, dynamic=False)


class QSample(Operation):
    """x_t from x_0: noise, then DDPMScheduler.add_noise or what takes its place."""

    def __init__(self, case: Case):
        super().__init__(case)
        self.x0 = self.image()
        self.t = torch.randint(0, T, case.shape[:1], generator=self.generator)
        self.diffusion = df.GaussianDiffusion(df.Schedule.linear(T))
        self.table = self.diffusion.table("q_sample", self.x0.device)
        self.bytes_per_element = self.x0.itemsize + self.compute_dtype.itemsize
        self.variants = dict(zip(self.labels, (self.ours, self.diffusers, self.eager, self.compiled), strict=True))

    @functools.cached_property
    def compiled_formula(self):
        return freshly_compiled(noised)

    def ours(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (self.diffusion.q_sample(self.x0, self.t, self.next_key() if noise is None else noise),)

    def diffusers(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (self.scheduler.add_noise(scaled(self.x0), self.draw(noise), self.t),)

    def eager(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (noised(self.x0, self.t, self.table, self.draw(noise)),)

    def compiled(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (self.compiled_formula(self.x0, self.t, self.table, self.draw(noise)),)

    def expected(self, noise: Tensor) -> tuple[Tensor, ...]:
        return (noised(exact(self.x0), self.t, self.diffusion.schedule.q_sample_table(), noise.double()),)


class TrainingLoss(QSample):
    """All of a training step but the network: noise, x_t, each sample's loss, and its mean's gradient in the output."""

    grad = True

    def __init__(self, case: Case):
        super().__init__(case)
        self.output = self.randn(self.generator).requires_grad_()
        # x_0 twice; x_t, the output, what the forward keeps for the backward (written and read), the gradient
        self.bytes_per_element = 2 * self.x0.itemsize + 5 * self.compute_dtype.itemsize

    @functools.cached_property
    def compiled_formula(self):
        return freshly_compiled(noised_and_scored)

    def with_gradient(self, x_t: Tensor, loss: Tensor) -> tuple[Tensor, ...]:
        return x_t, loss.detach(), *torch.autograd.grad(loss.mean(), self.output)

    def ours(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        z = self.next_key() if noise is None else noise
        x_t = self.diffusion.q_sample(self.x0, self.t, z)
        return self.with_gradient(x_t, self.diffusion.training_losses(self.output, self.x0, self.t, z))

    def diffusers(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        z = self.draw(noise)
        x_t = self.scheduler.add_noise(scaled(self.x0), z, self.t)
        return self.with_gradient(x_t, F.mse_loss(self.output, z, reduction="none").flatten(1).mean(1))

    def eager(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return self.with_gradient(*noised_and_scored(self.x0, self.t, self.table, self.draw(noise), self.output))

    def compiled(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return self.with_gradient(*self.compiled_formula(self.x0, self.t, self.table, self.draw(noise), self.output))

    def expected(self, noise: Tensor) -> tuple[Tensor, ...]:
        residual = self.output.detach().double() - noise.double()
        return *super().expected(noise), residual.square().flatten(1).mean(1), 2 * residual / self.case.elements


class ReverseStep(Operation):
    """x_{t-1} from x_t and the network's output, fixed_small variance, x_0 clipped: DDPMScheduler.step or its like."""

    def __init__(self, case: Case):
        super().__init__(case)
        self.x, self.output = self.randn(self.generator), self.randn(self.generator)
        diffusion = df.GaussianDiffusion(df.Schedule.linear(T), variance="fixed_small")
        self.exact_table = ddpm_table(diffusion).coefficients
        self.table = self.exact_table.float()
        self.step = torch.tensor(T - 1 - TIMESTEP)
        self.key = df.NoiseKey.of(0, case.shape[0], stream=df.Stream.REVERSE)
        self.bytes_per_element = 3 * self.x.itemsize
        self.variants = dict(zip(self.labels, (self.ours, self.diffusers, self.eager, self.compiled), strict=True))

    @functools.cached_property
    def compiled_formula(self):
        return freshly_compiled(stepped)

    def ours(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        if noise is None:
            self.key.step.add_(1)  # as ddpm_fast.sample does
        z = self.key if noise is None else noise
        return (df.ops.reverse_step(self.x, self.output, self.table, self.step, z).x,)

    def diffusers(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        # It takes no noise, but a generator in the same state draws the noise that error() made.
        generator = None if noise is None else torch.Generator().manual_seed(NOISE_SEED)
        t = self.scheduler.timesteps[T - 1 - TIMESTEP]
        return (self.scheduler.step(self.output, t, self.x, generator=generator).prev_sample,)

    def eager(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (stepped(self.x, self.output, self.table[self.step], self.draw(noise)),)

    def compiled(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (self.compiled_formula(self.x, self.output, self.table[self.step], self.draw(noise)),)

    def expected(self, noise: Tensor) -> tuple[Tensor, ...]:
        return (stepped(self.x.double(), self.output.double(), self.exact_table[self.step], noise.double()),)


class Normal(Operation):
    """Standard normals, written to a new tensor. Nothing is given, so they are held to N(0, 1) by their moments."""

    labels = ("ddpm_fast", "torch")

    def __init__(self, case: Case):
        super().__init__(case)
        self.tolerance = 6.0  # standard errors
        self.key = df.NoiseKey.of(0, case.shape[0])
        self.bytes_per_element = self.compute_dtype.itemsize
        self.variants = {"ddpm_fast": self.ours, "torch": self.eager}

    def ours(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        self.key.step.add_(1)
        return (df.ops.normal(self.key, self.case.shape[1:], dtype=self.compute_dtype),)

    def eager(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (torch.randn(self.case.shape, dtype=self.compute_dtype),)

    def error(self, label: str) -> float:
        z = self.variants[label](None)[0].double()
        return max(abs(float(z.mean())), abs(float(z.square().mean()) - 1) / 2**0.5) * self.case.elements**0.5


class Copy(Operation):
    """The ceiling: a read and a write of every element, into a tensor that exists and into a new one."""

    labels = ("copy_", "clone")
    normals = 0

    def __init__(self, case: Case):
        super().__init__(case)
        self.source = self.image()
        self.target = torch.zeros_like(self.source)
        self.bytes_per_element = 2 * self.source.itemsize
        self.variants = {
            "copy_": lambda noise: (self.target.copy_(self.source),),
            "clone": lambda noise: (self.source.clone(),),
        }

    def expected(self, noise: Tensor) -> tuple[Tensor, ...]:
        return (self.source.double(),)
