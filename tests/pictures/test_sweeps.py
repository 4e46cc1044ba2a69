"""The figure of a sweep shows the points that it was given, and its lines go through the best of them."""

import itertools

import numpy as np
import pytest

from ddpm_fast.pictures.sweeps import Point, Quantity, draw_sweep

FID = Quantity("Frechet distance", lower_is_better=True)
RECALL = Quantity("recall", lower_is_better=False)


def made(samplers=("ddpm", "ddim"), steps=(10, 20), guidances=(1.0, 2.0, 3.0)):
    """Points whose distance and recall are random numbers."""
    rng = np.random.default_rng(0)
    return [
        Point(
            sampler,
            calls,
            calls * (0.001 if guidance == 1 else 0.002),
            guidance,
            {FID.name: rng.random(), RECALL.name: rng.random()},
            {FID.name: 0.25},
        )
        for sampler, calls, guidance in itertools.product(samplers, steps, guidances)
    ]


def bars(axes, label):
    """The line of a series, x and y, and the lower and upper ends of its error bars."""
    (container,) = (one for one in axes.containers if one.get_label() == label)
    line, _, (segments,) = container.lines
    ends = np.array([segment[:, 1] for segment in segments.get_segments()])
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float), ends


@pytest.mark.parametrize("quantity", [FID, RECALL], ids=lambda one: one.name)
def test_the_lines_go_through_the_best_point_of_each_number_of_steps_and_of_each_guidance(quantity):
    points = made()
    steps, seconds, guidance = draw_sweep(points, [quantity]).axes
    best = min if quantity.lower_is_better else max
    for sampler in ("ddpm", "ddim"):
        for axes, field, place in (
            (steps, "calls", "calls"),
            (seconds, "calls", "seconds"),
            (guidance, "guidance", "guidance"),
        ):
            own = [one for one in points if one.series == sampler]
            x, y, _ = bars(axes, sampler)
            wanted = {
                getattr(chosen, place): chosen.values[quantity.name]
                for value in {getattr(one, field) for one in own}
                for chosen in [
                    best((p for p in own if getattr(p, field) == value), key=lambda p: p.values[quantity.name])
                ]
            }
            assert dict(zip(x, y, strict=True)) == wanted and list(x) == sorted(x)


def test_all_other_points_are_shown_too():
    points = made()
    for axes in draw_sweep(points, [FID]).axes:
        shown = sorted(y for line in axes.lines for y in np.ravel(line.get_ydata()) if line.get_marker() not in "_|")
        assert shown == sorted(one.values[FID.name] for one in points)


def test_error_bars_reach_as_far_as_the_error_and_are_absent_without_one():
    points = made(guidances=(1.0,))
    first, second = draw_sweep(points, [FID, RECALL]).axes[::2]
    _, y, ends = bars(first, "ddim")
    np.testing.assert_allclose(ends, np.stack([y - 0.25, y + 0.25], 1))
    _, y, ends = bars(second, "ddim")
    np.testing.assert_allclose(ends, np.stack([y, y], 1))


def test_there_is_a_panel_for_what_varies_and_a_row_for_each_quantity():
    def labels(points, quantities=(FID,)):
        return [axes.get_xlabel() for axes in draw_sweep(points, quantities).axes]

    assert labels(made()) == ["sampling steps", "seconds an image", "guidance"]
    assert labels(made(guidances=(1.0,))) == ["sampling steps", "seconds an image"]
    assert labels(made(steps=(10,))) == ["seconds an image", "guidance"]
    assert labels(made(("ddpm",), (10,), (1.0,))) == ["seconds an image"]
    assert len(labels(made(), [FID, RECALL])) == 6


def test_the_best_point_has_a_ring_in_every_panel():
    points = made()
    best = points[7]
    for axes, place in zip(
        draw_sweep(points, [FID], best).axes, (best.calls, best.seconds, best.guidance), strict=True
    ):
        (ring,) = (line for line in axes.lines if line.get_label() == "_best")
        assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (place, best.values[FID.name])


def test_a_point_without_a_quantity_is_left_out_of_its_row_and_names_are_no_mathematics():
    points = [Point("$x_2$", 5, 0.1, 1.0, {FID.name: 1.0}), Point("b", 9, 0.2, 1.0, {RECALL.name: 0.5})]
    figure = draw_sweep(points, [FID, RECALL], points[0])
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [r"\$x_2\$", "b", "the best of all"]
    assert not [line for line in figure.axes[2].lines if line.get_label() == "_best"]
