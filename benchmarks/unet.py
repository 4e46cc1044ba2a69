"""The U-Net by itself, forward, and forward and backward: the same weights in ours and in diffusers' UNet2DModel.

Forward in bf16 has weights in bf16, as sampling has them; forward and backward is under autocast, as training is. Each
result is compared with that of the other library's network in fp32: neither is the judge of itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from ddpm_fast.comparison import COMPILED, Case, Comparison, uncompiled
from ddpm_fast.operations import freshly_compiled
from torch import Tensor, nn

from ddpm_fast import networks, peers

# Of ||out - truth|| / ||truth||, of the output and of two layers' gradients.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
CHANNELS_LAST = "diffusers channels_last"


def build(case: Case, device: torch.device, compiling: bool) -> Comparison:
    """The variants of a case, compared."""
    made = networks.network(case.size)
    config, backward = made.model.config, case.layer.endswith("backward")
    work = networks.work(config)
    itemsize = case.torch_dtype.itemsize
    comparison = Comparison(
        case,
        flops=case.batch * (work.training_flops if backward else work.flops),
        bytes=(3 if backward else 1) * work.bytes(case.batch, itemsize),
    )
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, config.in_channels, config.image_size, config.image_size)
    x = torch.randn(shape, generator=generator).to(device)
    t = torch.randint(0, 1000, (case.batch,), generator=generator).to(device)
    labels = torch.arange(case.batch, device=device) % config.num_classes if config.num_classes else None
    probe = torch.randn(shape, generator=generator).to(device)
    # Weights in bf16 only where no gradient is wanted.
    dtype = torch.float32 if backward else case.torch_dtype

    def runner(call: Callable, model: nn.Module, channels_last: bool = False, exact: bool = False) -> Callable:
        """What calls a network by call(model, image), in fp32 if exact, and returns the tensors to compare."""
        image = x.to(next(model.parameters()).dtype)
        if channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        autocast = backward and case.dtype == "bf16" and not exact

        def run() -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    output = call(model, image)
                if backward:
                    model.zero_grad(set_to_none=True)
                    (output * probe).sum().backward()
            return [output.detach()]

        return run

    def ours(model: nn.Module, image: Tensor) -> Tensor:
        return model(image, t, labels)

    def theirs(model: nn.Module, image: Tensor) -> Tensor:
        return model(image, t, class_labels=labels).sample

    def seen(run: Callable, model: nn.Module) -> list[Tensor]:
        """What is compared of a run: the output, and the gradients of the first convolution and of the time embedding's
        first layer, which all others lie behind."""
        results = run()
        if backward:
            embedding = model.time_embedding
            first = embedding.linear1 if hasattr(embedding, "linear1") else embedding.linear_1
            results += [model.conv_in.weight.grad.clone(), first.weight.grad.clone()]
        return results

    exact = made.model.to(device)
    fp32 = seen(runner(ours, exact, exact=True), exact)
    model = copy.deepcopy(exact).to(dtype)
    comparison.add_ours("ddpm_fast", runner(ours, model))
    variants = {"ddpm_fast": (model, fp32)} if case.dtype == "bf16" else {}  # in fp32 not with itself
    if comparison.has(peers.DIFFUSERS):
        peer = networks.same_weights(exact)
        variants["ddpm_fast"] = (model, seen(runner(theirs, peer, exact=True), peer))
        peer = peer.to(dtype)
        comparison.runs[peers.DIFFUSERS] = runner(theirs, peer)
        last = copy.deepcopy(peer).to(memory_format=torch.channels_last)
        comparison.runs[CHANNELS_LAST] = runner(theirs, last, channels_last=True)
        variants |= {peers.DIFFUSERS: (peer, fp32), CHANNELS_LAST: (last, fp32)}
        if reason := uncompiled(case, device, compiling):
            comparison.absent[COMPILED] = reason
        else:
            compiled = copy.deepcopy(peer)
            comparison.runs[COMPILED] = runner(freshly_compiled(theirs), compiled)
            variants[COMPILED] = (compiled, fp32)
    for label, (network, truths) in variants.items():
        for result, truth in zip(seen(comparison.runs[label], network), truths, strict=True):
            comparison.compare(label, result, truth, TOLERANCE[case.dtype])
    return comparison
