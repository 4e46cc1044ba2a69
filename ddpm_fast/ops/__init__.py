"""The fused ops. Use them inside any training or sampling loop.

Images are [N, C, ...] with any number of trailing dimensions. Storage is uint8 (x0 only: pixels 0..255 mean -1..1),
fp32, bf16 or fp16; arithmetic is fp32, rounded once. float64 runs on the `reference` backend, in float64. Contiguous
and channels_last tensors are read in place; tensors with other strides are copied first. `noise` is a tensor shaped
like x0, or a NoiseKey: then the op draws the noise itself and never stores it. Everything that a kernel indexes with
(tables, t, step, seed) lives on the images' device, so that no call waits for it.

Each module below has its ops' public functions, and beside each its checks and what PyTorch is told of it. Kernels
are in backends/, and dispatch.py chooses among them.
"""

from __future__ import annotations

from ddpm_fast.ops.channels import add_bias
from ddpm_fast.ops.convolution import convolve, winograd, winograd_filters
from ddpm_fast.ops.dispatch import active_backend, backend_status, cannot_run_on, has_kernel, use_backend
from ddpm_fast.ops.drawing import LabelDrop, draw_timesteps, record_losses
from ddpm_fast.ops.dropping import dropout
from ddpm_fast.ops.losses import diffusion_loss, hybrid_loss, vlb_terms
from ddpm_fast.ops.noising import normal, q_sample
from ddpm_fast.ops.norm import Addends, add_group_norm, group_norm
from ddpm_fast.ops.stepping import reverse_step, reverse_step_
from ddpm_fast.ops.tensors import Drawn, ReverseStep, VlbTerms

__all__ = [
    "Addends",
    "Drawn",
    "LabelDrop",
    "ReverseStep",
    "VlbTerms",
    "active_backend",
    "add_bias",
    "add_group_norm",
    "backend_status",
    "cannot_run_on",
    "convolve",
    "diffusion_loss",
    "draw_timesteps",
    "dropout",
    "group_norm",
    "has_kernel",
    "hybrid_loss",
    "normal",
    "q_sample",
    "record_losses",
    "reverse_step",
    "reverse_step_",
    "use_backend",
    "vlb_terms",
    "winograd",
    "winograd_filters",
]
