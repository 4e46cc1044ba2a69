"""Triton kernels compiled for GPUs on a machine that has none: what the compiler's output must and must not hold.

Each op is called as it would be on a GPU, its launches are caught, and compiled with the types, constants, alignment
and number of warps that they had. What was measured, in machine instructions for one element (a kernel's instructions
over the elements of a thread), branches not taken included: the kernels of the bound hold three formulas.

MEASURED
"""

import os
import re

import pytest
import torch

from benchmarks import sass
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import triton as backend

triton = pytest.importorskip("triton", reason="the package triton is not installed: pip install triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from ddpm_fast.ops.triton import bound, diffusion_loss, loss_backward, normal, q_sample, reverse_step  # noqa: E402

