"""The single numbers in what was measured: where each is in a report, what is better, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quantity:
    """A number of a report.

    Attributes:
        name: What it is called.
        metric: The metric that it belongs to, one of measure.METRICS.
        field: Its name in what measure.measure gives for the metric.
        error: The name of its error there, or None.
        lower_is_better: Whether a smaller number means better images.
        form: How it is written.
    """

    name: str
    metric: str
    field: str
    error: str | None = None
    lower_is_better: bool = False
    form: str = ".3f"

    def value(self, report: Mapping[str, Any]) -> float | None:
        """The number in a report; None if it has none."""
        return _number(report, self.metric, self.field)

    def error_of(self, report: Mapping[str, Any]) -> float | None:
        """Its error in a report; None if it has none."""
        return None if self.error is None else _number(report, self.metric, self.error)

    def text(self, report: Mapping[str, Any]) -> str:
        """The number with its error, or a dash."""
        value, error = self.value(report), self.error_of(report)
        if value is None:
            return "-"
        return f"{value:{self.form}}" + ("" if error is None else f" ± {error:.2g}")


# Papers mean those of Inception's features by FID, KID and IS.
FRECHET, KERNEL, SCORE = "Frechet distance", "kernel distance", "inception score"
QUANTITIES = (
    Quantity(FRECHET, "fid", "value", lower_is_better=True, form=".4g"),
    Quantity(KERNEL, "kid", "value", error="error", lower_is_better=True, form=".4g"),
    Quantity("precision", "pr", "precision"),
    Quantity("recall", "pr", "recall"),
    Quantity("density", "pr", "density"),
    Quantity("coverage", "pr", "coverage"),
    Quantity(SCORE, "is", "mean", error="std", form=".4g"),
)


def measured(reports: Sequence[Mapping[str, Any]]) -> list[Quantity]:
    """The quantities that some of the reports have."""
    return [one for one in QUANTITIES if any(one.value(report) is not None for report in reports)]


def best_of(quantity: Quantity, reports: Sequence[Mapping[str, Any]]) -> int | None:
    """The place of the report with the best value; None if none has one."""
    found = {i: value for i, report in enumerate(reports) if (value := quantity.value(report)) is not None}
    choose: Callable[..., int] = min if quantity.lower_is_better else max
    return choose(found, key=found.__getitem__) if found else None


def best_of_all(reports: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The place of the best report, and by what it is the best; None if nothing can be compared.

    That is the Frechet distance, or without it the kernel distance, or the harmonic mean of precision and recall, or
    the inception score.
    """
    for quantity in QUANTITIES:
        if quantity.metric == "pr":
            found = {i: mean for i, report in enumerate(reports) if (mean := _harmonic(report)) is not None}
            if found:
                return max(found, key=found.__getitem__), "the harmonic mean of precision and recall"
        elif (place := best_of(quantity, reports)) is not None:
            return place, quantity.name
    return None


def _harmonic(report: Mapping[str, Any]) -> float | None:
    precision, recall = _number(report, "pr", "precision"), _number(report, "pr", "recall")
    if precision is None or recall is None:
        return None
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _number(report: Mapping[str, Any], metric: str, field: str) -> float | None:
    value = (report.get(metric) or {}).get(field)
    return None if value is None else float(value)
