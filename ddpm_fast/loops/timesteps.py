"""Which timesteps a training step uses: uniform ones, ones spread over the batch, or more of those with large losses.

Ho et al. 2020 [H], "Denoising Diffusion Probabilistic Models" (alg. 1: uniform); Nichol & Dhariwal 2021 [N], "Improved
DDPM" (eq. 18: importance sampling by the second moment of the loss). Each class draws timesteps, and the weights with
which the mean of weight * loss is an unbiased estimate of the loss averaged over all t. Everything stays on the device,
and nothing waits for it. The timestep of a sample comes from the sample's own noise counter, so several processes, or
micro-batches, together draw what one batch would.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import Drawn, LabelDrop, draw_timesteps, record_losses
from ddpm_fast.wide import wide

HISTORY = 10  # losses that are remembered for each timestep [N sec. 3.3]
UNIFORM_SHARE = 0.001  # share of the probability that is spread evenly, so that every timestep is still drawn


class Uniform:
    """Every t with the same probability, independently for each sample [H alg. 1]. The weights are 1.

    The other classes extend this one. It remembers nothing, so its state is empty.

    Attributes:
        num_timesteps: T.
        learns: Whether `update` must be told the losses of each training step.
    """

    learns = False

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu", batch_size: int | None = None):
        """Make one that has learnt nothing.

        Args:
            num_timesteps: T.
            device: Where it draws.
            batch_size: How many samples a training step has. `sample` may be called with fewer of them at a time. None:
                as many as `sample` is called with.
        """
        if num_timesteps < 1:
            raise InputError(f"num_timesteps is {num_timesteps}; expected at least 1")
        self.num_timesteps, self._batch_size = num_timesteps, batch_size

    def sample(
        self, key: NoiseKey, network_timesteps: Tensor | None = None, label_drop: LabelDrop | None = None
    ) -> Drawn:
        """Draw for the samples of a key, on this object's device, in one op.

        Args:
            key: Its stream must be Stream.TIMESTEP.
            network_timesteps: int64 [T], what the network calls each timestep. None: as they are.
            label_drop: The labels of the samples, and which share of them is dropped. None: there are no labels.

        Returns:
            The timesteps, the weights of their losses, the network's timesteps and the labels.
        """
        return draw_timesteps(key, self.num_timesteps, network_timesteps=network_timesteps, label_drop=label_drop)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses [N] (any floating dtype, detached) that the timesteps t [N] gave.

        N is the size of the whole batch, also where several processes computed it.
        """

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
    """Spread over the batch: sample i of the N samples of a training step draws from the i-th of N equal parts of
    0..T-1, t = floor(T (i + u) / N).

    The mean loss of a batch is unbiased and varies less, since no batch has mostly easy or mostly hard timesteps. i is
    the sample id modulo N: the ids of a batch must be consecutive. The weights are 1.
    """

    def sample(
        self, key: NoiseKey, network_timesteps: Tensor | None = None, label_drop: LabelDrop | None = None
    ) -> Drawn:
        return draw_timesteps(
            key,
            self.num_timesteps,
            parts=self._batch_size or max(1, len(key.sample_id)),
            network_timesteps=network_timesteps,
            label_drop=label_drop,
        )


class LossSecondMoment(Uniform):
    """In proportion to sqrt(E[L_t^2]) over the last 10 losses of each t, with weights 1 / (T p_t) [N eq. 18].

    Uniform until every t has 10 losses. After that a share of 0.001 of the probability stays uniform.
    """

    learns = True

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu", batch_size: int | None = None):
        super().__init__(num_timesteps, device, batch_size)
        # A ring buffer for each t: loss number k, counted from 0, is in slot k % HISTORY.
        self.history = torch.zeros(num_timesteps, HISTORY, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """p_t: float64 [T] (float32 on a device without), summing to 1."""
        history = self.history.to(wide(self.history.device))
        # If all losses are 0, the least positive number makes p uniform instead of 0/0.
        moments = history.square().mean(1).sqrt().clamp_min(torch.finfo(history.dtype).tiny)
        p = moments / moments.sum() * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / self.num_timesteps
        return torch.where((self.counts >= HISTORY).all(), p, 1 / self.num_timesteps)

    def sample(
        self, key: NoiseKey, network_timesteps: Tensor | None = None, label_drop: LabelDrop | None = None
    ) -> Drawn:
        return draw_timesteps(
            key,
            self.num_timesteps,
            probabilities=self.probabilities(),
            network_timesteps=network_timesteps,
            label_drop=label_drop,
        )

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses [N] (any floating dtype, detached) that the timesteps t [N] gave.

        Several losses of one t are recorded in the order of the batch. Losses that are not finite are left out.
        """
        record_losses(self.history, self.counts, t, losses.float())

    def state_dict(self) -> dict[str, Tensor]:
        return {"history": self.history, "counts": self.counts}


TIMESTEP_SAMPLINGS = {"uniform": Uniform, "stratified": Stratified, "loss_second_moment": LossSecondMoment}
