"""The ops as Triton kernels, one file for each op. They run on CUDA tensors, and with TRITON_INTERPRET=1 on CPU
tensors, through Triton's interpreter.
"""

from __future__ import annotations

import os

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)  # uint8 as x0 alone
OPS = {}

try:
    import triton  # noqa: F401

    unavailable = ""
except ImportError as error:
    unavailable = f"the package triton is not there ({error}). Install it: pip install triton"
else:
    from ddpm_fast.ops.backends.triton.bound import hybrid_loss, vlb_terms
    from ddpm_fast.ops.backends.triton.channels import add_bias, channel_sums, group_norm_parameters
    from ddpm_fast.ops.backends.triton.diffusion_loss import diffusion_loss
    from ddpm_fast.ops.backends.triton.draws import draw_timesteps, record_losses
    from ddpm_fast.ops.backends.triton.dropout import dropout
    from ddpm_fast.ops.backends.triton.group_norm import group_norm
    from ddpm_fast.ops.backends.triton.group_norm_backward import group_norm_backward
    from ddpm_fast.ops.backends.triton.loss_backward import loss_backward
    from ddpm_fast.ops.backends.triton.normal import normal
    from ddpm_fast.ops.backends.triton.q_sample import q_sample
    from ddpm_fast.ops.backends.triton.reverse_step import reverse_step

    kernels = (
        normal,
        q_sample,
        diffusion_loss,
        hybrid_loss,
        vlb_terms,
        loss_backward,
        reverse_step,
        draw_timesteps,
        record_losses,
        dropout,
        group_norm,
        group_norm_backward,
        group_norm_parameters,
        add_bias,
        channel_sums,
    )
    OPS = {kernel.__name__: kernel for kernel in kernels}


def refusal(device: torch.device) -> str:
    """Why Triton cannot run on tensors of this device, or the empty string."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return (
        f"Triton compiles for GPUs and these tensors are on {device}. Its interpreter runs them here, slowly: set "
        "TRITON_INTERPRET=1 before Python starts"
    )
