"""Which timesteps a training step uses: uniform ones, ones spread over the batch, or more of those with large losses.

Ho et al. 2020 [H], "Denoising Diffusion Probabilistic Models" (alg. 1: uniform); Nichol & Dhariwal 2021 [N], "Improved
DDPM" (eq. 18: importance sampling by the second moment of the loss). Each class draws timesteps, and the weights with
which the mean of weight * loss is an unbiased estimate of the loss averaged over all t. Everything stays on the device,
and nothing waits for it. The timestep of a sample comes from the sample's own noise counter, so several processes
together draw what one process would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.loops.distributed import of_all_processes, world_size
from ddpm_fast.noise import NoiseKey, random_words, uniform_integers

HISTORY = 10  # losses that are remembered for each timestep [N sec. 3.3]
UNIFORM_SHARE = 0.001  # share of the probability that is spread evenly, so that every timestep is still drawn


class Timesteps(NamedTuple):
    """Drawn timesteps, int64 [N] in 0..T-1, and the weights of their losses, fp32 [N]."""

    t: Tensor
    weights: Tensor


class Uniform:
    """Every t with the same probability, independently for each sample [H alg. 1]. The weights are 1.

    The other classes extend this one. It remembers nothing, so its state is empty.
    """

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu"):
        if num_timesteps < 1:
            raise InputError(f"num_timesteps is {num_timesteps}; expected at least 1")
        self.num_timesteps = num_timesteps

    def sample(self, key: NoiseKey) -> Timesteps:
        """Draw timesteps for the samples of `key`, whose stream must be Stream.TIMESTEP, on this object's device."""
        t = uniform_integers(key, self.num_timesteps)
        return Timesteps(t, torch.ones_like(t, dtype=torch.float32))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses [N] (any floating dtype, detached) that the timesteps t [N] gave."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs: this object's own tensors, not copies."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a `state_dict` from any device, bit for bit.

        Raises:
            InputError: If the state was saved by another class, or for another number of timesteps. Nothing is changed.
        """
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
    """Spread over the batch: sample i of the N samples of all processes draws from the i-th of N equal parts of 0..T-1,
    t = floor(T (i + u) / N).

    The mean loss of a batch is unbiased and varies less, since no batch has mostly easy or mostly hard timesteps. i is
    the sample id modulo N: the ids of a batch must be consecutive, and every process must hold the same number of
    samples. The weights are 1.
    """

    def sample(self, key: NoiseKey) -> Timesteps:
        n = max(1, len(key.sample_id) * world_size())
        # floor((T i + T u) / N) = floor((T i + floor(T u)) / N), since N is an integer: no rounding anywhere.
        t = (self.num_timesteps * (key.sample_id % n) + uniform_integers(key, self.num_timesteps)) // n
        return Timesteps(t, torch.ones_like(t, dtype=torch.float32))


class LossSecondMoment(Uniform):
    """In proportion to sqrt(E[L_t^2]) over the last 10 losses of each t, with weights 1 / (T p_t) [N eq. 18].

    Uniform until every t has 10 losses. After that a share of 0.001 of the probability stays uniform. Every process
    remembers the losses of all processes, which must hold the same number of samples.
    """

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu"):
        super().__init__(num_timesteps, device)
        # A ring buffer for each t: loss number k, counted from 0, is in slot k % HISTORY.
        self.history = torch.zeros(num_timesteps, HISTORY, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """p_t: float64 [T], summing to 1."""
        # If all losses are 0, the least positive number makes p uniform instead of 0/0.
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

        Several losses of one t are recorded in the order of the processes and of the batch. Losses that are not finite
        are left out.
        """
        t, losses = of_all_processes(t), of_all_processes(losses.float())
        T, n = self.num_timesteps, len(t)
        # What must not be recorded goes to a row T that is cut off again, since masking would wait for the device.
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
