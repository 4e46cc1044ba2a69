"""Which timesteps training sees: uniform, evenly spread over the batch, or more of those with large losses.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (alg. 1: uniform); Nichol & Dhariwal 2021, "Improved DDPM"
(eq. 18: importance sampling by the loss's second moment). Each way gives timesteps and the weights that make the mean
of weight * loss an unbiased estimate of the loss averaged over all t. Everything stays on the device and nothing waits
for it; each sample's timestep comes from its own noise counter, so several processes draw what one would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey, random_words, uniform_integers

HISTORY = 10  # losses remembered of each timestep [N sec. 3.3]
UNIFORM_SHARE = 0.001  # of the probability, spread evenly: no timestep is forgotten


class Timesteps(NamedTuple):
    """Drawn timesteps, int64 [N] in 0..T-1, and the weights of their losses, float32 [N]."""

    t: Tensor
    weights: Tensor


class Uniform:
    """Every t alike, each sample by itself [H alg. 1]. The weights are 1.

    The other ways extend this one; it remembers nothing, so its state is empty.
    """

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu"):
        if num_timesteps < 1:
            raise InputError(f"num_timesteps is {num_timesteps}; expected at least 1")
        self.num_timesteps = num_timesteps

    def sample(self, key: NoiseKey) -> Timesteps:
        """Timesteps for the samples of `key`, on this object's device (its stream: Stream.TIMESTEP)."""
        t = uniform_integers(key, self.num_timesteps)
        return Timesteps(t, torch.ones_like(t, dtype=torch.float32))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses [N] (any floating dtype, detached) that the timesteps t [N] gave."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs: this object's own tensors, not copies."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a `state_dict`, bit for bit, from any device. Raises InputError, nothing changed, if it is not one
        of this way of drawing and of this number of timesteps."""
        own = self.state_dict()
        kinds, expected = (
            {name: f"{x.dtype} {list(x.shape)}" for name, x in tensors.items()} for tensors in (state, own)
        )
        if kinds != expected:
            raise InputError(
                f"the timestep sampler's saved state is {kinds or 'empty'}; expected {expected or 'none'}: resume with "
                "the timestep sampling and the number of timesteps that the checkpoint was made with"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])


class Stratified(Uniform):
    """Evenly over the batch: of the N samples of the batch, over all processes, the i-th draws from the i-th of N equal
    parts of 0..T-1, t = floor(T (i + u) / N).

    Each batch's mean loss is unbiased and varies less, since no batch has mostly easy or mostly hard timesteps. i is
    the sample id modulo N: a batch's ids must be consecutive, and every process must hold as many. The weights are 1.
    """

    def sample(self, key: NoiseKey) -> Timesteps:
        n = max(1, len(key.sample_id) * _world_size())
        # floor((T i + T u) / N) = floor((T i + floor(T u)) / N), since N is an integer: no rounding anywhere.
        t = (self.num_timesteps * (key.sample_id % n) + uniform_integers(key, self.num_timesteps)) // n
        return Timesteps(t, torch.ones_like(t, dtype=torch.float32))


class LossSecondMoment(Uniform):
    """In proportion to sqrt(E[L_t^2]) over the last 10 losses of each t, with weights 1 / (T p_t) [N eq. 18].

    Uniform until every t has 10 losses; thereafter a share of 0.001 stays uniform. On several processes (with
    torch.distributed initialised, and as many samples on each) the losses of all are remembered by all.
    """

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu"):
        super().__init__(num_timesteps, device)
        # A ring for each t: its k-th loss, counted from 0, is in slot k % HISTORY.
        self.history = torch.zeros(num_timesteps, HISTORY, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """p_t: float64 [T], summing to 1."""
        # Losses that are all 0 say nothing: the least positive number makes them uniform instead of 0/0.
        moments = self.history.double().square().mean(1).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        p = moments / moments.sum() * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / self.num_timesteps
        return torch.where((self.counts >= HISTORY).all(), p, 1 / self.num_timesteps)

    def sample(self, key: NoiseKey) -> Timesteps:
        p = self.probabilities()
        words = random_words(key, 1)[:, 0]
        u = (words[:, 0] << 21 | words[:, 1] >> 11).double() * 2.0**-53  # [0, 1), 53 bits
        cumulative = p.cumsum(0)
        t = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
        t = t.clamp(max=self.num_timesteps - 1)  # the product may round up to the sum itself
        return Timesteps(t, (1 / (self.num_timesteps * p[t])).float())

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses [N] (any floating dtype, detached) that the timesteps t [N] gave.

        Several losses of one t count in the order of the batch (and of the processes). Losses that are not finite are
        left out.
        """
        t, losses = _of_all_processes(t), _of_all_processes(losses.float())
        T, n = self.num_timesteps, len(t)
        # What is not to be recorded goes to a row T that is cut off again: masking would have to wait for the device.
        t, order = torch.where(losses.isfinite(), t, T).sort(stable=True)
        number = torch.zeros(T + 1, dtype=torch.int64, device=t.device).scatter_add_(0, t, torch.ones_like(t))
        rank = torch.arange(n, device=t.device) - torch.searchsorted(t, t)  # among the losses of the same t
        slot = (self.counts[t.clamp(max=T - 1)] + rank) % HISTORY
        overwritten = rank < number[t] - HISTORY
        cell = torch.where(overwritten | (t == T), T * HISTORY, t * HISTORY + slot)
        cells = torch.cat([self.history.flatten(), self.history.new_zeros(1)]).scatter_(0, cell, losses[order])
        self.history.copy_(cells[:-1].view(T, HISTORY))
        self.counts += number[:T]

    def state_dict(self) -> dict[str, Tensor]:
        return {"history": self.history, "counts": self.counts}


TIMESTEP_SAMPLINGS = {"uniform": Uniform, "stratified": Stratified, "loss_second_moment": LossSecondMoment}


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _of_all_processes(x: Tensor) -> Tensor:
    """x [N] of every process, one after the other: [processes * N]."""
    if _world_size() == 1:
        return x
    everywhere = x.new_empty(_world_size() * len(x))
    dist.all_gather_into_tensor(everywhere, x.contiguous())
    return everywhere
