"""Classifier guidance: a sampler is led by the gradient of a classifier of noised images.

Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", algorithms 1 and 2. With g = s * grad log
p(y | x_t), s the scale, ancestral sampling adds variance * g to the mean of its row (algorithm 1); DDIM takes
sqrt(1 - alpha_bar) * g from the predicted eps (algorithm 2), which adds (1 - alpha_bar) / sqrt(alpha_bar) * g to the
predicted x_0 after it was clipped. Any other sampler is guided by the same x_0. Both are linear in g, so what
ops.reverse_step makes of the network's output is kept, and g is added to its result with coefficients of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops.inputs import labels_of
from ddpm_fast.loops.network import Network
from ddpm_fast.nn.classifier import Classifier
from ddpm_fast.nn.foreign import Named, name_of
from ddpm_fast.samplers import SamplerTable

# gradient(x, t), shaped like x: s * grad log p(y | x_t).
Gradient = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Judge:
    """A classifier that guides, and what the loop has to know of it. Make one with Judge.of.

    Attributes:
        model: The module whose weights and mode these are: the classifier, or what stands for a function.
        scale: The factor s of its gradient.
        dtype: The dtype of its parameters. None without any: it is given float32.
        classes: The number of its classes. None if it does not say.
    """

    model: nn.Module
    scale: float
    dtype: torch.dtype | None
    classes: int | None

    @classmethod
    def of(cls, classifier: Callable[..., Any] | None, scale: float, device: torch.device) -> Judge | None:
        """The judge that a classifier is, or None without one.

        Args:
            classifier: A Classifier, or any module or function of (x, t) that gives logits [N, classes].
            scale: The factor of its gradient.
            device: That of the network.

        Raises:
            InputError: If it cannot be called, or is on another device.
        """
        if classifier is None:
            return None
        model = classifier if isinstance(classifier, nn.Module) else Named(classifier, "the classifier")
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.device != device:
            raise InputError(
                f"the classifier is on {parameter.device} and the network on {device}; expected one device: move it"
            )
        return cls(
            model=model,
            scale=scale,
            dtype=None if parameter is None else parameter.dtype,
            classes=model.config.num_classes if isinstance(model, Classifier) else None,
        )

    @property
    def name(self) -> str:
        """What the classifier is called, for messages."""
        return name_of(self.model.model if isinstance(self.model, Named) else self.model)

    @property
    def may_wait(self) -> bool:
        """Whether calling it may wait for the device. A Classifier never does."""
        return type(self.model) is not Classifier

    def check_targets(self, labels: int | Sequence[int] | Tensor | None, n: int) -> Tensor:
        """The classes of n samples that are guided towards, int64 [n] on the CPU.

        Raises:
            InputError: If there are no labels, or they are none of the classifier's classes.
        """
        if labels is None:
            raise InputError("a classifier needs labels, the classes to guide towards: give labels, or leave it out")
        targets = labels_of(labels, n)
        if n and (int(targets.min()) < 0 or (self.classes is not None and int(targets.max()) >= self.classes)):
            known = "0 and above" if self.classes is None else f"0..{self.classes - 1}"
            raise InputError(
                f"labels run from {int(targets.min())} to {int(targets.max())}; the classifier has the classes {known}"
            )
        return targets

    def gradient(self, targets: Tensor, classes: int) -> Gradient:
        """The gradient for samples of these classes.

        Args:
            targets: int64 [N] on the device, read at each call.
            classes: How many classes the classifier must have for the targets.
        """

        def gradient(x: Tensor, t: Tensor) -> Tensor:
            # What was made in inference mode cannot be part of a graph of autograd, but copies of it can.
            with torch.inference_mode(False), torch.enable_grad():
                given = x.clone().requires_grad_()
                logits = self.model(given if self.dtype is None else given.to(self.dtype), t.clone())
                self._check_logits(logits, len(x), classes)
                chosen = logits.float().log_softmax(dim=1).gather(1, targets.clone()[:, None])
                (found,) = torch.autograd.grad(chosen.sum(), given, allow_unused=True)
            if found is None:
                raise InputError(f"the logits of the {self.name} do not depend on x: it has no gradient to guide with")
            return found * self.scale

        return gradient

    def _check_logits(self, logits: object, n: int, classes: int) -> None:
        expected = f"expected its logits, floats [{n}, classes]"
        if not isinstance(logits, Tensor):
            raise InputError(f"the {self.name} answered with a {type(logits).__name__}; {expected}")
        if logits.ndim != 2 or logits.shape[0] != n or not logits.is_floating_point():
            raise InputError(f"the {self.name} answered with {logits.dtype} {list(logits.shape)}; {expected}")
        if logits.shape[1] < classes:
            raise InputError(
                f"the {self.name} answered with logits of {logits.shape[1]} classes, and labels go up to {classes - 1}"
            )
        if not logits.requires_grad:
            raise InputError(f"the logits of the {self.name} do not depend on x: it has no gradient to guide with")


def targets_and_labels(
    network: Network, judge: Judge | None, labels: int | Sequence[int] | Tensor | None, n: int
) -> tuple[Tensor | None, Tensor | None]:
    """The classes that a classifier guides towards, and the labels that the network is given: int64 [n] on the CPU.

    A network without classes takes no labels; with a classifier they are the classifier's alone.

    Raises:
        InputError: For labels that do not fit.
    """
    if judge is None:
        return None, network.check_labels(labels, n)
    targets = judge.check_targets(labels, n)
    return targets, network.check_labels(labels if network.takes_labels else None, n)


def shift_table(diffusion: GaussianDiffusion, table: SamplerTable, sampler: str) -> Tensor:
    """What a gradient g adds in each row: float64 [S, 2], or [S, 3] for ancestral sampling with a learned variance.

    The state gets column 0 times g, and the predicted x_0 column 1 times g. A third column multiplies the output's
    second group of channels v, and the state gets exp(column 2 * v) times as much.

    Args:
        diffusion: The diffusion that the model was trained for.
        table: The rows that are run, which may be a part of a sampler's, or some of them several times.
        sampler: The sampler's name.
    """
    schedule = diffusion.schedule
    index = torch.searchsorted(schedule.timesteps, table.timesteps)
    if sampler != "ddpm":
        ab = schedule.alphas_cumprod[index]
        # Pure noise says nothing of the class: its gradient is 0, and so is its part of an x_0 that is not defined.
        to_x0 = torch.where(ab > 0, (1 - ab) / ab.sqrt(), 0.0)
        return torch.stack([table.coefficients[:, 3] * to_x0, to_x0], dim=1)
    # The variance of a row depends on the timestep that it goes to, which is the next lower one that is visited.
    visited, places = index.unique(return_inverse=True)
    diffusion = diffusion.respace(visited.tolist())
    if not diffusion.objective.learned:
        variance = diffusion.objective.variance_table(diffusion.schedule)[places, 0]
        return torch.stack([variance, torch.zeros_like(variance)], dim=1)
    base, slope = diffusion.objective.log_variance_table(diffusion.schedule)[places].unbind(1)
    return torch.stack([base.exp(), torch.zeros_like(base), slope], dim=1)
