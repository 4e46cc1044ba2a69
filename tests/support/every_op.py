"""Every op once on each backend, at sizes that leave a rest everywhere: a program to run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python -m tests.support.every_op

Without that variable torch's own allocator hands out pieces of large blocks, inside which an access out of bounds is
not seen. Whether the results are right is for the tests to say.
"""

from __future__ import annotations

import itertools
import os
from typing import Annotated

import torch
import typer

import ddpm_fast as df
from ddpm_fast import ops
from ddpm_fast.commands.common import choose_device, console, plain_errors
from ddpm_fast.errors import InputError

BOTH = (torch.float32, torch.bfloat16)
SIZES = {
    (1, 1, 1): BOTH[:1],  # one element
    (2, 3, 5): BOTH[1:],  # a sequence, whose samples are not aligned to 16 bytes
    (3, 3, 7, 5): BOTH,  # odd everywhere
    (2, 4, 33, 31): BOTH,  # larger than a block, and no multiple of it
    (2, 3, 6, 6): BOTH,  # colour of whole quads a channel
    (1, 3, 64, 68): BOTH,  # whole 16-byte words, and sums in several parts
    (2, 3, 2, 3, 5): BOTH[:1],  # a volume
    (0, 3, 4, 4): BOTH[1:],  # no sample
}
NETWORK_SIZES = {  # with the number of groups, and the channels of a joined image
    (2, 8, 1, 1): (2, 0),  # one pixel
    (2, 12, 5, 3): (3, 6),  # a group across the border, and no whole warps
    (3, 64, 8, 8): (8, 64),
    (1, 128, 32, 32): (32, 0),  # all registers full
    (2, 24, 17, 19): (6, 0),  # the last lanes have fewer pixels
    (2, 5, 9, 7): (5, 0),  # one channel a group
    (1, 8, 53, 61): (1, 4),  # several chunks of pixels
    (0, 8, 4, 4): (2, 0),  # no sample
}
T = 10  # timesteps of the schedule

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def losses(diffusion: df.GaussianDiffusion, output: torch.Tensor, x0: torch.Tensor, key: df.NoiseKey) -> None:
    """The loss and the bound of an output, each with its gradient; t covers the decoder at 0."""
    t = torch.arange(len(x0), device=x0.device) % T
    for compute in (diffusion.training_losses, lambda *given: diffusion.vlb_terms(*given).bits_per_dim):
        loss = compute(output.requires_grad_(), x0, t, key)
        torch.autograd.grad(loss, output, torch.ones_like(loss))


def run_all(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: torch.device) -> None:
    """Every op at one size, in one dtype and memory format."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)] if channels_last else None

    def image(channels: int = 1) -> torch.Tensor:
        x = torch.randn((shape[0], channels * shape[1], *shape[2:]), device=device).to(dtype)
        return x.contiguous(memory_format=layout or torch.contiguous_format)

    key = df.NoiseKey.of(1, shape[0], device=device)
    t = torch.arange(shape[0], device=device) % T
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    schedule = df.Schedule.cosine(T)
    fixed = df.GaussianDiffusion(schedule)
    learned = df.GaussianDiffusion(schedule, variance="learned_range", loss="hybrid")
    ops.normal(key, shape[1:], dtype=dtype, memory_format=layout or torch.contiguous_format)
    torch.autograd.grad(ops.dropout(x := image().requires_grad_(), key, 3, 0.4).sum(), x)
    for x0, noise in itertools.product((pixels, image()), (key, image())):
        fixed.q_sample(x0, t, noise, dtype)
        losses(fixed, image(), x0, noise)
        losses(learned, image(2), x0, noise)
    p = torch.full((T,), 1 / T, dtype=torch.float64, device=device)
    for probabilities in (None, p):
        drop = ops.LabelDrop(torch.zeros_like(t), 0.5, 1)
        drawn = ops.draw_timesteps(
            key, T, parts=3, probabilities=probabilities, network_timesteps=t.new_ones(T), label_drop=drop
        )
        ops.record_losses(torch.zeros(T, 3, device=device), t.new_zeros(T), drawn.t, drawn.weights)
    step = torch.tensor(3, device=device)
    for diffusion, groups, previous in itertools.product((fixed, learned), (1, 2), (None, image())):
        if groups == 1 and diffusion is learned:
            continue
        table = df.samplers.ddpm_table(diffusion).coefficients.to(device, torch.float32)
        ops.reverse_step(image(), image(groups), table, step, key, x0_previous=previous)
        options = {"x0_previous": previous, "return_x0": True, "model_dtype": torch.bfloat16}
        ops.reverse_step(image().float(), image(groups), table, step, image(), **options)


def run_network(shape: tuple[int, ...], groups: int, joined: int, dtype: torch.dtype, device: torch.device) -> None:
    """The ops of a network at one size, with their gradients; joined: the channels of an image beside."""

    def image(channels: int) -> torch.Tensor:
        x = torch.randn((shape[0], channels, *shape[2:]), device=device).to(dtype)
        return x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def rows(channels: int) -> torch.Tensor:
        return torch.randn(shape[0], channels, device=device, requires_grad=True)

    own, channels = shape[1], shape[1] + joined
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    scale_shift = (rows(channels), rows(channels))
    addends = ops.Addends(image(own), image(own), rows(own))
    beside = image(joined) if joined else None
    total, y = ops.add_group_norm(
        addends, weight, bias, groups, 1e-5, scale_shift=scale_shift, joined=beside, silu=True
    )
    torch.autograd.grad([total, y], [*addends, *scale_shift], [torch.ones_like(total), torch.ones_like(y)])
    if not joined:
        y = ops.group_norm(addends.image, weight, bias, groups, 1e-5, added=addends.added)
        torch.autograd.grad(y.sum(), addends.image)
    leaves = addends.image, torch.zeros(own, device=device, requires_grad=True), addends.residual
    torch.autograd.grad(ops.add_bias(*leaves).sum(), leaves)


@app.command()
def main(
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    backend: Annotated[list[str], typer.Option(help="Run this backend alone (repeatable).")] = [],  # noqa: B006
) -> None:
    """Run every op on each backend that is there. Fails if none is."""
    with plain_errors():
        place, ran = choose_device(device), 0
        if place.type == "cuda" and os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
            console.print("Without PYTORCH_NO_CUDA_MEMORY_CACHING=1 a sanitizer misses most accesses out of bounds")
        statuses = {status.name: status for status in ops.backend_status()}
        for name in backend or ("cuda", "triton"):
            status = statuses.get(name)
            reason = f"there is no backend of this name, only {', '.join(statuses)}" if status is None else ""
            if reason := reason or status.unavailable or ops.cannot_run_on(name, place):
                console.print(f"{name}: not run: {reason}", soft_wrap=True)
                continue
            with df.use_backend(name):
                for shape, dtypes in SIZES.items():
                    formats = (False, True) if len(shape) > 3 else (False,)
                    for dtype, channels_last in itertools.product(dtypes, formats):
                        run_all(shape, dtype, channels_last, place)
                for shape, (groups, joined) in NETWORK_SIZES.items():
                    for dtype in BOTH:
                        run_network(shape, groups, joined, dtype, place)
            if place.type == "cuda":
                torch.cuda.synchronize(place)
            console.print(f"{name}: ran {len(SIZES) + len(NETWORK_SIZES)} shapes")
            ran += 1
        if not ran:
            raise InputError("no backend could run: see the reasons above, and python -m ddpm_fast.info")


if __name__ == "__main__":
    app()
