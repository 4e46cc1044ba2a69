"""The theory's pictures, drawn from the library's own tables: each draw_ function returns a matplotlib Figure.

Noise schedules and noised strips [N: Nichol & Dhariwal 2021, fig. 3 and 5], the two extremes of the reverse variance
[H: Ho et al. 2020, sec. 3.2; N fig. 1], the bound's terms over t [N fig. 2], the loss weightings over the
signal-to-noise ratio, and the reverse chain. t is the library's index 0..T-1; logarithmic axes count from 1.
canvas.py has the look.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.noise import NoiseKey
from ddpm_fast.objective import WEIGHTINGS, Objective
from ddpm_fast.pictures.canvas import (
    BLUE,
    DASHES,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    WIDTH,
    head,
    look,
    name_lines,
    strip,
    strips,
)
from ddpm_fast.respacing import sampling_timesteps
from ddpm_fast.schedule import Schedule

SCHEDULE_COLOURS = {"linear": VERMILION, "cosine": BLUE, "sigmoid": GREEN, "scaled_linear": PURPLE}
# Where weightings agree their lines coincide: the wider ones lie below.
WEIGHTING_LINES = {
    "none": {"color": "0.4", "alpha": 0.4, "linewidth": 6},
    "snr": {"color": GREEN, "linewidth": 4},
    "truncated_snr": {"color": VERMILION},
    "min_snr": {"color": "black", "linestyle": (0, (4, 2))},
}
_NOTE = {"color": "0.4", "fontsize": 9, "verticalalignment": "top"}


def draw_schedules(schedules: Sequence[Schedule]) -> Figure:
    """alpha_bar_t and beta_t (logarithmic) over t of schedules of one length. Zero-terminal ones are dashed."""
    with look():
        figure = Figure((WIDTH, 3.8), layout="constrained")
        signal, betas = figure.subplots(1, 2)
        for schedule in schedules:
            for axes, table in ((signal, schedule.alphas_cumprod), (betas, schedule.betas)):
                axes.plot(np.arange(len(schedule)), table.numpy(), **_schedule_line(schedule, schedules))
        signal.set(title=r"What is left of the image: $\bar\alpha_t$", ylabel=r"$\bar\alpha_t$ (share of variance)")
        betas.set(title=r"Noise added by each step: $\beta_t$", ylabel=r"$\beta_t$ (variance)", yscale="log")
        for axes in (signal, betas):
            axes.set(xlabel="step t", xlim=(0, len(schedules[0])))
        if any(schedule.has_zero_terminal_snr for schedule in schedules):
            signal.text(1, 1, "dashed: zero terminal SNR", transform=signal.transAxes, ha="right", **_NOTE)
        return name_lines(figure)


def draw_variances(schedules: Sequence[Schedule]) -> Figure:
    """The posterior variance beta~_t beside beta_t over t/T, for up to six schedules of different lengths: their ratio,
    and both with the band between them, in which a variance of "learned_range" lies for v in [-1, 1] [N eq. 15]."""
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
            # Named in full once, where the band is widest.
            is_first = schedule is schedules[shortest]
            names = (rf"{label}: $\beta_t$ (v = 1)", r"$\tilde\beta_t$ (v = $-$1)") if is_first else (label, None)
            both.plot(u, high, color=colour, label=names[0])
            both.plot(u, low, color=colour, linestyle=DASHES, label=names[1])
        ratio.set(title=r"Smallest over largest variance: $\tilde\beta_t/\beta_t$", ylabel=r"$\tilde\beta_t/\beta_t$")
        both.set(title="What a learned variance lies between", ylabel="variance of a reverse step", yscale="log")
        for axes in (ratio, both):
            axes.set(xlabel=f"(t + 1)/T, {schedules[0].source['kind']} schedule", xscale="log", xlim=(None, 1))
        return name_lines(figure)


def draw_snr(schedules: Sequence[Schedule], gamma: float = 5.0) -> Figure:
    """The signal-to-noise ratio over t, and below, over the SNR, the weight that each loss weighting gives to the
    squared error of a network's own output, for each prediction (Objective.loss_table). The weights depend on the SNR
    alone; they are drawn at those of the schedule that reaches farthest. Raises InputError for a gamma that is not
    positive, and for a zero-terminal schedule, at whose end no eps can be weighed."""
    with look():
        figure = Figure((WIDTH, 7), layout="constrained")
        top, *panels = figure.subplot_mosaic([["snr"] * 3, ["eps", "x0", "v"]]).values()
        for schedule in schedules:
            top.plot(np.arange(len(schedule)), schedule.snr.numpy(), **_schedule_line(schedule, schedules))
        top.axhline(1, color="0.5", linewidth=1)
        top.text(0, 0.5, " as much noise as signal", transform=top.get_yaxis_transform(), **_NOTE)
        top.set(title=r"Signal-to-noise ratio: SNR = $\bar\alpha_t/(1 - \bar\alpha_t)$", ylabel="SNR", xlabel="step t")
        top.set(yscale="log", xlim=(0, len(schedules[0])))
        widest = max(schedules, key=lambda schedule: float(schedule.snr[0] / schedule.snr[-1]))
        symbols = {"eps": r"$\epsilon$", "x0": "$x_0$", "v": "$v$"}
        for axes, (prediction, symbol) in zip(panels, symbols.items(), strict=True):
            for weighting in WEIGHTINGS:
                weight = Objective(prediction, loss_weighting=weighting, min_snr_gamma=gamma).loss_table(widest)[:, 2]
                label = f"min_snr ({gamma:g})" if weighting == "min_snr" else weighting
                axes.plot(widest.snr.numpy(), weight.numpy(), label=label, **WEIGHTING_LINES[weighting])
            axes.set(title=f"Weights if {symbol} is predicted", xlabel="SNR (noise grows to the right)")
            axes.set(xscale="log", yscale="log", xlim=(2e4, 5e-5), ylim=(5e-5, 2e4))
            axes.minorticks_off()
            if prediction != "eps":
                axes.tick_params(labelleft=False)
        panels[0].set_ylabel("weight of the squared error")
        return name_lines(figure)


def draw_bound(report: dict) -> Figure:
    """The variational bound's terms over t, and the errors of the predictions, from the report of `evaluate nll`.

    report: "model", "data": text; "images": int; "estimate": bool; "total_bits_per_dim", "total_stderr",
    "prior_bits_per_dim": float; and lists with an element for each evaluated term, L_0 first: "timesteps", "counts"
    (how many of the chain's T terms it stands for), "terms_bits_per_dim", "terms_stderr", "mse_x0", "mse_eps".
    """
    terms, prior, total = (np.asarray(report[f"{name}_bits_per_dim"]) for name in ("terms", "prior", "total"))
    step, error = np.asarray(report["timesteps"]) + 1, np.asarray(report["terms_stderr"])
    T = round(sum(report["counts"]))
    marker = {"marker": "o", "markersize": 3.5} if report["estimate"] else {}
    with look():
        figure = Figure((WIDTH, 4.2), layout="constrained")
        bound, errors = figure.subplots(1, 2)
        bound.fill_between(
            step, np.maximum(terms - error, terms / 10), terms + error, color=BLUE, alpha=0.25, linewidth=0
        )
        bound.plot(step, terms, color=BLUE, label=r"$L_t$ $\pm$ standard error", **marker)
        ends = [(1, terms[0], f"$L_0$ = {terms[0]:.3g}"), (T + 1, prior, f"$L_T$ = {_short(prior)}")]
        for x, y, label in ends:
            if y > 0:  # the prior's term is 0 at zero terminal SNR, which a logarithmic axis does not show
                bound.plot(x, y, "o", color=VERMILION, markersize=6, label=label)
        errors.plot(step, report["mse_x0"], color=VERMILION, label=r"$|\hat x_0 - x_0|^2$", **marker)
        errors.plot(step, report["mse_eps"], color=BLUE, label=r"$|\hat\epsilon - \epsilon|^2$", **marker)
        bound.set(title="Terms of the bound", ylabel="bits/dim of one step")
        errors.set(title="Errors of the predictions", ylabel="mean squared error")
        for axes in (bound, errors):
            axes.set(xlabel="t + 1", xscale="log", yscale="log")
        # Where no signal is left, eps is what is shown to the network: its error falls without end.
        errors.set_ylim(bottom=max(errors.get_ylim()[0], 1e-6 * errors.get_ylim()[1]))
        estimate = f", estimated from {len(step)} of {T} terms" if report["estimate"] else ""
        figure.suptitle(
            f"{_plain(report['model'].removesuffix('.safetensors'))}: {total:.3f} $\\pm$ {report['total_stderr']:.3f} "
            f"bits/dim on {report['images']} images of {_plain(report['data'])}{estimate}\n= {terms[0]:.3f} ($L_0$) + "
            f"{total - prior - terms[0]:.3f} (all steps between) + {_short(prior)} ($L_T$)",
            **{"fontsize": 10.5, "x": 0.01, "horizontalalignment": "left"},
        )
        return name_lines(figure)


def draw_noising(schedules: Sequence[Schedule], x0: Tensor, columns: int, seed: int = 0) -> Figure:
    """One image, uint8 [C, H, W], noised at equal steps t = 0 .. T-1, a schedule a row and the same noise throughout.

    C is 1, 3 or 4. Raises InputError for more columns than steps.
    """
    T = len(schedules[0])
    steps = sampling_timesteps(columns, T, "even")
    # One sample id for all columns is one noise for all.
    key = replace(NoiseKey.of(seed, 1), sample_id=torch.zeros(columns, dtype=torch.int64))
    with look():
        figure, rows = strips(len(schedules), 1, columns, x0.shape[-2] / x0.shape[-1], below=0.12)
        for axes, schedule in zip(rows, schedules, strict=True):
            x_t = GaussianDiffusion(schedule, "v").q_sample(x0.expand(columns, -1, -1, -1), torch.tensor(steps), key)
            shares = [rf"$\bar\alpha$ = {_short(ab)}" for ab in schedule.alphas_cumprod[steps].tolist()]
            strip(axes, [x_t], [schedule.source["kind"]], below=shares)
        head(rows[0], steps)
        return figure


def draw_chain(timesteps: Sequence[int], x_t: Tensor, x0: Tensor) -> Figure:
    """The reverse chain of n samples at K timesteps: the states and the x_0 predicted from them, [K, n, C, H, W] each.
    C is 1, 3 or 4."""
    with look():
        columns, n = x_t.shape[:2]
        figure, rows = strips(n, 2, columns, x_t.shape[-2] / x_t.shape[-1], below=0.0)
        for i, axes in enumerate(rows):
            strip(axes, [x_t[:, i], x0[:, i]], ["$x_t$", r"$\hat x_0$"])
        head(rows[0], timesteps)
        return figure


def _schedule_line(schedule: Schedule, others: Sequence[Schedule]) -> dict:
    kind = schedule.source["kind"]
    line = {"color": SCHEDULE_COLOURS.get(kind, "black"), "label": kind}
    if schedule.has_zero_terminal_snr:
        line["linestyle"] = DASHES
        if any(other.source["kind"] == kind and not other.has_zero_terminal_snr for other in others):
            line["label"] = None  # the colour says which it belongs to
    return line


def _short(x: float) -> str:
    """Two digits, as short as they can be written."""
    return f"{x:.2f}" if x >= 0.01 or x == 0 else f"{x:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _plain(text: str) -> str:
    """A name with nothing in it that matplotlib would take for mathematics."""
    return text.replace("$", r"\$")
