"""What a network is asked in a reverse step, and what is done to its x_0: guidance and dynamic thresholding.

Ho & Salimans 2022, "Classifier-Free Diffusion Guidance"; Lin et al. 2023, "Common Diffusion Noise Schedules and Sample
Steps are Flawed", sec. 3.4 (rescaling); Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models" (dynamic
thresholding). The sampling loop knows none of this: it calls predict(x, t).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddpm_fast.errors import InputError
from ddpm_fast.nn import UNet

Predict = Callable[[Tensor, Tensor], Tensor]


def predictor(
    model: nn.Module,
    labels: Tensor | None,
    *,
    learned: bool,
    guidance: float | None = None,
    rescale: float = 0.0,
    null_label: int | None = None,
) -> Predict:
    """predict(x, t) -> output, for x [N, C, ...] and t int64 [N]: one call of the network, guided if asked.

    labels: int64 [N] on the model's device, read at each call, or None for an unconditional call. learned: whether the
    output has 2C channels, the prediction and then what sets the variance (Objective.learned). guidance: the scale w of
    classifier-free guidance, uncond + w (cond - uncond), from one call on the batch doubled; the second group of a
    learned output is the conditional's. w = 1 (or None) is the plain conditional model and w = 0 the plain
    unconditional one: one call on the batch as it is. rescale: see rescale_to. null_label: the class that stands for
    none. The arguments are those that check_guidance accepted. Raises InputError, when called, for an output of another
    number of channels.
    """

    def ask(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        output = model(x, t) if labels is None else model(x, t, labels)
        _check_channels(output.shape[1], x.shape[1], learned)
        return output

    if guidance is None or guidance == 1:
        return lambda x, t: ask(x, t, labels)
    if guidance == 0 and rescale == 0:
        return lambda x, t: ask(x, t, torch.full_like(labels, null_label))

    def guided(x: Tensor, t: Tensor) -> Tensor:
        # Made here and not once for all: labels may be a tensor whose values change, as in a CUDA graph.
        both = torch.cat([labels, torch.full_like(labels, null_label)])
        output = ask(torch.cat([x, x]), torch.cat([t, t]), both)
        cond, uncond = output.to(torch.promote_types(output.dtype, torch.float32)).chunk(2)
        channels = x.shape[1]
        prediction = torch.lerp(uncond[:, :channels], cond[:, :channels], guidance)
        if rescale:
            prediction = rescale_to(cond[:, :channels], prediction, rescale)
        return torch.cat([prediction, cond[:, channels:]], dim=1) if learned else prediction

    return guided


def rescale_to(cond: Tensor, guided: Tensor, phi: float) -> Tensor:
    """The guided output brought to the conditional output's standard deviation, sample by sample, and blended by phi:
    phi * guided * std(cond) / std(guided) + (1 - phi) * guided (Lin et al. 2023, eq. 15-16). Shapes [N, C, ...].

    Guidance widens the output's range, the more so the larger its scale, and images turn out overexposed.
    """
    wanted, found = (x.flatten(1).std(dim=1, correction=0) for x in (cond, guided))
    # A new U-Net's output is 0 throughout, and stays so.
    factor = 1 - phi + phi * wanted / found.clamp(min=torch.finfo(found.dtype).tiny)
    return guided * factor.view(-1, *[1] * (guided.ndim - 1))


def dynamic_threshold(x0: Tensor, quantile: float) -> Tensor:
    """clip(x0, -s, s) / s with s = max(1, the quantile of |x0|), sample by sample (Saharia et al. 2022, sec. 2.3).

    Large guidance drives the predicted x_0 out of [-1, 1]. Clipping saturates it there; this scales it back.
    x0: float [N, C, ...]. quantile in (0, 1], interpolated linearly.
    """
    s = x0.abs().flatten(1).quantile(quantile, dim=1).clamp(min=1).view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s


def check_guidance(
    model: nn.Module, labels: object | None, guidance: float | None, rescale: float, null_label: int | None
) -> int | None:
    """The null class to guide away from; None without guidance. For calling before any sampling.

    Raises InputError for guidance that is negative or not finite, without labels, or of a model without a null class;
    for rescale outside [0, 1] or without guidance; for a null_label that is not the U-Net's.
    """
    if not 0 <= rescale <= 1:
        raise InputError(f"guidance_rescale is {rescale}; expected 0 (not at all) to 1 (fully)")
    classes = model.config.num_classes if isinstance(model, UNet) else None
    if null_label is not None and classes is not None and null_label != classes:
        raise InputError(f"null_label is {null_label}, but this U-Net's null class is {classes}: leave null_label out")
    if guidance is None:
        if rescale:
            raise InputError(f"guidance_rescale is {rescale} without guidance: give guidance too, or leave it out")
        return None
    if not 0 <= guidance < math.inf:
        raise InputError(f"guidance is {guidance}; expected a finite number of at least 0 (1: none; often 1.5 to 8)")
    if classes == 0:
        raise InputError("guidance needs a model with classes, and this one was trained without: leave guidance out")
    if labels is None:
        raise InputError("guidance needs labels, the classes to guide towards: give labels, or leave guidance out")
    if classes is None and null_label is None:
        raise InputError(
            f"guidance needs to know which class of the {type(model).__name__} stands for none (the one that labels "
            "were replaced by in training): give null_label"
        )
    return null_label if classes is None else classes


def check_threshold(quantile: float | None) -> None:
    """Raises InputError for a quantile of dynamic thresholding outside (0, 1]."""
    if quantile is not None and not 0 < quantile <= 1:
        raise InputError(f"dynamic_threshold is {quantile}; expected a quantile in (0, 1], such as 0.995, or None")


def check_output(model: nn.Module, learned: bool) -> None:
    """Raises InputError if a U-Net's output does not have the channels that the diffusion reads. A network of one's
    own shows them only when it is called."""
    if isinstance(model, UNet):
        _check_channels(model.config.out_channels, model.config.in_channels, learned)


def _check_channels(found: int, channels: int, learned: bool) -> None:
    if found == channels * (2 if learned else 1):
        return
    if learned:
        raise InputError(
            f"the network's output has {found} channels; a diffusion with a learned variance expects 2C = "
            f"{2 * channels}, the prediction and then the variance: build the U-Net with learned_variance=True, or the "
            "diffusion with the fixed variance that it was trained with"
        )
    raise InputError(
        f"the network's output has {found} channels; a diffusion with a fixed variance expects C = {channels}, the "
        "prediction alone: build the diffusion with variance='learned_range' or 'learned' if the network was trained "
        "so, or the U-Net with learned_variance=False"
    )
