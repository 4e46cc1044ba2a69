"""Draws the figures of docs/derivation.md: python docs/derivation.py docs/images (some seconds on one CPU core)

They are computed in float64 on a chain of ten steps over numbers, whose reverse chain is linear and Gaussian. There the
likelihood, the bound and the gap between them are known exactly. docs/notebooks/derivation.ipynb takes the same chain
and checks every equation on it.
"""

import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ddpm_fast import GaussianDiffusion, Schedule
from ddpm_fast.pictures.canvas import (
    BLUE,
    DASHES,
    GREEN,
    VERMILION,
    WIDTH,
    look,
    name_lines,
    save_figure,
)

DPI = 110  # so that each file has less than 100 kB
T = 10
BETAS = torch.linspace(0.02, 0.6, T, dtype=torch.float64)
# The data: a mixture of two Gaussians.
WEIGHTS = torch.tensor([0.4, 0.6], dtype=torch.float64)
MEANS = torch.tensor([-0.5, 0.4], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.1, 0.15], dtype=torch.float64)
MEAN = WEIGHTS @ MEANS
VARIANCE = WEIGHTS @ (DEVIATIONS**2 + MEANS**2) - MEAN**2
EXAMPLE = 0.3  # the x_0 of the figures of a single one


class Chain(NamedTuple):
    """p(x_0), ..., p(x_T) and q(x_1), ..., q(x_T) given x_0, as Gaussians over whole paths.

    Attributes:
        mean: [T + 1], of x_0 to x_T under p.
        covariance: [T + 1, T + 1], under p.
        steps: [T, 3], of p(x_{t-1} | x_t) = N(slope x_t + offset, variance): slope, offset and variance.
        schedule: The noise schedule.
    """

    mean: Tensor
    covariance: Tensor
    steps: Tensor
    schedule: Schedule

    @property
    def ab(self) -> Tensor:
        """alpha_bar, [T]."""
        return self.schedule.alphas_cumprod

    def given(self, x0: float) -> tuple[Tensor, Tensor]:
        """Mean [T] and covariance [T, T] of p(x_1, ..., x_T | x_0)."""
        gain = self.covariance[1:, 0] / self.covariance[0, 0]
        return self.mean[1:] + gain * (x0 - self.mean[0]), self.covariance[1:, 1:] - gain[:, None] * self.covariance[
            0, 1:
        ]

    def forward(self, x0: float) -> tuple[Tensor, Tensor]:
        """Mean [T] and covariance [T, T] of q(x_1, ..., x_T | x_0): Cov(x_s, x_t) = sqrt(ab_t / ab_s) (1 - ab_s)."""
        s = torch.arange(T)
        early, late = torch.minimum(s[:, None], s), torch.maximum(s[:, None], s)
        return self.ab.sqrt() * x0, (self.ab[late] / self.ab[early]).sqrt() * (1 - self.ab[early])


def chain() -> Chain:
    """The chain whose network predicts the noise as well as a linear function of x_t can."""
    diffusion = GaussianDiffusion(Schedule.from_betas(BETAS), "eps", variance="fixed_large")
    ab = diffusion.schedule.alphas_cumprod
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean, factors = torch.zeros(T + 1, dtype=torch.float64), torch.zeros(T + 1, T + 1, dtype=torch.float64)
    steps = torch.zeros(T, 3, dtype=torch.float64)
    factors[T, T] = 1.0
    for t in reversed(range(T)):
        output = (1 - ab[t]).sqrt() / (ab[t] * VARIANCE + 1 - ab[t]) * (x - ab[t].sqrt() * MEAN)
        step = diffusion.p_mean_variance(output, x, t, clip=False)
        offset, slope = step.mean[0, 0], step.mean[1, 0] - step.mean[0, 0]
        mean[t] = slope * mean[t + 1] + offset
        factors[t] = slope * factors[t + 1]
        factors[t, t] = step.variance[0, 0].sqrt()
        steps[t] = torch.stack([slope, offset, step.variance[0, 0]])
    return Chain(mean, factors @ factors.T, steps, diffusion.schedule)


def bound_terms(made: Chain, x0: float) -> Tensor:
    """L_0, ..., L_{T-1} and L_T of one x_0, exactly, in nats: [T + 1]."""
    schedule, (slope, offset, variance) = made.schedule, made.steps.unbind(1)
    # The mean of the step that the model is compared with; at t = 1 that is x_0 itself.
    apart = (schedule.posterior_mean_coef2 - slope, schedule.posterior_mean_coef1 * x0 - offset)
    squares = (apart[0] * made.ab.sqrt() * x0 + apart[1]) ** 2 + apart[0] ** 2 * (1 - made.ab)
    ratio = schedule.posterior_variance / variance
    terms = 0.5 * (squares / variance + ratio - 1 - ratio.log())
    terms[0] = 0.5 * (squares[0] / variance[0] + (2 * math.pi * variance[0]).log())
    ab = made.ab[-1]
    last = 0.5 * (ab * x0**2 + (1 - ab) - 1 - (1 - ab).log())
    return torch.cat([terms, last[None]])


def log_normal(x: Tensor | float, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """The logarithm of a normal density."""
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return -0.5 * (torch.log(2 * math.pi * variance) + (x - mean) ** 2 / variance)


def draw_chain() -> Figure:
    """The two chains, which variables each term of the bound reads, and which step it compares with which."""
    texts = ["$x_0$", "$x_1$", r"$\cdots$", "$x_{t-1}$", "$x_t$", r"$\cdots$", "$x_T$"]
    at = [0.0, 1.6, 2.75, 3.9, 5.5, 6.65, 7.8]
    with look():
        figure = Figure((WIDTH, 3.1), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        for text, x in zip(texts, at, strict=True):
            if "cdots" not in text:
                axes.plot(x, 0, "o", markersize=31, markerfacecolor="white", markeredgecolor="0.3", markeredgewidth=1.2)
            axes.text(x, 0, text, ha="center", va="center", fontsize=12)
        for left, right in itertools.pairwise(at):
            for (start, end), colour, bend in (((left, right), BLUE, -0.35), ((right, left), VERMILION, -0.35)):
                arrow = {"arrowstyle": "-|>", "color": colour, "shrinkA": 17, "shrinkB": 17, "linewidth": 1.4}
                arrow["connectionstyle"] = f"arc3,rad={bend}"
                axes.annotate("", (end, 0), (start, 0), arrowprops=arrow)
        notes = [
            (0.8, 0.62, "$q(x_1|x_0)$", BLUE),
            (4.7, 0.62, "$q(x_t|x_{t-1})$", BLUE),
            (0.8, -0.72, r"$p_\theta(x_0|x_1)$", VERMILION),
            (4.7, -0.72, r"$p_\theta(x_{t-1}|x_t)$", VERMILION),
            (7.8, -0.72, "$p(x_T)$", VERMILION),
        ]
        for x, y, text, colour in notes:
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=11)
        terms = [
            (-0.3, 1.9, "$L_0$: how well $x_0$ is\nread off from $x_1$"),
            (3.5, 5.9, "$L_{t-1}$: one step back, compared\nwith the step that knows $x_0$"),
            (7.3, 8.3, "$L_T$: is $x_T$\npure noise?"),
        ]
        for left, right, text in terms:
            axes.plot([left, left, right, right], [-1.0, -1.1, -1.1, -1.0], color=GREEN, linewidth=1.4)
            axes.text((left + right) / 2, -1.2, text, ha="center", va="top", color=GREEN, fontsize=10)
        axes.text(-0.5, 1.1, "forward: adds noise, nothing to learn", color=BLUE, fontsize=10)
        axes.text(8.4, 1.1, "reverse: removes noise, learned", color=VERMILION, fontsize=10, ha="right")
        axes.set(xlim=(-0.6, 8.6), ylim=(-1.85, 1.3))
        axes.set_axis_off()
        return figure


def needed(share: float, log_second_moment: float, dimensions: np.ndarray) -> np.ndarray:
    """log10 of the draws after which the relative standard error of a mean is `share`.

    The mean of w over d independent elements is a product, so that E[w^2] / E[w]^2 is the d-th power of that of one.
    """
    exponent = dimensions * log_second_moment
    log_excess = np.where(exponent > 30, exponent, np.log(np.expm1(np.minimum(exponent, 30))))
    return log_excess / math.log(10) - 2 * math.log10(share)


def log_second_moments(made: Chain, x0: float) -> tuple[float, float]:
    """log of E[w^2] / E[w]^2 of two estimates: p(x_0 | x_1) for x_1 of the model, and p(x_0..x_T) / q(x_1..x_T)."""
    slope = made.covariance[0, 1] / made.covariance[1, 1]
    mean, spread = made.mean[0], slope**2 * made.covariance[1, 1]
    s = made.steps[0, 2].item()
    # N(x; m, s)^2 = N(x; m, s/2) / (2 sqrt(pi s)), averaged over m.
    blind = (
        log_normal(x0, mean, spread + s / 2) - 0.5 * math.log(4 * math.pi * s) - 2 * log_normal(x0, mean, spread + s)
    )
    (mp, cp), (mq, cq) = made.given(x0), made.forward(x0)
    pp, pq = torch.linalg.inv(cp), torch.linalg.inv(cq)
    precision, linear = 2 * pp - pq, 2 * pp @ mp - pq @ mq
    assert torch.linalg.eigvalsh(precision).min() > 0  # or the weights would have no variance
    constant = -2 * mp @ pp @ mp + mq @ pq @ mq + linear @ torch.linalg.solve(precision, linear)
    guided = torch.logdet(pp) - 0.5 * torch.logdet(pq) - 0.5 * torch.logdet(precision) + 0.5 * constant
    return blind.item(), guided.item()


def draw_integral(made: Chain) -> Figure:
    """How much work p(x_0) would be in d dimensions: a grid, and two Monte Carlo estimates."""
    blind, guided = log_second_moments(made, EXAMPLE)
    d = np.unique(np.geomspace(1, 784, 200).round())
    with look():
        figure = Figure((WIDTH, 3.8), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        lines = [
            (d * math.log10(50), "0.4", "a grid with 50 points for each element, for one step"),
            (needed(0.1, blind, d), VERMILION, "paths drawn from the model"),
            (needed(0.1, guided, d), BLUE, "paths drawn from q, weighted by p/q"),
        ]
        for y, colour, label in lines:
            axes.plot(d, y, color=colour, label=label)
        axes.set(xscale="log", yscale="log", xlim=(1, 784), ylim=(0.8, 4000))
        axes.set_xlabel("number of elements of $x_0$ (784: a digit of 28 x 28 pixels)")
        axes.set_ylabel("$\\log_{10}$ of the number")
        axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
        axes.set_xticks([1, 10, 100, 784], ["1", "10", "100", "784"])
        axes.minorticks_off()
        axes.legend(frameon=False)
        axes.set_title("Points of a grid, or paths for a relative error of 10%, that $p_\\theta(x_0)$ needs")
        return figure


def draw_jensen(made: Chain) -> Figure:
    """Jensen's inequality of two values of w, and of the weights of the small chain."""
    with look():
        figure = Figure((WIDTH, 3.9), dpi=DPI, layout="constrained")
        two, many = figure.subplots(1, 2)
        _two_values(two)
        mq, cq = made.forward(EXAMPLE)
        draws = torch.randn(200_000, T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        path = mq + draws @ torch.linalg.cholesky(cq).T
        q = torch.distributions.MultivariateNormal(mq, cq).log_prob(path)
        whole = torch.cat([torch.full((len(path), 1), EXAMPLE, dtype=torch.float64), path], 1)
        log_w = torch.distributions.MultivariateNormal(made.mean, made.covariance).log_prob(whole) - q
        exact = log_normal(EXAMPLE, made.mean[0], made.covariance[0, 0]).item()
        bound = exact - divergence(made.forward(EXAMPLE), made.given(EXAMPLE))
        many.hist(log_w.numpy(), bins=120, range=(-1.6, 1.6), density=True, color="0.8", label="_")
        top = many.get_ylim()[1]
        for x, colour, text, side in (
            (bound, VERMILION, f"$E_q[\\log w]$ = ${bound:.3f}$\nthe bound", "right"),
            (exact, BLUE, f"$\\log E_q[w]$ = ${exact:.3f}$\n$= \\log p_\\theta(x_0)$", "left"),
        ):
            many.axvline(x, color=colour, linewidth=1.4)
            many.text(x + (0.05 if side == "left" else -0.05), 1.22 * top, text, color=colour, ha=side, va="top")
        many.set(xlim=(-1.7, 1.6), ylim=(0, 1.25 * top), yticks=[], xlabel="$\\log w$")
        many.set_title(f"$\\log w$ of 200,000 paths from $x_0$ = {EXAMPLE}")
        return figure


def _two_values(axes: Axes) -> None:
    u = np.linspace(0.05, 3.4, 200)
    a, b = 0.2, 2.9
    mean, chord = (a + b) / 2, (math.log(a) + math.log(b)) / 2
    axes.plot(u, np.log(u), color="0.3")
    axes.plot([a, b], [math.log(a), math.log(b)], color=GREEN, linestyle=DASHES)
    axes.plot([a, b], [math.log(a), math.log(b)], "o", color=GREEN)
    axes.plot([mean, mean], [-1.9, math.log(mean)], color="0.6", linewidth=1, linestyle=":")
    axes.annotate("", (mean, math.log(mean)), (mean, chord), arrowprops={"arrowstyle": "<->", "color": "0.3"})
    axes.text(mean - 0.06, chord + 0.16, "the gap", color="0.3", ha="right", va="center")
    for y, colour, text in ((math.log(mean), BLUE, "$\\log E[w]$"), (chord, VERMILION, "$E[\\log w]$")):
        axes.plot([mean, 3.4], [y, y], color=colour, linewidth=1, linestyle=":")
        axes.plot(mean, y, "o", color=colour)
        axes.text(3.4, y - 0.06, text, color=colour, ha="right", va="top")
    axes.set(xlim=(0, 3.4), ylim=(-1.9, 1.5), yticks=[], ylabel="$\\log w$")
    axes.set_xticks([a, mean, b], ["$w_1$", "$E[w]$", "$w_2$"])
    axes.set_title("Two equally likely values of $w$")


def divergence(q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor]) -> float:
    """KL(q || p) of two Gaussians given as (mean [d], covariance [d, d]), in nats."""
    made = torch.distributions.MultivariateNormal
    return torch.distributions.kl_divergence(made(*q), made(*p)).item()


def draw_bayes() -> Figure:
    """The step back with and without x_0, for a large step and for a small one."""
    with look():
        figure = Figure((WIDTH, 3.7), dpi=DPI, layout="constrained")
        for axes, ab_before, beta, title in zip(
            figure.subplots(1, 2),
            (0.95, 0.95),
            (0.8, 0.004),
            ("A large step, $\\beta_t$ = 0.8", "A small step, $\\beta_t$ = 0.004"),
            strict=True,
        ):
            _step_back(axes, ab_before, beta)
            axes.set_title(f"{title}, back from $x_t$ = 0")
        return name_lines(figure)


def _step_back(axes: Axes, ab_before: float, beta: float) -> None:
    x_t = 0.0
    ab = ab_before * (1 - beta)
    variances = ab_before * DEVIATIONS**2 + 1 - ab_before  # of x_{t-1} in each component
    gain = math.sqrt(1 - beta) * variances / ((1 - beta) * variances + beta)
    means = math.sqrt(ab_before) * MEANS + gain * (x_t - math.sqrt(ab) * MEANS)
    spreads = (1 - gain * math.sqrt(1 - beta)) * variances
    share = torch.softmax(WEIGHTS.log() + log_normal(x_t, math.sqrt(ab) * MEANS, (1 - beta) * variances + beta), 0)
    mean = share @ means
    deviation = (share @ (spreads + means**2) - mean**2).sqrt()
    x = torch.linspace(mean - 3.6 * deviation, mean + 3.6 * deviation, 400, dtype=torch.float64)
    density = (share * log_normal(x[:, None], means, spreads).exp()).sum(1)
    axes.fill_between(x.numpy(), density.numpy(), color="0.88", linewidth=0)
    axes.plot(x.numpy(), density.numpy(), color="0.4", label="$q(x_{t-1}|x_t)$")
    alike = log_normal(x, mean, deviation**2).exp().numpy()
    axes.plot(x.numpy(), alike, color="black", linestyle=DASHES, linewidth=1.2, label="nearest Gaussian")
    variance = (1 - ab_before) / (1 - ab) * beta
    for x0, colour in ((-0.5, VERMILION), (0.4, BLUE)):
        centre = math.sqrt(ab_before) * beta / (1 - ab) * x0 + math.sqrt(1 - beta) * (1 - ab_before) / (1 - ab) * x_t
        known = log_normal(x, centre, variance).exp().numpy()
        axes.plot(x.numpy(), known, color=colour, label=f"$x_0$ = ${x0}$ known")
    axes.set(xlabel="$x_{t-1}$", yticks=[], xlim=(x[0].item(), x[-1].item()))
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])


def draw_terms(made: Chain) -> Figure:
    """The terms of the bound of the small chain, and the weights of long chains that the simplified loss drops."""
    terms = bound_terms(made, EXAMPLE)
    exact = -log_normal(EXAMPLE, made.mean[0], made.covariance[0, 0]).item()
    gap = divergence(made.forward(EXAMPLE), made.given(EXAMPLE))
    assert abs(terms.sum().item() - exact - gap) < 1e-10
    with look():
        figure = Figure((WIDTH, 3.9), dpi=DPI, layout="constrained")
        bars, weights = figure.subplots(1, 2)
        colours = [VERMILION, *[BLUE] * (T - 1), GREEN]
        bars.bar(np.arange(T + 1), terms.numpy(), color=colours)
        bars.axhline(0, color="0.4", linewidth=1)
        for t, term in enumerate(terms.tolist()):
            shown = f"{term:.3f}".replace("-", "\u2212")
            bars.text(t, max(term, 0) + 0.01, shown, ha="center", fontsize=7.5, color="0.3")
        bars.set_xticks(range(T + 1), [f"$L_{{{t}}}$" for t in range(T)] + ["$L_T$"], fontsize=8.5)
        bars.set(ylabel="nats")
        bars.grid(axis="x", visible=False)
        bars.set_title(f"Their sum: {terms.sum():.3f} = {exact:.3f} ($-\\log p_\\theta$) + {gap:.3f} (the gap)")
        for schedule, colour in ((Schedule.linear(1000), VERMILION), (Schedule.cosine(1000), BLUE)):
            for variance, style in (("fixed_small", "-"), ("fixed_large", DASHES)):
                weight = dropped_weight(schedule, variance)
                label = f"{schedule.source['kind']}, {variance}"
                middle = weight[500 - 2]
                line = {"color": colour, "linestyle": style, "label": label}
                weights.plot(np.arange(2, 1001), (weight / middle).numpy(), **line)
        weights.axhline(1, color="0.3", linewidth=1.2, label="the simplified loss")
        weights.set(xscale="log", yscale="log", xlim=(2, 1000), ylim=(0.4, 600), xlabel="t of T = 1000")
        weights.set_title("Weight of $\\Vert\\epsilon - \\hat\\epsilon\\Vert^2$ in the bound (1 at t = 500)")
        return name_lines(figure)


def dropped_weight(schedule: Schedule, variance: str) -> Tensor:
    """beta_t^2 / (2 sigma_t^2 alpha_t (1 - ab_t)) of t = 2..T: the factor of the squared error of eps in L_{t-1}."""
    sigma2 = schedule.posterior_variance if variance == "fixed_small" else schedule.betas
    weight = schedule.betas**2 / (2 * sigma2 * (1 - schedule.betas) * (1 - schedule.alphas_cumprod))
    return weight[1:]


def main(folder: Path) -> None:
    made = chain()
    figures = {
        "chain": draw_chain(),
        "integral": draw_integral(made),
        "jensen": draw_jensen(made),
        "bayes": draw_bayes(),
        "terms": draw_terms(made),
    }
    for name, figure in figures.items():
        save_figure(figure, folder / f"derivation-{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
