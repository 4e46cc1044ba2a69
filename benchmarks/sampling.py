"""Sampling end to end, a chain of steps from noise to images: ours beside the loops that one would use otherwise.

Plain torch on our network, as the reference codes have it; diffusers' DDPMScheduler loop and DDPMPipeline on its own
network with the same weights; and denoising-diffusion-pytorch on its own network, which cannot hold these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from ddpm_fast.comparison import COMPILED, Case, Comparison, uncompiled
from ddpm_fast.operations import freshly_compiled, stepped
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast import networks, peers
from ddpm_fast.samplers import SamplerTable, make_table

# Of ||out - truth|| / ||truth||. Two ways of the same steps round differently, and a network passes that on; diffusers
# keeps its state in the network's dtype, and rounds it to bf16 at every step.
TOLERANCE = {"fp32": 1e-2, "bf16": 1e-1}
# How ours is asked to run, by the kind of device.
WAYS = {
    "cpu": {"ddpm_fast": {}},
    "cuda": {"graph": {"cuda_graph": True}, "no graph": {"cuda_graph": False}},
}
PIPELINE = "diffusers DDPMPipeline"


@torch.inference_mode()
def plain_sampling(
    model: nn.Module, table: SamplerTable, x: Tensor, normal: Callable[[int], Tensor], labels: Tensor | None = None
) -> Tensor:
    """Ancestral sampling as one writes it in plain torch; normal(i) is the noise of row i."""
    rows, dtype = table.coefficients.to(x.device, torch.float32), next(model.parameters()).dtype
    for i, t in enumerate(table.timesteps.tolist()):
        output = model(x.to(dtype), torch.full((len(x),), t, device=x.device), labels)
        x = stepped(x, output, rows[i], normal(i))
    return x


def peer_scheduler(diffusion: df.GaussianDiffusion, steps: int):
    """diffusers' scheduler of a diffusion, with the timesteps that ours visits."""
    from diffusers import DDPMScheduler

    made = DDPMScheduler(
        num_train_timesteps=diffusion.num_timesteps,
        trained_betas=diffusion.schedule.betas.numpy(),
        variance_type="fixed_small",
        clip_sample=True,
        prediction_type={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[diffusion.objective.prediction],
        timestep_spacing="linspace",
    )
    made.set_timesteps(steps)
    return made


@torch.inference_mode()
def peer_sampling(call: Callable, chain, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The loop of diffusers' DDPMPipeline; call(image, t) is its network's output."""
    image = noise_like(shape, dtype, device)
    for t in chain.timesteps:
        image = chain.step(call(image, t), t, image).prev_sample
    return image


def noise_like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The noise that a chain starts from, drawn by the function that diffusers' pipelines draw it with."""
    from diffusers.schedulers import scheduling_ddpm

    return scheduling_ddpm.randn_tensor(shape, device=device, dtype=dtype)


@contextlib.contextmanager
def given_noise(normals: Iterator[Tensor]):
    """Inside, diffusers draws these normals, one tensor after the other."""
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm

    def drawn(shape, generator=None, device=None, dtype=None, layout=None) -> Tensor:
        return next(normals).to(dtype or torch.float32)

    with (
        mock.patch.object(scheduling_ddpm, "randn_tensor", drawn),
        mock.patch.object(pipeline_ddpm, "randn_tensor", drawn),
    ):
        yield


def build(case: Case, device: torch.device, compiling: bool) -> Comparison:
    """A batch in a chain of case.steps steps: the variants of a case, compared where they have the same weights."""
    made, dtype, n = networks.network(case.size), case.torch_dtype, case.batch
    model, diffusion, config = made.model.to(device, dtype), made.diffusion, made.model.config
    shape = (n, config.in_channels, config.image_size, config.image_size)
    work, elements = networks.work(config), shape[1] * shape[2] * shape[3]
    comparison = Comparison(
        case,
        flops=n * work.flops,
        # the network, and the state: read and written in fp32, with its copy for the network and the network's output
        bytes=work.bytes(n, dtype.itemsize) + n * elements * (8 + 2 * dtype.itemsize),
        normals=n * elements,
    )
    table = make_table(diffusion, "ddpm", case.steps)
    labels = torch.arange(n, device=device) % config.num_classes if config.num_classes else None

    def normals(i: int) -> Tensor:
        """Ours: of row i, and for -1 those that the chain starts from."""
        stream = df.Stream.REVERSE if i >= 0 else df.Stream.INITIAL
        key = df.NoiseKey.of(0, n, step=max(i, 0), stream=stream, device=device)
        return df.ops.normal(key, shape[1:], memory_format=torch.channels_last)

    truth = plain_sampling(model, table, normals(-1), normals, labels)
    for label, options in WAYS[device.type].items():
        comparison.add_ours(
            label,
            lambda options=options: df.sample(model, diffusion, n, steps=case.steps, labels=labels, **options),
        )
        comparison.compare(label, comparison.runs[label](), truth, TOLERANCE[case.dtype])
    comparison.runs["torch"] = lambda: plain_sampling(
        *(model, table, torch.randn(shape, device=device), lambda i: torch.randn(shape, device=device), labels)
    )
    if comparison.has(peers.DIFFUSERS):
        _add_diffusers(comparison, made._replace(model=model), table, labels, truth, normals, compiling)
    if comparison.has(peers.LUCIDRAINS):
        peer = networks.lucidrains_network(case.size, config.in_channels).to(device, dtype).eval()
        chain = peers.lucidrains_diffusion(peer, config.image_size, case.steps).to(device)
        if dtype == torch.float32:

            def sampled() -> Tensor:
                with peers.silent():
                    return chain.sample(batch_size=n)

            comparison.runs[peers.LUCIDRAINS] = sampled
            comparison.notes.append(
                networks.lucidrains_note(case.size, config) + "; its DDIM with eta 1, without labels"
            )
        else:
            comparison.absent[peers.LUCIDRAINS] = "it samples in float32: its loop draws states of no other dtype"
    return comparison


def _add_diffusers(
    comparison: Comparison,
    made: networks.Network,
    table: SamplerTable,
    labels: Tensor | None,
    truth: Tensor,
    normals: Callable[[int], Tensor],
    compiling: bool,
) -> None:
    """diffusers' loop, the same with its network compiled, and its pipeline."""
    case, device, dtype = comparison.case, truth.device, comparison.case.torch_dtype
    peer, chain = networks.same_weights(made.model), peer_scheduler(made.diffusion, case.steps)
    if chain.timesteps.tolist() != table.timesteps.tolist():
        chain.set_timesteps(timesteps=table.timesteps.tolist())

    def call(image: Tensor, t: Tensor) -> Tensor:
        return peer(image, t, class_labels=labels).sample

    def drawn() -> contextlib.AbstractContextManager:
        return given_noise(normals(i - 1) for i in range(case.steps + 1))

    def add(label: str, run: Callable[[], Tensor], expected: Tensor = truth) -> None:
        with drawn():
            comparison.compare(label, run(), expected, TOLERANCE[case.dtype])
        comparison.runs[label] = run

    shape = tuple(truth.shape)
    add(peers.DIFFUSERS, lambda: peer_sampling(call, chain, shape, dtype, device))
    if reason := uncompiled(case, device, compiling):
        comparison.absent[COMPILED] = reason
    else:
        compiled = freshly_compiled(call)
        add(COMPILED, lambda: peer_sampling(compiled, chain, shape, dtype, device))
    if labels is not None:
        comparison.absent[PIPELINE] = "it has no labels to give to a network that takes them"
        return
    if dtype == torch.bfloat16:
        comparison.absent[PIPELINE] = "it ends in NumPy, which has no bfloat16"
        return
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline(peer, peer_scheduler(made.diffusion, case.steps))
    pipeline.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        made = pipeline(batch_size=case.batch, num_inference_steps=case.steps, output_type="np").images
        return torch.from_numpy(made).permute(0, 3, 1, 2)

    add(PIPELINE, images, (truth / 2 + 0.5).clamp(0, 1).cpu())
