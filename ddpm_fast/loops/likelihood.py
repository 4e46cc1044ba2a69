"""How likely a model finds images: the variational bound on -log p(x_0), summed over the chain, in bits/dim.

-log p(x_0) <= L_T + sum_{t>1} L_{t-1} + L_0 [H: Ho et al. 2020, eq. 5]. Every term except the prior's L_T costs one
call of the network, so there is also an unbiased estimate from fewer terms, which says that it is an estimate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from ddpm_fast.errors import check_integer
from ddpm_fast.loops.inputs import scaled_to
from ddpm_fast.loops.network import Network, evaluating
from ddpm_fast.nn import derived
from ddpm_fast.noise import NoiseKey, Stream, uniform_integers
from ddpm_fast.respacing import sampling_timesteps
from ddpm_fast.schedule import Schedule


class BoundedDiffusion(Protocol):
    """What this loop asks of a diffusion.

    It stands in place of GaussianDiffusion, which this module cannot import: the method GaussianDiffusion.bits_per_dim
    calls this loop. That is the one place where the theory calls a loop.
    """

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

    Attributes:
        total: [N], the bound.
        prior: [N], L_T.
        terms: [N, S], the terms of the bound at `timesteps`. Column 0 is L_0.
        mse_x0: [N, S], the mean squared errors of the predicted x_0, clipped as for the terms.
        mse_eps: [N, S], the mean squared errors of the eps that follows from it.
        timesteps: int64 [N, S], indices into the schedule. Column 0 is 0.
        counts: [S], how many terms of the chain each column stands for.
    """

    total: Tensor
    prior: Tensor
    terms: Tensor
    mse_x0: Tensor
    mse_eps: Tensor
    timesteps: Tensor
    counts: Tensor

    @property
    def is_estimate(self) -> bool:
        """Whether terms were left out. Then the total is an unbiased estimate of the bound, for each image."""
        return self.timesteps.shape[1] < int(self.counts.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class LikelihoodOptions:
    """How the bound is computed.

    Attributes:
        steps: How many terms to evaluate. None for all T, which gives the bound itself. A number S below T gives an
            estimate from S terms: L_0, and one t that is drawn for each image from each of S - 1 stretches of the
            chain, which are short near t = 0, where the terms are large.
        labels: One class for all images, or one for each. None for unconditional calls.
        condition: The second image of a network that takes one, [n or 1, condition_channels, h, w]; see
            SamplingOptions.
        seed: Seed of the noise and of the drawn t. Both depend on (seed, first_sample_id + i, t or stretch) alone, not
            on the batch.
        first_sample_id: The sample id of the first image.
        clip: Whether the predicted x_0 is clipped; see GaussianDiffusion.vlb_terms.
        decoder: "paper" or "exact"; see GaussianDiffusion.vlb_terms.
        on_step: Called as on_step(done, S) after each call of the network.
    """

    steps: int | None = None
    labels: int | Sequence[int] | Tensor | None = None
    condition: Tensor | None = None
    seed: int = 0
    first_sample_id: int = 0
    clip: bool = True
    decoder: str = "paper"
    on_step: Callable[[int, int], None] | None = None


class LikelihoodKeywords(TypedDict, total=False):
    """The keyword arguments of bits_per_dim(), which are the fields of LikelihoodOptions."""

    steps: int | None
    labels: int | Sequence[int] | Tensor | None
    condition: Tensor | None
    seed: int
    first_sample_id: int
    clip: bool
    decoder: str
    on_step: Callable[[int, int], None] | None


@torch.inference_mode()
def bits_per_dim(
    diffusion: BoundedDiffusion, model: Callable[..., Any], x0: Tensor, **options: Unpack[LikelihoodKeywords]
) -> BitsPerDim:
    """The variational bound of each image in bits/dim [H eq. 5, 13].

    Args:
        diffusion: The diffusion that the model was trained for.
        model: As in sample(): called as model(x_t, t) or model(x_t, t, labels).
        x0: The images, [N, C, ...]: floats in [-1, 1], or uint8.
        **options: The fields of LikelihoodOptions.

    Raises:
        InputError: For steps outside 2..T (1..T for T = 1), and for labels, images or outputs that do not fit.
    """
    wanted = LikelihoodOptions(**options)
    T = diffusion.num_timesteps
    # T is the model's; None stands for all of them.
    steps = None if wanted.steps is None else check_integer("steps", wanted.steps, min(2, T), T)
    prior = diffusion.prior_bits_per_dim(x0)
    device, n = x0.device, x0.shape[0]
    ends = sampling_timesteps(steps, T, "quadratic" if steps is not None else "even")
    key = NoiseKey.of(wanted.seed, n, first_sample_id=wanted.first_sample_id, stream=Stream.EVALUATION, device=device)
    told = diffusion.schedule.timesteps.to(device)
    network = Network.of(model)
    labels = network.check_labels(wanted.labels, n)
    labels = None if labels is None else labels.to(device)
    columns = []
    given = network.check_condition(wanted.condition, n)
    condition = None if given is None else scaled_to(given.to(device), n, x0.shape[2:])
    call = network.called()
    with evaluating(network.model), derived.held(network.model):
        for s, end in enumerate(ends):
            first = ends[s - 1] + 1 if s else 0
            t = first + uniform_integers(replace(key, stream=Stream.TIMESTEP), end - first + 1)
            x_t = diffusion.q_sample(x0, t, key, dtype=network.dtype or torch.float32)
            asked = told.index_select(0, t)
            arguments = (x_t, asked) if labels is None else (x_t, asked, labels)
            output = call(*arguments) if condition is None else call(*arguments, condition=condition)
            terms, mse_x0, mse_eps = diffusion.vlb_terms(output, x0, t, key, clip=wanted.clip, decoder=wanted.decoder)
            columns.append((terms, mse_x0, mse_eps, t))
            key.step.add_(1)
            if wanted.on_step is not None:
                wanted.on_step(s + 1, len(ends))
    terms, mse_x0, mse_eps, timesteps = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    counts = torch.tensor([1, *(b - a for a, b in itertools.pairwise(ends))], device=device, dtype=terms.dtype)
    return BitsPerDim(prior + terms @ counts, prior, terms, mse_x0, mse_eps, timesteps, counts)
