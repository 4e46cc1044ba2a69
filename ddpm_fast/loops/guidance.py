"""What a network is asked in a sampler row, and what is done to its x_0: guidance and dynamic thresholding.

Ho & Salimans 2022, "Classifier-Free Diffusion Guidance"; Lin et al. 2023, "Common Diffusion Noise Schedules and Sample
Steps are Flawed", sec. 3.4 (rescaling); Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models" (dynamic
thresholding). The sampling loop knows none of this: it calls predict(x, t).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.loops.network import Network, check_channels

Predict = Callable[[Tensor, Tensor], Tensor]


def predictor(
    model: Callable[..., Tensor],
    labels: Tensor | None,
    *,
    learned: bool,
    guidance: float | None = None,
    rescale: float = 0.0,
    null_label: int | None = None,
    condition: Tensor | None = None,
) -> Predict:
    """predict(x, t) -> output, for x [N, C, ...] and t int64 [N]: one call of the network, guided if that was asked
    for.

    Args:
        model: The network, or what is called in its place.
        labels: int64 [N] on the model's device, read at each call, or None for an unconditional call.
        learned: Whether the output has 2C channels: the prediction, and then what sets the variance
            (Objective.learned).
        guidance: The scale w of classifier-free guidance, uncond + w (cond - uncond), from one call on a batch of twice
            the size. The second group of channels of a learned output is the conditional one's. w = 1 (or None) is the
            plain conditional model and w = 0 the plain unconditional one: each takes one call on the batch as it is.
        rescale: See rescale_to.
        null_label: The class that stands for "no class", as null_class returned it.
        condition: The second image of each sample, for a network that takes one, or None.

    Returns:
        predict, which raises InputError, when it is called, for an output with another number of channels.
    """

    def ask(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        arguments = (x, t) if labels is None else (x, t, labels)
        output = model(*arguments) if condition is None else model(*arguments, condition=beside(condition, len(x)))
        check_channels(output.shape[1], x.shape[1], learned)
        return output

    if guidance is None or guidance == 1:
        return lambda x, t: ask(x, t, labels)
    if labels is None or null_label is None:
        raise InputError("guidance needs labels and the null class: call null_class first, which says what is missing")
    if guidance == 0 and rescale == 0:
        return lambda x, t: ask(x, t, torch.full_like(labels, null_label))

    def guided(x: Tensor, t: Tensor) -> Tensor:
        # Made at each call: the values of labels may change between calls, as they do under a CUDA graph.
        both = torch.cat([labels, torch.full_like(labels, null_label)])
        output = ask(torch.cat([x, x]), _twice(t), both)
        cond, uncond = output.to(torch.promote_types(output.dtype, torch.float32)).chunk(2)
        channels = x.shape[1]
        prediction = torch.lerp(uncond[:, :channels], cond[:, :channels], guidance)
        if rescale:
            prediction = rescale_to(cond[:, :channels], prediction, rescale)
        return torch.cat([prediction, cond[:, channels:]], dim=1) if learned else prediction

    return guided


def beside(condition: Tensor, n: int) -> Tensor:
    """The second images for a batch of n samples: as they are, or twice for one of twice the size."""
    return condition if len(condition) == n else torch.cat([condition, condition])


def _twice(t: Tensor) -> Tensor:
    """t and t again. A timestep that all samples share stays one number in memory, from which the U-Net sees that it
    has to be embedded only once."""
    return t[:1].expand(2 * len(t)) if len(t) == 1 or t.stride() == (0,) else torch.cat([t, t])


def rescale_to(cond: Tensor, guided: Tensor, phi: float) -> Tensor:
    """Bring the guided output to the conditional output's standard deviation, sample by sample, and blend by phi:
    phi * guided * std(cond) / std(guided) + (1 - phi) * guided (Lin et al. 2023, eq. 15-16).

    Guidance widens the range of the output, more so for a larger scale, and images become overexposed.

    Args:
        cond: The conditional output, [N, C, ...].
        guided: The guided output, [N, C, ...].
        phi: From 0 (guided is returned as it is) to 1.
    """
    wanted, found = (x.flatten(1).std(dim=1, correction=0) for x in (cond, guided))
    # The output of a new U-Net is 0 everywhere, and stays 0.
    factor = 1 - phi + phi * wanted / found.clamp(min=torch.finfo(found.dtype).tiny)
    return guided * factor.view(-1, *[1] * (guided.ndim - 1))


def dynamic_threshold(x0: Tensor, quantile: float) -> Tensor:
    """clip(x0, -s, s) / s with s = max(1, the quantile of |x0|), sample by sample (Saharia et al. 2022, sec. 2.3).

    Large guidance drives the predicted x_0 out of [-1, 1]. Clipping saturates it there; this scales it back.

    Args:
        x0: float [N, C, ...].
        quantile: In (0, 1], interpolated linearly.
    """
    s = x0.abs().flatten(1).quantile(quantile, dim=1).clamp(min=1).view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s


def null_class(
    network: Network, labels: object | None, guidance: float | None, null_label: int | None = None
) -> int | None:
    """The null class to guide away from; None without guidance. To be called before any sampling.

    Args:
        network: The network to be guided.
        labels: What was given as labels; only whether there are any matters.
        guidance: The scale of the guidance, or None.
        null_label: The null class that was given for a network of one's own.

    Raises:
        InputError: For a null_label that is not the U-Net's, and for guidance without labels or of a model without a
            null class.
    """
    classes, has_null = network.classes, network.null_class
    if null_label is not None and has_null and null_label != classes:
        raise InputError(f"null_label is {null_label}, but this U-Net's null class is {classes}: leave null_label out")
    if null_label is not None and classes and not has_null and null_label >= classes:
        raise InputError(f"null_label is {null_label}; this {network.name} has the classes 0..{classes - 1}")
    if guidance is None:
        return None
    if classes == 0:
        raise InputError("guidance needs a model with classes, and this one was trained without: leave guidance out")
    if labels is None:
        raise InputError("guidance needs labels, the classes to guide towards: give labels, or leave guidance out")
    if not has_null and null_label is None:
        raise InputError(
            f"guidance needs to know which class of the {network.name} stands for none (the one that labels were "
            "replaced by in training): give null_label, or leave guidance out if there is none"
        )
    return classes if has_null else null_label
