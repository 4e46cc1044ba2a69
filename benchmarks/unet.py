"""The U-Net by itself, forward, and forward and backward: the same weights in ours and in diffusers' UNet2DModel.

Forward in bf16 has weights in bf16, as sampling has them; forward and backward is under autocast, as training is. Each
result is compared with that of the other library's network in fp32: neither is the judge of itself.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.comparison import Comparison
from ddpm_fast.formats.diffusers.network import same_weights

# Of ||out - truth|| / ||truth||, of the output and of two layers' gradients.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
CHANNELS_LAST = "diffusers channels_last"


def seen(run: Callable, model: nn.Module) -> list[Tensor]:
    """What is compared of a run: the output, and after a backward pass the gradients of the first convolution and of
    the time embedding's first layer, which all others lie behind."""
    results, embedding = [run()], model.time_embedding
    first = embedding.linear1 if hasattr(embedding, "linear1") else embedding.linear_1
    return results + [layer.weight.grad.clone() for layer in (model.conv_in, first) if layer.weight.grad is not None]


def add_variants(made: Comparison) -> None:
    """Add the variants of a case, compared."""
    case, device, labels, exact = made.case, made.device, made.labels, made.model
    backward = case.layer.endswith("backward")
    made.counts["flops"] = case.batch * (made.work.training_flops if backward else made.work.flops)
    made.counts["bytes"] = (3 if backward else 1) * made.work.bytes(case.batch, case.torch_dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(made.shape, generator=generator).to(device)
    t = torch.randint(0, 1000, made.shape[:1], generator=generator).to(device)
    probe = torch.randn(made.shape, generator=generator).to(device)
    # Weights in bf16 only where no gradient is wanted.
    dtype = torch.float32 if backward else case.torch_dtype

    def runner(call: Callable, model: nn.Module, autocast: bool, channels_last: bool = False) -> Callable:
        """What calls a network by call(model, image), and returns its output."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        image = x.to(next(model.parameters()).dtype).contiguous(memory_format=layout)

        def run() -> Tensor:
            with torch.set_grad_enabled(backward):
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    output = call(model, image)
                if backward:
                    model.zero_grad(set_to_none=True)
                    (output * probe).sum().backward()
            return output.detach()

        return run

    def ours(model: nn.Module, image: Tensor) -> Tensor:
        return model(image, t, labels)

    def theirs(model: nn.Module, image: Tensor) -> Tensor:
        return model(image, t, class_labels=labels).sample

    def add(label: str, run: Callable, model: nn.Module, truths: list[Tensor]) -> None:
        made.runs[label] = run
        for result, truth in zip(seen(run, model), truths, strict=True):
            made.compare(label, result, truth, TOLERANCE[case.dtype])

    autocast = backward and case.dtype == "bf16"
    fp32 = seen(runner(ours, exact, autocast=False), exact)
    model = copy.deepcopy(exact).to(dtype)
    run = runner(ours, model, autocast)
    made.ours.append("ddpm_fast")
    made.runs["ddpm_fast"] = run
    if not made.has(peers.DIFFUSERS):
        if case.dtype == "bf16":  # in fp32 not with itself
            add("ddpm_fast", run, model, fp32)
        return
    peer = same_weights(exact)
    add("ddpm_fast", run, model, seen(runner(theirs, peer, autocast=False), peer))
    peer = peer.to(dtype)
    add(peers.DIFFUSERS, runner(theirs, peer, autocast), peer, fp32)
    last = copy.deepcopy(peer).to(memory_format=torch.channels_last)
    add(CHANNELS_LAST, runner(theirs, last, autocast, channels_last=True), last, fp32)

    def add_compiled(label: str, compiled: Callable) -> None:
        model = peers.fastest_layout(copy.deepcopy(peer))
        add(label, runner(compiled(theirs), model, autocast, channels_last=device.type == "cuda"), model, fp32)

    made.add_compiled(add_compiled)
