"""The losses that hold the variational bound, and the bound's terms, compared with their composition in torch as the
reference codes have it: see tests/support/composed_bound.py."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks import peers
from benchmarks.operations import NOISE_SEED, Operation, T
from tests.support.composed_bound import composed_hybrid, composed_terms, tables_of
from tests.support.plain import exact, noised, scaled


class BoundOperation(Operation):
    """What both ops read: an output [N, 2C, ...] of eps and v, x_0, x_t and the noise. The compositions are given x_t
    and the noise, which they keep from the forward process; ours is given the key and draws the noise again."""

    def prepare(self, formula: Callable) -> None:
        # Away from t = 0, whose likelihoods in the tails are decided by rounding.
        self.x0, self.t, self.formula = self.image(), self.timesteps(first=1), formula
        self.diffusion = df.GaussianDiffusion(df.Schedule.linear(T), variance="learned_range", loss="hybrid")
        self.tables = tables_of(self.diffusion.schedule, self.device)
        eps, v = self.randn(self.generator), self.randn(self.generator).clamp(-1, 1)
        self.output = self.as_output(torch.cat([eps, v], 1))
        self.key = self.new_key(NOISE_SEED, df.Stream.EVALUATION)
        shape = self.case.shape[1:]
        self.noise = df.ops.normal(self.key, shape, dtype=self.compute_dtype, memory_format=self.memory_format)
        self.x_t = self.diffusion.q_sample(self.x0, self.t, self.noise)

    def composed(self, _: Tensor | None):
        return self.formula(self.tables, self.output, scaled(self.x0), self.x_t, self.t, self.noise)

    def composed_compiled(self, _: Tensor | None):
        run = self.once("compiled", lambda: peers.freshly_compiled(functools.partial(self.formula, self.tables)))
        return run(self.output, scaled(self.x0), self.x_t, self.t, self.noise)

    def in_float64(self, output: Tensor):
        x0, noise = exact(self.x0), self.noise.double()
        x_t = noised(x0, self.t, self.diffusion.schedule.q_sample_table().to(self.device), noise)
        return self.formula(self.tables, output, x0, x_t, self.t, noise)


def vlb_terms(op: BoundOperation) -> None:
    """The bound's terms and both MSEs of a batch, without gradients."""
    op.prepare(composed_terms)
    op.bytes_per_element = op.x0.itemsize + 2 * op.output_dtype.itemsize
    op.ours = lambda _: tuple(op.diffusion.vlb_terms(op.output, op.x0, op.t, op.key))
    op.peers = {"composed": op.composed, "torch.compile": op.composed_compiled}
    op.expected = lambda _: op.in_float64(op.output.double())


def hybrid_loss(op: BoundOperation) -> None:
    """L_hybrid of each sample, and the gradient of its mean in the output [Nichol & Dhariwal 2021, eq. 16]."""
    op.prepare(composed_hybrid)
    op.output.requires_grad_()
    op.grad = True
    # x_0 and both groups of the output; what the forward keeps for the backward (written, read), the gradient
    op.bytes_per_element = op.x0.itemsize + (2 + 2 + 2 + 2) * op.output_dtype.itemsize

    def lucidrains(_: Tensor | None) -> tuple[Tensor, ...]:
        # It makes x_t itself, which the compositions are given.
        chain = op.lucidrains(groups=2)
        chain.model.tensors["output"] = op.output
        loss = chain.p_losses(scaled(op.x0), op.t, noise=op.noise, loss_reduction="none")
        return op.with_gradient(loss, op.output)

    def expected(_: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            output = op.output.detach().double().requires_grad_()
            return op.with_gradient(op.in_float64(output), output)

    losses = op.diffusion.training_losses
    op.ours = lambda _: op.with_gradient(losses(op.output, op.x0, op.t, op.key), op.output)
    op.expected = expected
    op.peers = {
        "composed": lambda _: op.with_gradient(op.composed(None), op.output),
        "torch.compile": lambda _: op.with_gradient(op.composed_compiled(None), op.output),
        peers.LUCIDRAINS: lucidrains,
    }
