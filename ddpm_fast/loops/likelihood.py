"""How likely a model finds images: the variational bound on -log p(x_0), summed over the chain, in bits/dim.

-log p(x_0) <= L_T + sum_{t>1} L_{t-1} + L_0 [Ho et al. 2020, eq. 5]. Every term but the prior's costs the network one
evaluation, so there is also an unbiased estimate from fewer of them, which says that it is one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ddpm_fast.errors import InputError
from ddpm_fast.loops.network import Network, evaluating
from ddpm_fast.noise import NoiseKey, Stream, uniform_integers
from ddpm_fast.respacing import sampling_timesteps
from ddpm_fast.schedule import Schedule


class Bound(Protocol):
    """What the loop asks of a diffusion. It is named here, and GaussianDiffusion not imported, because that class's
    bits_per_dim calls this loop: it is the one place where a formula reaches for a loop."""

    schedule: Schedule

    @property
    def num_timesteps(self) -> int: ...

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor | NoiseKey, dtype: torch.dtype | None = None) -> Tensor: ...

    def vlb_terms(
        self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor | NoiseKey, clip: bool = True, decoder: str = "paper"
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def prior_bits_per_dim(self, x0: Tensor) -> Tensor: ...


class BitsPerDim(NamedTuple):
    """The bound on each image's -log p(x_0), and its parts, in bits/dim; fp32 on the images' device.

    total = prior + sum over s of counts[s] * terms[:, s].
    """

    total: Tensor  # [N]
    prior: Tensor  # [N]: L_T
    terms: Tensor  # [N, S]: the bound's terms at `timesteps`; column 0 is L_0
    mse_x0: Tensor  # [N, S]: of the predicted x_0, clipped as the terms have it
    mse_eps: Tensor  # [N, S]: of the eps that follows from it
    timesteps: Tensor  # int64 [N, S]: indices into the schedule; column 0 is 0
    counts: Tensor  # [S]: how many of the chain's terms each column stands for

    @property
    def is_estimate(self) -> bool:
        """Whether terms were left out. The total is then an unbiased estimate of the bound, image by image."""
        return self.timesteps.shape[1] < int(self.counts.sum())


@torch.inference_mode()
def bits_per_dim(
    diffusion: Bound,
    model: nn.Module,
    x0: Tensor,
    *,
    steps: int | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    seed: int = 0,
    first_sample_id: int = 0,
    clip: bool = True,
    decoder: str = "paper",
    on_step: Callable[[int, int], None] | None = None,
) -> BitsPerDim:
    """The variational bound of the images x0 [N, C, ...] (floats in [-1, 1], or uint8) in bits/dim [H eq. 5, 13].

    model: called as model(x_t, t) or model(x_t, t, labels), in the dtype of its parameters. steps: None for every term,
    one evaluation of the network each: the bound itself. A number S below T estimates it from S terms: L_0, and one t
    drawn for each image from each of S - 1 stretches of the chain, short ones near t = 0 where the terms are large.
    The noise and the drawn t depend on (seed, first_sample_id + i, t or stretch) alone, not on the batch. labels: a
    class for all, or one each. clip, decoder: see GaussianDiffusion.vlb_terms. on_step(done, S) is called after each
    evaluation.
    Raises InputError for steps outside 2..T (1..T for T = 1), and for labels, images or outputs that do not fit.
    """
    T = diffusion.num_timesteps
    if steps is not None and not min(2, T) <= steps <= T:
        raise InputError(f"steps is {steps}; expected {min(2, T)}..{T} (the model's T), or None for all of them")
    prior = diffusion.prior_bits_per_dim(x0)
    device, n = x0.device, x0.shape[0]
    ends = sampling_timesteps(steps, T, "quadratic" if steps is not None else "even")
    key = NoiseKey.of(seed, n, first_sample_id=first_sample_id, stream=Stream.EVALUATION, device=device)
    told = diffusion.schedule.timesteps.to(device)
    network = Network.of(model)
    dtype = network.dtype or torch.float32
    labels = network.check_labels(labels, n)
    labels = None if labels is None else labels.to(device)
    columns = []
    with evaluating(model):
        for s, end in enumerate(ends):
            first = ends[s - 1] + 1 if s else 0
            t = first + uniform_integers(replace(key, stream=Stream.TIMESTEP), end - first + 1)
            x_t = diffusion.q_sample(x0, t, key, dtype=dtype)
            asked = told.index_select(0, t)
            output = model(x_t, asked) if labels is None else model(x_t, asked, labels)
            columns.append((*diffusion.vlb_terms(output, x0, t, key, clip=clip, decoder=decoder), t))
            key.step.add_(1)
            if on_step is not None:
                on_step(s + 1, len(ends))
    terms, mse_x0, mse_eps, timesteps = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    counts = torch.tensor([1, *(b - a for a, b in itertools.pairwise(ends))], device=device, dtype=terms.dtype)
    return BitsPerDim(prior + terms @ counts, prior, terms, mse_x0, mse_eps, timesteps, counts)
