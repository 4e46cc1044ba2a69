"""What our own registration of gradients saves: `diffusion_loss`, forward and backward, compared with a twin of the op
that has the same kernels and gets its gradient from torch.library.register_autograd. The twin's forward calls our op,
which is one dispatch more than ours makes, of about 2 us."""

import functools

import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks.operations import Operation, T
from tests.support.composed_bound import per_sample_mean

TWIN = "register_autograd"
# With all of our op's arguments: register_autograd lists them anew at each call.
SCHEMA = (
    "diffusion_loss(Tensor output, Tensor x0, Tensor t, Tensor table, Tensor? noise, Tensor? seed, Tensor? sample_id, "
    "Tensor? step_id, int stream, bool with_residual) -> (Tensor, Tensor)"
)


@functools.cache
def twin():
    """(the library, which the op lives as long as; the op), registered at the first use."""
    library, ours = torch.library.Library("ddpm_fast_twin", "DEF"), torch.ops.ddpm_fast.diffusion_loss.default

    def setup(ctx, inputs, output):
        ctx.save_for_backward(output[1], inputs[2], inputs[3])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_loss, _):
        residual, t, table = ctx.saved_tensors
        scale = grad_loss * table[t, 2].to(grad_loss.dtype) * (2.0 / residual[0].numel())
        return (torch.ops.ddpm_fast.loss_backward(residual, scale[:, None]), *[None] * 9)

    library.define(SCHEMA)
    library.impl("diffusion_loss", lambda *inputs: ours(*inputs), "CompositeExplicitAutograd")
    torch.library.register_autograd("ddpm_fast_twin::diffusion_loss", backward, setup_context=setup, lib=library)
    return library, torch.ops.ddpm_fast_twin.diffusion_loss.default


def diffusion_loss(op: Operation) -> None:
    """Each sample's loss of a given noise, and the gradient of its mean in the output."""
    x0, t, output, noise = op.image(), op.timesteps(), op.as_output(op.randn(op.generator)), op.randn(op.generator)
    table = df.GaussianDiffusion(df.Schedule.linear(T)).table("loss", op.device)
    inputs = (output.requires_grad_(), x0, t, table, noise, None, None, None, 0, True)
    ours, op.grad, op.normals = torch.ops.ddpm_fast.diffusion_loss.default, True, 0
    # x_0, the noise and the output; what the forward keeps for the backward (written, read), the gradient
    op.bytes_per_element = x0.itemsize + noise.itemsize + 4 * op.output_dtype.itemsize

    def expected(_: Tensor) -> tuple[Tensor, ...]:
        residual = output.detach().double() - noise.double()
        return per_sample_mean(residual.square()), 2 * residual / op.case.elements

    op.ours = lambda _: op.with_gradient(ours(*inputs)[0], output)
    op.peers = {TWIN: lambda _: op.with_gradient(twin()[1](*inputs)[0], output)}
    op.expected = expected
