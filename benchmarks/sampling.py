"""Sampling end to end, from noise to images: ours compared with the loops that one would use instead."""

import functools
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks import peers
from benchmarks.comparison import Comparison
from ddpm_fast.formats.diffusers.network import same_weights, scheduler
from ddpm_fast.formats.load import load_model
from ddpm_fast.samplers import SamplerTable, make_table
from tests.support.diffusers_loops import diffusers_sampling, given_noise
from tests.support.plain import plain_sampling

# Of ||out - truth|| / ||truth||. Two ways of the same steps round differently, and a network passes that on; diffusers
# keeps its state in the network's dtype, and rounds it to bf16 at every step.
TOLERANCE = {"fp32": 1e-2, "bf16": 1e-1}
PIPELINE = "diffusers DDPMPipeline"
FOLDER = "ddpm_fast, a folder of diffusers"  # ours with the network that such a pipeline has saved


def add_variants(made: Comparison) -> None:
    """Add the variants of a batch in a chain of case.steps steps, compared where they have the same weights."""
    case, device, dtype, n, shape = made.case, made.device, made.case.torch_dtype, made.case.batch, made.shape
    model, diffusion, labels = made.model.to(dtype), made.diffusion, made.labels
    elements = shape[1] * shape[2] * shape[3]
    made.counts["flops"] = n * made.work.flops
    # the network, and the state: read and written in fp32, with its copy for the network and the network's output
    made.counts["bytes"] = made.work.bytes(n, dtype.itemsize) + n * elements * (8 + 2 * dtype.itemsize)
    made.counts["normals"] = n * elements
    table = make_table(diffusion, "ddpm", case.steps)

    def normals(i: int) -> Tensor:
        """Ours: of row i, and for -1 those that the chain starts from."""
        stream = df.Stream.REVERSE if i >= 0 else df.Stream.INITIAL
        key = df.NoiseKey.of(0, n, step=max(i, 0), stream=stream, device=device)
        return df.ops.normal(key, shape[1:], memory_format=torch.channels_last)

    def plain() -> Tensor:
        start = torch.randn(shape, device=device)
        return plain_sampling(model, table, start, lambda i: torch.randn(shape, device=device), labels)

    truth = plain_sampling(model, table, normals(-1), normals, labels)
    for label, options in made.ways().items():
        run = functools.partial(df.sample, model, diffusion, n, steps=case.steps, labels=labels, **options)
        with made.run.surviving(f"{case}, {label}"):
            made.compare(label, run(), truth, TOLERANCE[case.dtype])
            made.ours.append(label)
            made.runs[label] = run
    made.runs["torch"] = plain
    if made.has(peers.DIFFUSERS):
        _add_diffusers(made, table, truth, normals)
    if made.has(peers.LUCIDRAINS):
        _add_lucidrains(made)


def _add_lucidrains(made: Comparison) -> None:
    case, device = made.case, made.device
    if case.dtype != "fp32":
        made.absent(peers.LUCIDRAINS, "it samples in float32: its loop draws states of no other dtype")
        return
    network = peers.lucidrains_network(case.size, made.config.in_channels).to(device).eval()
    chain = peers.lucidrains_diffusion(network, made.config.image_size, case.steps).to(device)

    def sampled() -> Tensor:
        with peers.silent():
            return chain.sample(batch_size=case.batch)

    made.runs[peers.LUCIDRAINS] = sampled
    made.note_lucidrains("its DDIM with eta 1, without labels")


def _add_diffusers(made: Comparison, table: SamplerTable, truth: Tensor, normals: Callable[[int], Tensor]) -> None:
    """diffusers' loop, the same with its network compiled, and its pipeline."""
    from diffusers import DDPMPipeline

    case, labels, dtype = made.case, made.labels, made.case.torch_dtype
    peer, chain = peers.fastest_layout(same_weights(made.model)), scheduler(made.diffusion, table.timesteps.tolist())

    def call(image: Tensor, t: Tensor) -> Tensor:
        return peer(image, t, class_labels=labels).sample

    def sampled(call: Callable) -> Tensor:
        return diffusers_sampling(call, chain, made.shape, dtype, made.device)

    def add(label: str, run: Callable[[], Tensor], expected: Tensor = truth) -> None:
        with given_noise(normals(i - 1) for i in range(case.steps + 1)):
            made.compare(label, run(), expected, TOLERANCE[case.dtype])
        made.runs[label] = run

    add(peers.DIFFUSERS, lambda: sampled(call))

    def add_compiled(label: str, compiled: Callable) -> None:
        function = compiled(call)
        add(label, lambda: sampled(function))

    made.add_compiled(add_compiled)
    if labels is not None or dtype == torch.bfloat16:
        reason = "it has no labels to give to a network that takes them" if labels is not None else ""
        made.absent(PIPELINE, reason or "it ends in NumPy, which has no bfloat16")
        made.absent(FOLDER, f"it is compared with {PIPELINE}")
        return
    pipeline = DDPMPipeline(peer, scheduler(made.diffusion))
    pipeline.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        made = pipeline(batch_size=case.batch, num_inference_steps=case.steps, output_type="np").images
        return torch.from_numpy(made).permute(0, 3, 1, 2)

    add(PIPELINE, images, (truth / 2 + 0.5).clamp(0, 1).cpu())
    with tempfile.TemporaryDirectory() as place:
        pipeline.save_pretrained(place)
        loaded = load_model(place, made.device)
    options = next(iter(made.ways().values()))
    run = functools.partial(df.sample, loaded.model, loaded.diffusion, case.batch, steps=case.steps, **options)
    made.compare(FOLDER, run(), truth, TOLERANCE[case.dtype])
    made.ours.append(FOLDER)
    made.runs[FOLDER] = run
