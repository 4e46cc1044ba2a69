"""The figure of a sweep over widths shows what was measured, where, and which is the best."""

import pytest

from ddpm_fast.pictures.averages import Measured, draw_widths

POINTS = [Measured(0.2, 5.0), Measured(0.05, 3.0, 0.5), Measured(0.1, 4.0)]


def lines(figure):
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}


@pytest.mark.parametrize(("lower", "best"), [(True, [0.05, 3.0]), (False, [0.2, 5.0])])
def test_points_by_width_and_a_ring_at_the_best(lower, best):
    figure = draw_widths(POINTS, "FID", lower, title="a $ sign")
    drawn = lines(figure)
    all_of_them = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[0.05, 3.0], [0.1, 4.0], [0.2, 5.0]] in all_of_them
    assert [[0.05, 3.5], [0.1, 4.0], [0.2, 5.0]] in all_of_them, "the ends of the error bars"
    assert drawn[f"the best: width {best[0]:g}"] == [best]
    assert ("lower" in figure.axes[0].get_title(loc="left")) == lower
    assert "the run's own model.safetensors" not in drawn


def test_the_runs_own_model_is_a_line_across():
    drawn = lines(draw_widths(POINTS, "FID", True, plain=4.5))
    assert {y for _, y in drawn["the run's own model.safetensors"]} == {4.5}
