"""The ops' gradients by torch's own registration, which serves where torch lacks what compat.below_autograd uses."""

import os
import subprocess
import sys

import ddpm_fast

CODE = """
import torch
private = torch._C._AutoDispatchBelowAutograd
del torch._C._AutoDispatchBelowAutograd
from ddpm_fast import compat, ops
from ddpm_fast.noise import NoiseKey
torch._C._AutoDispatchBelowAutograd = private  # torch's own registration calls it
assert not compat.HAS_BELOW_AUTOGRAD
torch.manual_seed(0)
x, out = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 6, 4, 4, requires_grad=True)
x0, t, key = torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), NoiseKey.of(1, 2)
z = ops.normal(key, (3, 4, 4))
(g,) = torch.autograd.grad(ops.diffusion_loss(x, x0, t, torch.tensor([[0.0, 1.0, 1.0]]), key).sum(), x)
torch.testing.assert_close(g, 2 * (x - z) / 48)
(g,) = torch.autograd.grad(ops.q_sample(x, t, torch.tensor([[0.8, 0.6]]), key).sum(), x)
torch.testing.assert_close(g, torch.full_like(x, 0.8))
row = torch.tensor([[0.0, 0.5, 0.3, 0.7, 0.0, 0.2, torch.inf, 0.0]])
made = ops.reverse_step(x, out, row, torch.tensor(0), key, return_x0=True)
g, by_output = torch.autograd.grad(made.x.sum() + made.x0.sum(), (x, out))
torch.testing.assert_close(g, torch.full_like(x, 0.3))
torch.testing.assert_close(by_output[:, :3], torch.full_like(x, 0.7 * 0.5 + 0.5))
weight = torch.ones(3, requires_grad=True)
y = ops.group_norm(x, weight, torch.zeros(3), 3, 1e-5)
(g,) = torch.autograd.grad(y.square().sum(), weight)
torch.testing.assert_close(g, 2 * y.detach().square().sum((0, 2, 3)))

def refused(run, *words):
    try:
        run()
    except (ValueError, RuntimeError) as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(words)

scale = torch.tensor(2.0, requires_grad=True)
for name, result in (
    ("diffusion_loss", ops.diffusion_loss(scale * x, x0, t, torch.tensor([[0.0, 1.0, 1.0]]), key)),
    ("group_norm", ops.group_norm(scale * x, weight, torch.zeros(3), 3, 1e-5)),
):
    (g,) = torch.autograd.grad(result.square().sum(), scale, create_graph=True)
    refused(lambda: torch.autograd.grad(g, scale), name, "has no second derivative")
refused(lambda: ops.diffusion_loss(x, x, t, torch.tensor([[0.0, 1.0, 1.0]]), key), "has no gradient in x0")
refused(lambda: torch.func.jvp(lambda x: ops.q_sample(x, t, torch.tensor([[0.8, 0.6]]), key), (x0,), (x0,)), "forward")
"""


def test_the_gradients_without_torchs_private_part():
    root = os.path.dirname(os.path.dirname(ddpm_fast.__file__))
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
