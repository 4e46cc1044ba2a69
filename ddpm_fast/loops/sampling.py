"""Sampling: what every sampler and every way of editing begins with.

Noise comes from each sample's own counter, so a sample has the same noise whatever the batch it is drawn in. What
remains is the network's own dependence on the batch size, which is rounding.

Drawing takes two steps. prepare() decides and checks everything and computes nothing; what it returns, a Prepared, runs
the table (prepared.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import check_integer
from ddpm_fast.loops.classifier_guidance import Judge, targets_and_labels
from ddpm_fast.loops.compiled import check_compiler
from ddpm_fast.loops.guidance import null_class
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import SamplingKeywords, SamplingOptions
from ddpm_fast.loops.prepared import Prepared, why_no_graph
from ddpm_fast.noise import NoiseKey
from ddpm_fast.samplers import make_table


def prepare(network: Network, diffusion: GaussianDiffusion, n: int, options: SamplingOptions) -> Prepared:
    """Decide and check everything that drawing n images from pure noise needs.

    Raises:
        InputError: For n < 0, for labels, a shape, guidance, a condition, a classifier or an output that do not fit the
            model, for steps that the diffusion does not have, for sample ids out of range, and where a CUDA graph or a
            compiled network was asked for but cannot be.
    """
    n = check_integer("n", n, 0)
    network.check_output(diffusion.objective.learned)
    scale = 1.0 if options.classifier_scale is None else options.classifier_scale
    judge = Judge.of(options.classifier, scale, network.device)
    targets, labels = targets_and_labels(network, judge, options.labels, n)
    prepared = Prepared(
        network=network,
        diffusion=diffusion,
        options=options,
        table=make_table(
            diffusion,
            options.sampler,
            options.steps,
            spacing=options.spacing,
            eta=options.eta,
            clip=options.clip,
        ),
        shape=network.sample_shape(options.shape),
        labels=labels,
        null_label=null_class(network, options.labels, options.guidance, options.null_label),
        key=NoiseKey.of(options.seed, n, first_sample_id=options.first_sample_id, device=network.device),
        condition=network.check_condition(options.condition, n),
        judge=judge if scale else None,
        targets=targets if scale else None,
    )
    if options.compile:
        check_compiler(network.device)
    if options.cuda_graph:
        why_no_graph(network, judge, options.cuda_graph)
    return prepared


def sample(
    model: Callable[..., Any], diffusion: GaussianDiffusion, n: int, **options: Unpack[SamplingKeywords]
) -> Tensor:
    """Draw n images.

    Image i depends on (seed, first_sample_id + i, its label, and the options of sampler and guidance) and on nothing
    else but the network's rounding.

    A CUDA graph is captured at the third row of its kind and kept with the model for calls of the same shapes and
    options, as long as the weights stay where they are; their values may change. It repeats what the network did when
    it was captured: a network of one's own whose forward does more than arithmetic on tensors needs cuda_graph=False.

    Args:
        model: A UNet, diffusers' UNet2DModel, or any module or function called as model(x, t) or model(x, t, labels),
            with x [N, C, ...] and t int64 [N]. For one that does not say its shape give shape=(C, ...). See Foreign for
            where a function is.
        diffusion: The diffusion that the model was trained for.
        n: The number of images.
        **options: The fields of SamplingOptions, which describes each: sampler, steps, spacing, eta, clip, guidance,
            guidance_rescale, dynamic_threshold, null_label, classifier, classifier_scale, condition, seed,
            first_sample_id, labels, batch_size, shape, on_step, cuda_graph and compile.

    Returns:
        fp32 [n, C, H, W] (or [n, *shape]), about in [-1, 1], on the model's device.

    Raises:
        InputError: Before anything is drawn, for whatever SamplingOptions and prepare refuse. Only a network of one's
            own whose output does not fit, or that cannot be compiled, shows it at the first row.
    """
    return prepare(Network.of(model), diffusion, n, SamplingOptions(**options)).draw()
