"""The pictures of the theory, drawn from the library's own tables. Each draw_ function returns a matplotlib Figure.

They show the noise schedules and a noised image [N: Nichol & Dhariwal 2021, fig. 3 and 5], the two extremes of the
reverse variance [H: Ho et al. 2020, sec. 3.2; N fig. 1], the bound's terms over t [N fig. 2], the loss weightings over
the signal-to-noise ratio, and the reverse chain. t is the library's index 0..T-1; logarithmic axes count from 1.
canvas.py defines the look.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Transform
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.noise import NoiseKey
from ddpm_fast.objective import Objective
from ddpm_fast.pictures.canvas import (
    BLUE,
    DASHES,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    WIDTH,
    image_figure,
    look,
    name_lines,
    show_images,
    without_math,
    write_timesteps,
)
from ddpm_fast.respacing import sampling_timesteps
from ddpm_fast.schedule import Schedule

SCHEDULE_COLOURS = {"linear": VERMILION, "cosine": BLUE, "sigmoid": GREEN, "scaled_linear": PURPLE}
# Lines of weightings that agree coincide. Each is narrower than the one below it, so that all of them can be seen.
WEIGHTING_LINES: dict[str, dict[str, Any]] = {
    "none": {"color": "0.4", "alpha": 0.35, "linewidth": 10},
    "snr": {"color": GREEN, "alpha": 0.6, "linewidth": 6},
    "truncated_snr": {"color": VERMILION, "linewidth": 2.5},
    "min_snr": {"color": "black", "linewidth": 1.2, "linestyle": (0, (5, 4))},
}


def draw_schedules(schedules: Sequence[Schedule]) -> Figure:
    """alpha_bar_t and beta_t (logarithmic) over t, for schedules of the same length. Zero-terminal ones are dashed."""
    with look():
        figure = Figure((WIDTH, 3.8), layout="constrained")
        signal, betas = figure.subplots(1, 2)
        for schedule in schedules:
            for axes, table in ((signal, schedule.alphas_cumprod), (betas, schedule.betas)):
                axes.plot(np.arange(len(schedule)), table.numpy(), **_schedule_line(schedule, schedules))
        signal.set(title=r"How much of the image is left: $\bar\alpha_t$", ylabel=r"$\bar\alpha_t$ (share of variance)")
        betas.set(title=r"Noise that each timestep adds: $\beta_t$", ylabel=r"$\beta_t$ (variance)", yscale="log")
        for axes in (signal, betas):
            axes.set(xlabel="timestep t", xlim=(0, len(schedules[0])))
        if any(schedule.has_zero_terminal_snr for schedule in schedules):
            _note(signal, 1, 1, "dashed: zero terminal SNR", horizontal="right")
        return name_lines(figure)


def draw_variances(schedules: Sequence[Schedule]) -> Figure:
    """The posterior variance beta~_t and beta_t over (t + 1)/T, for up to six schedules of different lengths.

    The left panel has their ratio. The right panel has both, and shades the band between them, in which a variance of
    "learned_range" lies if v is in [-1, 1] [N eq. 15].
    """
    with look():
        figure = Figure((WIDTH, 3.9), layout="constrained")
        ratio, both = figure.subplots(1, 2)
        shortest = min(range(len(schedules)), key=lambda i: len(schedules[i]))
        for schedule, colour in zip(schedules, (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY), strict=False):
            T = len(schedule)
            u = np.arange(1, T + 1) / T
            label = f"T = {T}"
            ratio.plot(u, (schedule.posterior_variance / schedule.betas).numpy(), color=colour, label=label)
            learned = Objective("eps", "learned_range", "hybrid").log_variance_table(schedule)
            low, high = ((learned[:, 0] + v * learned[:, 1]).exp().numpy() for v in (-1, 1))
            both.fill_between(u, low, high, color=colour, alpha=0.25, linewidth=0)
            # Both lines are labelled only for the shortest chain, where the band is widest.
            if schedule is schedules[shortest]:
                upper, lower = rf"{label}: $\beta_t$ (v = 1)", r"$\tilde\beta_t$ (v = $-$1)"
            else:
                upper, lower = label, None
            both.plot(u, high, color=colour, label=upper)
            both.plot(u, low, color=colour, linestyle=DASHES, label=lower)
        ratio.set(title=r"Smallest over largest variance: $\tilde\beta_t/\beta_t$", ylabel=r"$\tilde\beta_t/\beta_t$")
        both.set(title="The range of a learned variance (shaded)", ylabel="variance of a reverse step", yscale="log")
        # The first points of the two panels differ; see Schedule.posterior_log_variance_clipped.
        _note(ratio, 0.98, 0.2, "first points (t = 0):\n$\\tilde\\beta_0$ = 0", horizontal="right")
        reason = "first points (t = 0): $\\tilde\\beta_1$ in place\nof $\\tilde\\beta_0$ = 0, which has no logarithm"
        _note(both, 0.98, 0.14, reason, horizontal="right")
        for axes in (ratio, both):
            axes.set(xlabel=f"(t + 1)/T, {schedules[0].source['kind']} schedule", xscale="log", xlim=(None, 1))
        return name_lines(figure)


def draw_snr(schedules: Sequence[Schedule], gamma: float = 5.0) -> Figure:
    """The signal-to-noise ratio over t, and the weights of the loss weightings over the SNR.

    A weight multiplies the squared error of the network's own output, for each prediction (Objective.loss_table). The
    weights depend on the SNR alone; they are drawn at the SNRs of the schedule with the widest range.

    Args:
        schedules: One or more of the same length.
        gamma: The largest weight of "min_snr".

    Raises:
        InputError: If gamma is not positive, or a schedule ends in pure noise, where no loss on eps is defined.
    """
    with look():
        figure = Figure((WIDTH, 7.2), layout="constrained")
        top, *panels = figure.subplot_mosaic([["snr"] * 3, ["eps", "x0", "v"]]).values()
        for schedule in schedules:
            top.plot(np.arange(len(schedule)), schedule.snr.numpy(), **_schedule_line(schedule, schedules))
        top.axhline(1, color="0.5", linewidth=1)
        _note(top, 0.005, 0.5, "as much noise as signal", transform=top.get_yaxis_transform())
        top.set(title=r"Signal-to-noise ratio: SNR = $\bar\alpha_t/(1 - \bar\alpha_t)$", ylabel="SNR")
        top.set(xlabel="timestep t", yscale="log", xlim=(0, len(schedules[0])))
        widest = max(schedules, key=lambda schedule: float(schedule.snr[0] / schedule.snr[-1]))
        symbols = {"eps": r"$\epsilon$", "x0": "$x_0$", "v": "$v$"}
        for axes, (prediction, symbol) in zip(panels, symbols.items(), strict=True):
            for weighting, line in WEIGHTING_LINES.items():
                weight = Objective(prediction, loss_weighting=weighting, min_snr_gamma=gamma).loss_table(widest)[:, 2]
                label = rf"min_snr, $\gamma$ = {gamma:g}" if weighting == "min_snr" else weighting
                axes.plot(widest.snr.numpy(), weight.numpy(), label=label, **line)
            axes.set(title=f"Weights if {symbol} is predicted", xlabel="SNR (more noise to the right)")
            axes.set(xscale="log", yscale="log", xlim=(2e4, 5e-5), ylim=(5e-5, 2e4))
            axes.minorticks_off()
            if prediction != "eps":
                axes.tick_params(labelleft=False)
        panels[0].set_ylabel("weight of the squared error")
        figure.supxlabel(
            "Where lines coincide, the narrower ones are drawn over the wider ones.", fontsize=9, color="0.4"
        )
        return name_lines(figure)


def draw_bound(report: Mapping[str, Any]) -> Figure:
    """The variational bound's terms over t, and the errors of the predictions.

    Args:
        report: What `python -m ddpm_fast.evaluate nll --out` writes: the texts "model" and "data", the int "images",
            the bool "estimate", the floats "total_bits_per_dim", "total_stderr" and "prior_bits_per_dim", and lists
            with one element for each evaluated term, L_0 first: "timesteps", "counts" (how many of the chain's T terms
            it stands for), "terms_bits_per_dim", "terms_stderr", "mse_x0" and "mse_eps".
    """
    terms = np.asarray(report["terms_bits_per_dim"])
    prior, total = float(report["prior_bits_per_dim"]), float(report["total_bits_per_dim"])
    step, error = np.asarray(report["timesteps"]) + 1, np.asarray(report["terms_stderr"])
    T = round(sum(report["counts"]))
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if report["estimate"] else {}
    with look():
        figure = Figure((WIDTH, 4.2), layout="constrained")
        bound, errors = figure.subplots(1, 2)
        bound.fill_between(
            step, np.maximum(terms - error, terms / 10), terms + error, color=BLUE, alpha=0.25, linewidth=0
        )
        bound.plot(step, terms, color=BLUE, label=r"$L_t$ $\pm$ standard error", **marker)
        ends = [(1, terms[0], f"$L_0$ = {terms[0]:.3g}"), (T + 1, prior, f"$L_T$ = {_short(prior)}")]
        for x, y, label in ends:
            if y > 0:  # with zero terminal SNR the prior's term is 0, which a logarithmic axis cannot show
                bound.plot(x, y, "o", color=VERMILION, markersize=6, label=label)
        errors.plot(step, report["mse_x0"], color=VERMILION, label=r"$|\hat x_0 - x_0|^2$", **marker)
        errors.plot(step, report["mse_eps"], color=BLUE, label=r"$|\hat\epsilon - \epsilon|^2$", **marker)
        bound.set(title="Terms of the variational bound", ylabel="bits/dim of one timestep")
        errors.set(title="Errors of the predictions", ylabel="mean squared error")
        for axes in (bound, errors):
            axes.set(xlabel="t + 1", xscale="log", yscale="log")
        # Where no signal is left, the network's input is eps itself, so the error of eps falls without end.
        errors.set_ylim(bottom=max(errors.get_ylim()[0], 1e-6 * errors.get_ylim()[1]))
        estimate = f", estimated from {len(step)} of {T} terms" if report["estimate"] else ""
        model, data = (without_math(text) for text in (report["model"].removesuffix(".safetensors"), report["data"]))
        figure.suptitle(
            f"{model}: {total:.3f} $\\pm$ {report['total_stderr']:.3f} bits/dim on {report['images']} images of "
            f"{data}{estimate}\n= {terms[0]:.3f} ($L_0$) + "
            f"{total - prior - terms[0]:.3f} (all timesteps between) + {_short(prior)} ($L_T$)",
            fontsize=10.5,
            x=0.01,
            horizontalalignment="left",
        )
        return name_lines(figure)


def draw_noising(schedules: Sequence[Schedule], x0: Tensor, columns: int, seed: int = 0) -> Figure:
    """One image, noised at equally spaced timesteps 0 .. T-1, with one row per schedule and the same noise everywhere.

    Args:
        schedules: One or more of the same length T.
        x0: The image, uint8 [C, H, W]; C is 1, 3 or 4.
        columns: The number of timesteps.
        seed: Of the noise.

    Raises:
        InputError: For more columns than timesteps.
    """
    T = len(schedules[0])
    steps = sampling_timesteps(columns, T, "even")
    # All columns have the same sample id and therefore the same noise.
    key = replace(NoiseKey.of(seed, 1), sample_id=torch.zeros(columns, dtype=torch.int64))
    with look():
        figure, rows = image_figure(len(schedules), 1, columns, x0.shape[-2] / x0.shape[-1], below=0.12)
        for axes, schedule in zip(rows, schedules, strict=True):
            x_t = GaussianDiffusion(schedule, "v").q_sample(x0.expand(columns, -1, -1, -1), torch.tensor(steps), key)
            shares = [rf"$\bar\alpha$ = {_short(ab)}" for ab in schedule.alphas_cumprod[steps].tolist()]
            show_images(axes, [x_t], [schedule.source["kind"]], below=shares)
        write_timesteps(rows[0], steps)
        return figure


def draw_chain(timesteps: Sequence[int], x_t: Tensor, x0: Tensor) -> Figure:
    """The reverse chain of n samples at K timesteps.

    Args:
        timesteps: K timesteps.
        x_t: The states, [K, n, C, H, W]; C is 1, 3 or 4.
        x0: The x_0 predicted from each state, of the same shape.
    """
    with look():
        columns, n = x_t.shape[:2]
        figure, rows = image_figure(n, 2, columns, x_t.shape[-2] / x_t.shape[-1], below=0.0)
        for i, axes in enumerate(rows):
            show_images(axes, [x_t[:, i], x0[:, i]], ["$x_t$", r"$\hat x_0$"])
        write_timesteps(rows[0], timesteps)
        return figure


def draw_samples(rows: Sequence[Tensor], names: Sequence[str]) -> Figure:
    """Rows of samples of the same noise, one for each sampler.

    Args:
        rows: K images in [-1, 1] for each sampler, [K, C, H, W]; C is 1, 3 or 4.
        names: A name for each row.
    """
    with look():
        columns, _, height, width = rows[0].shape
        figure, (axes,) = image_figure(1, len(rows), columns, height / width, below=0.0)
        show_images(axes, rows, names)
        return figure


def _note(
    axes: Axes, x: float, y: float, text: str, *, horizontal: str = "left", transform: Transform | None = None
) -> None:
    """Write a small grey text below (x, y), which are fractions of the axes unless a transform is given."""
    place = axes.transAxes if transform is None else transform
    axes.text(x, y, text, transform=place, color="0.4", fontsize=9, ha=horizontal, va="top")


def _schedule_line(schedule: Schedule, others: Sequence[Schedule]) -> dict[str, Any]:
    """The arguments of axes.plot() for the line of a schedule."""
    kind = schedule.source["kind"]
    line: dict[str, Any] = {"color": SCHEDULE_COLOURS.get(kind, "black"), "label": kind}
    if schedule.has_zero_terminal_snr:
        line["linestyle"] = DASHES
        if any(other.source["kind"] == kind and not other.has_zero_terminal_snr for other in others):
            line["label"] = None  # the solid line of the same colour has the label
    return line


def _short(x: float) -> str:
    """The number with two digits, as short as possible."""
    return f"{x:.2f}" if x >= 0.01 or x == 0 else f"{x:.1e}".replace(".0e", "e").replace("e-0", "e-")
