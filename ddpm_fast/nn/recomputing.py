"""Gradient checkpointing (Chen et al. 2016): the backward of a stage computes its activations again, so that a forward
keeps only what goes from one stage to the next. The gradients are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


def recomputed(stage: nn.Module, on: Tensor, draws: bool) -> Callable[..., Any]:
    """What is called in place of a stage.

    An image that is pending (pending.py) is added up by the stage that reads it, and stays so: the second time the
    stage reads the sum, of which its norm saves the same tensors. So nothing but the sum is kept of it.

    Args:
        stage: A module.
        on: A tensor on the device where it computes, whose autocast is restored in the backward.
        draws: Whether it draws random numbers from torch's generator, whose state then has to be restored as well.
            Under torch.compile such a stage keeps its activations.

    Returns:
        A function of the same arguments.
    """
    if torch.compiler.is_compiling():
        # A compiled graph does not restore the generator (torch 2.13): the backward would be that of other masks.
        return stage if draws else lambda *given: checkpoint(stage, *given, use_reentrant=False)
    # The backward may run in a thread of its own, and after functional_call has put the module's own weights back: the
    # choice of a backend and the weights are those of now.
    context = copy_context()
    weights: dict[str, Tensor] = dict(stage.named_parameters())

    def call(*given: Any) -> Any:
        def run(_: Tensor) -> Any:
            return context.run(functional_call, stage, weights, given, tie_weights=False)

        return checkpoint(run, on, use_reentrant=False, preserve_rng_state=draws)

    return call
