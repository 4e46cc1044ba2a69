"""DDPMFastScheduler: a scheduler for diffusers' pipelines, whose step is this package's fused op.

    from ddpm_fast.formats.diffusers_scheduler import DDPMFastScheduler

    pipe.scheduler = DDPMFastScheduler.from_config(pipe.scheduler.config)

It stands in for DDPMScheduler, DDIMScheduler and DPMSolverMultistepScheduler: the same configs, timesteps and numbers.
Timesteps and betas are those of diffusers' own class, which is asked for them; the rows of coefficients are made in
float64 (formats/diffusers/rows.py) and the noise by seed and place in the batch (formats/diffusers/generators.py).
This module needs diffusers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
except ImportError as error:
    raise ImportError(f"DDPMFastScheduler is for diffusers' pipelines: pip install diffusers ({error})") from error

from ddpm_fast import ops
from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.formats.diffusers.generators import Generators, LoopNoise
from ddpm_fast.formats.diffusers.options import (
    SAMPLERS,
    SIGMAS,
    betas_of,
    check_choice,
    check_options,
    checked_eta,
    options_of,
    refuse_flows,
    sampler_of,
)
from ddpm_fast.formats.diffusers.rows import Levels, Plan, Rows, ddim_rows, ddpm_rows, dpmpp_rows
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.tensors import working_dtype


class DDPMFastScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler for diffusers' pipelines, in place of its DDPM, DDIM or DPM-Solver++ (multistep) scheduler.

    from_config takes the config of any scheduler that diffusers may exchange for those; of DDPMScheduler, DDIMScheduler
    and DPMSolverMultistepScheduler it takes the sampler as well, and of others it asks for `sampler`. Each sampler
    reads the options that its class in diffusers has, with that class's meaning and defaults, and keeps the others in
    its config.

    Differences on purpose. Noise is a function of the generator's seed, the sample's place in the batch and the number
    of the step: see diffusers/generators.py. Half precision is computed in float32 and rounded once. The state keeps
    its dtype. A second order step after a repeated timestep is no division by 0, and "fixed_large_log" is not NaN. All
    samplers give pred_original_sample. A step never waits for the device, if its timestep is one of `timesteps` or an
    int.

    Args:
        sampler: "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde" (DPM-Solver++ with algorithm_type="sde-dpmsolver++") or
            "dpmpp_1" (solver_order=1).
        eta: The noise of "ddim", from 0 to 1, for pipelines that give none, or 0.
        num_train_timesteps: As in diffusers; so are all that follow. Of those that have other defaults in the three
            classes, None is the sampler's.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012 (diffusers' way)
    order = 1
    timesteps: Tensor
    num_inference_steps: int | None
    _step_index: int | None
    _begin_index: int | None
    _before: tuple[int, Tensor] | None

    @register_to_config
    def __init__(
        self,
        sampler: str = "ddpm",
        eta: float = 0.0,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str | None = None,
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str | None = None,
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
    ) -> None:
        kind, told = SAMPLERS[check_choice("sampler", sampler)]
        if timestep_spacing is None:
            timestep_spacing = inspect.signature(kind).parameters["timestep_spacing"].default
        if variance_type is None:
            variance_type = "fixed_small"
        self.register_to_config(timestep_spacing=timestep_spacing, variance_type=variance_type, **told)
        check_options(self.config)
        self.betas = betas_of(self.config)
        alphas_cumprod = torch.cumprod(1 - self.betas.double(), 0)
        if kind is DPMSolverMultistepScheduler and rescale_betas_zero_snr:
            alphas_cumprod[-1] = 2**-24  # as there, so that lambda is finite
        self._alphas_cumprod = alphas_cumprod
        self.alphas = 1 - self.betas
        self.alphas_cumprod = alphas_cumprod.float()
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self._start(torch.arange(len(self.betas) - 1, -1, -1), None, None)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler of a config, such as pipe.scheduler.config.

        Args:
            config: A config of this class or of one of diffusers' schedulers that noise by betas.
            return_unused_kwargs: As in diffusers.
            **kwargs: Options of this class that replace those of the config, such as sampler="ddim".

        Raises:
            InputError: For a class whose sampler this package does not have, unless `sampler` is given, and for options
                that it cannot honour, by name.
        """
        if isinstance(config, Mapping):
            sampler = check_choice("sampler", kwargs.get("sampler") or sampler_of(config))
            refuse_flows(config)
            config = {**config, **SAMPLERS[sampler][1]}
            if config.get("solver_type") in ("logrho", "bh1", "bh2"):
                config["solver_type"] = "midpoint"  # those are DEIS's and UniPC's; DPMSolverMultistepScheduler does so
            kwargs["sampler"] = sampler
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # What the pipeline asks before and around the loop

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps of the next loop, and begin it: what was remembered of the last one is forgotten.

        Args:
            num_inference_steps: How many, spaced by the config's timestep_spacing as the sampler's class in diffusers
                does.
            device: Where `timesteps` is put, which the network is told.
            timesteps: Instead of a number: which, in descending order.

        Raises:
            InputError: For numbers that the chain does not have.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise InputError("set_timesteps takes either num_inference_steps or timesteps")
        most, sigmas, stride = self.config.num_train_timesteps, None, None
        if timesteps is not None:
            chosen = torch.as_tensor([check_integer("a timestep", t, 0, most - 1) for t in timesteps])
            if not len(chosen) or (chosen.diff() >= 0).any():
                raise InputError(f"timesteps {list(timesteps)!r:.200}: expected one or more in descending order")
            if self._has_sigmas:
                raise InputError("timesteps cannot be given where the sigmas of the config choose them: set them False")
        else:
            n = check_integer("num_inference_steps", num_inference_steps, 1, most)
            peer = self._peer()
            peer.set_timesteps(n)
            chosen, stride = peer.timesteps.long(), most // n
            if self._has_sigmas:
                sigmas = peer.sigmas
        if chosen.max() >= len(self.betas):
            raise InputError(
                f"timestep {int(chosen.max())} is outside the chain of {len(self.betas)} betas: lower steps_offset "
                f"({self.config.steps_offset}) or the number of steps, or let num_train_timesteps be their number"
            )
        self.num_inference_steps = len(chosen)
        self._start(chosen, sigmas, device, stride)
        self._plan(self._eta(None), False)

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        """The sample itself: these chains keep its variance."""
        return sample

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which of the timesteps the loop begins, as img2img pipelines do."""
        self._begin_index = begin_index

    @property
    def begin_index(self) -> int | None:
        """What set_begin_index said; None before."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first one."""
        return self._step_index

    def previous_timestep(self, timestep: Any) -> int:
        """The timestep after the given one on the way down, or -1 after the last."""
        following = self._index_of(timestep) + 1
        return self._timesteps[following] if following < len(self._timesteps) else -1

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # The step

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the sampler, in one pass over memory.

        Args:
            model_output: float [N, C, ...], or [N, 2C, ...] of a network that learned the variance.
            timestep: One of `timesteps`, as a number or an element of that tensor.
            sample: float [N, C, ...], the state; differentiable like model_output.
            eta: Of "ddim": if above 0, used instead of the config's. Other samplers ignore it, as pipelines expect.
            use_clipped_model_output: Of "ddim": whether eps is formed again from the x_0 that was clipped.
            generator: Where the noise comes from: its seed, see diffusers/generators.py. A list has one for each
                sample.
            variance_noise: The noise itself, shaped like sample.
            return_dict: Whether to give an object instead of a tuple.

        Returns:
            prev_sample and pred_original_sample, in sample's dtype.

        Raises:
            InputError: For a timestep that set_timesteps did not choose, and for tensors that do not fit.
        """
        if self.num_inference_steps is None and self.config.sampler != "ddpm":
            raise InputError(f"{self.config.sampler}: call set_timesteps before the first step")
        if generator is not None and variance_noise is not None:
            raise InputError("give generator or variance_noise, not both")
        i = self._index_of(timestep)
        plan, before = self._plan(self._eta(eta), bool(use_clipped_model_output)), self._before
        past = before[1] if before is not None and before[0] == i - 1 and before[1].shape == sample.shape else None
        number = plan.number(i, past is not None)
        if plan.reads_output:
            past = model_output[:, : sample.shape[1]]
        table, row = plan.on(sample, number)
        made = ops.reverse_step(
            sample,
            self._as_output(model_output, sample, plan, number),
            table,
            row,
            self._noise_of(plan.is_noisy(number), i, sample, generator, variance_noise),
            x0_previous=past if plan.reads(number) else None,
            return_x0=True,
        )
        assert made.x0 is not None  # it was asked for
        self._step_index = i + 1
        self._before = (i, made.x0) if plan.looks_back and i + 1 < len(self._timesteps) else None
        result = made.x, made.x0.to(sample.dtype)
        return DDPMSchedulerOutput(*result) if return_dict else result

    def _noise_of(
        self, is_noisy: bool, i: int, sample: Tensor, generator: Generators, given: Tensor | None
    ) -> Tensor | NoiseKey:
        """The noise of step i. A step that adds none leaves the generator as it is."""
        if not is_noisy:
            return self._noise.none(sample)
        return self._noise.draw(generator, i, sample) if given is None else given

    def _as_output(self, output: Tensor, sample: Tensor, plan: Plan, number: int) -> Tensor:
        """The network's output as the op reads it by this config: x_0 in its place if that is thresholded, and the
        logarithm of a variance that diffusers learns as it is."""
        config, channels = self.config, sample.shape[1]
        learned = config.sampler == "ddpm" and config.variance_type.startswith("learned") and plan.is_noisy(number)
        if learned and output.shape[1] != 2 * channels:
            raise InputError(
                f"variance_type is {config.variance_type!r}, which needs an output of {2 * channels} channels; this "
                f"one has {output.shape[1]}: pass the network's whole output, or choose a fixed variance"
            )
        by_log = learned and config.variance_type == "learned"
        if not config.thresholding and not by_log:
            return output
        prediction, variance = output[:, :channels], output[:, channels:].to(working_dtype(sample))
        if config.thresholding:
            x0 = plan.x0(number, sample, prediction)
            prediction = _thresholded(x0, config.dynamic_thresholding_ratio, config.sample_max_value)
        if not learned:
            return prediction
        return torch.cat([prediction.to(variance.dtype), variance.log() if by_log else variance], dim=1)

    # Training

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise at each sample's timestep, [N] or one for all.

        In a loop over sigmas (use_karras_sigmas and the like) whose begin index was set, alpha_bar is that of the step
        which is next, as in diffusers: the timesteps are rounded there.
        """
        if self._sigmas is None or self._begin_index is None:
            return self._noised(original_samples, noise, timesteps, 1.0)
        i = self._begin_index if self._step_index is None else self._step_index
        ab = 1 / (1 + self._sigmas[i].double() ** 2)
        table = torch.stack([ab.sqrt(), (1 - ab).sqrt()])[None].to(original_samples.device)
        t = torch.zeros(len(original_samples), dtype=torch.int64, device=original_samples.device)
        return ops.q_sample(original_samples, t, table, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) sample at each sample's timestep, [N] or one for all."""
        return self._noised(noise, sample, timesteps, -1.0)

    def _noised(self, first: Tensor, second: Tensor, timesteps: Tensor, sign: float) -> Tensor:
        dtype = working_dtype(first)
        place = first.device, dtype, sign
        if place not in self._levels:
            ab = self._alphas_cumprod
            with torch.inference_mode(False):  # kept for calls that need a gradient
                self._levels[place] = torch.stack([ab.sqrt(), sign * (1 - ab).sqrt()], dim=1).to(first.device, dtype)
        t = timesteps.to(first.device, torch.int64).flatten().expand(len(first))
        return ops.q_sample(first, t, self._levels[place], second)

    # The chain

    @property
    def _kind(self) -> type:
        """diffusers' class of the sampler."""
        return SAMPLERS[self.config.sampler][0]

    @property
    def _has_sigmas(self) -> bool:
        """Whether the noise levels are not those of the timesteps, but sigmas from which the timesteps follow."""
        return self._kind is DPMSolverMultistepScheduler and any(self.config[name] for name in SIGMAS)

    def _peer(self) -> Any:
        """diffusers' scheduler of the same options, to be asked for its timesteps. Made of the config as it is now:
        pipelines change it."""
        known = options_of(self._kind)
        options = {name: value for name, value in self.config.items() if name in known}
        options |= {"beta_schedule": "linear", "trained_betas": self.betas.numpy()} | SAMPLERS[self.config.sampler][1]
        return self._kind(**options)

    def _start(
        self,
        timesteps: Tensor,
        sigmas: Tensor | None,
        device: torch.device | str | None,
        stride: int | None = None,
    ) -> None:
        """Begin a loop over these timesteps.

        Args:
            timesteps: int64 [S] on the CPU.
            sigmas: fp32 [S + 1], where the config chooses sigmas; else None.
            device: Where the pipeline reads the timesteps.
            stride: The length of DDIMScheduler's steps; None to go to the next timestep.
        """
        self.timesteps = timesteps.to(device)
        self._timesteps: list[int] = timesteps.tolist()
        self._chosen, self._sigmas, self._stride = timesteps, sigmas, stride
        self._plans: dict[tuple[float, bool], Plan] = {}
        self._levels: dict[Any, Tensor] = {}
        self._noise = LoopNoise(len(timesteps))
        self._step_index = None
        self._begin_index = None
        # The number of the last step and its x_0, for a sampler that looks back.
        self._before = None

    def _index_of(self, timestep: Any) -> int:
        """The place of a timestep among those chosen.

        An element of `timesteps` says it by its place in memory, without being read back from its device.
        """
        if isinstance(timestep, Tensor):
            if timestep.ndim == 0:
                place = timestep.storage_offset()
                if place < len(self.timesteps) and self.timesteps[place].is_set_to(timestep):
                    return int(place)
            if timestep.device.type != "cpu" and self._begin_index is not None:
                return self._begin_index if self._step_index is None else self._step_index
        value, following = int(timestep), self._step_index
        if following is not None and following < len(self._timesteps) and self._timesteps[following] == value:
            return following  # where a timestep is there twice
        if value not in self._timesteps:
            raise InputError(
                f"timestep {value} is none of the {len(self._timesteps)} of this loop, {self._timesteps[0]} to "
                f"{self._timesteps[-1]}: give one of scheduler.timesteps"
            )
        return self._timesteps.index(value)

    def _eta(self, eta: float | None) -> float:
        """The eta of a step: the pipeline's if it is above 0, else the config's."""
        if self.config.sampler != "ddim":
            return 0.0
        return checked_eta(eta or self.config.eta)

    def _plan(self, eta: float, clipped: bool) -> Plan:
        """The rows of this loop, made once."""
        if (eta, clipped) not in self._plans:
            rows = self._rows(eta, clipped)
            self._plans[eta, clipped] = Plan(rows, len(self._timesteps), given_x0=self.config.thresholding)
        return self._plans[eta, clipped]

    def _rows(self, eta: float, clipped: bool) -> Rows:
        config = self.config
        limits = config.clip_sample and not config.thresholding and self._kind is not DPMSolverMultistepScheduler
        before, after = self._noise_levels()
        levels = Levels(
            self._chosen, before, after, config.prediction_type, config.clip_sample_range if limits else math.inf
        )
        if config.sampler == "ddpm":
            return ddpm_rows(levels, config.variance_type)
        if config.sampler == "ddim":
            return ddim_rows(levels, eta, (limits or config.thresholding) and not clipped)
        few = config.lower_order_final and len(before) < 15
        return dpmpp_rows(
            levels,
            order=SAMPLERS[config.sampler][1]["solver_order"],
            sde=config.sampler == "dpmpp_2m_sde",
            heun=config.solver_type == "heun",
            ends_by_first_order=config.euler_at_final or few or config.final_sigmas_type == "zero",
        )

    def _noise_levels(self) -> tuple[Tensor, Tensor]:
        """alpha_bar before and after each step, float64 [S] each."""
        config, ab, one = self.config, self._alphas_cumprod, torch.ones(1, dtype=torch.float64)
        before = ab[self._chosen]
        if self._kind is DPMSolverMultistepScheduler:
            if self._sigmas is not None:
                before = 1 / (1 + self._sigmas[:-1].double() ** 2)
            return before, torch.cat([before[1:], ab[:1] if config.final_sigmas_type == "sigma_min" else one])
        last = ab[:1] if self._kind is DDIMScheduler and not config.set_alpha_to_one else one
        if self._kind is DDIMScheduler and self._stride is not None:
            down = self._chosen - self._stride
            return before, torch.where(down >= 0, ab[down.clamp(min=0)], last)
        return before, torch.cat([before[1:], last])


def _thresholded(x0: Tensor, quantile: float, most: float) -> Tensor:
    """clip(x0, -s, s) / s with s the quantile of |x0| of each sample, held to 1..most (Saharia et al. 2022)."""
    s = x0.abs().flatten(1).quantile(quantile, dim=1).clamp(1, most).view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s
