"""What the JSON files of `evaluate fid` and the like, and of `evaluate card`, say on a model's page on the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_fast.commands.quality.quantities import measured
from ddpm_fast.errors import InputError
from ddpm_fast.formats.card import as_code


def lines_of(path: Path, digest: str) -> list[str]:
    """What a report says, as lines of Markdown, in which names are code. Nothing if it is of another model.

    Args:
        path: The report.
        digest: That of the model.

    Raises:
        InputError: If the file is no such report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["samples"].get("model_digest") not in (None, digest):
            return []
        return [_metrics(report), *_copies(report), *_likelihood(report)]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        what = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(
            f"cannot read {path} ({what:.200}); expected what `python -m ddpm_fast.evaluate all` or `card` writes: "
            "measure again, or move the file elsewhere"
        ) from error


def _metrics(report: Mapping[str, Any]) -> str:
    samples, reference, features = (report[name] for name in ("samples", "reference", "features"))
    errors = report.get("errors") or {}
    numbers = []
    for one in measured([report]):
        error = errors.get(one.name) if one.error is None else None
        numbers.append(f"{one.name} {one.text(report)}" + ("" if error is None else f" ± {float(error):.2g}"))
    how = ""
    if samples.get("sampler") is not None:
        how = f" ({as_code(str(samples['sampler']))}, {int(samples['network_calls'])} steps)"
    against = ""
    if reference is not None:
        count = "" if reference["n"] is None else f"{int(reference['n']):,} images of "
        against = f" against {count}{as_code(str(reference['name']))}"
    return (
        f"{', '.join(numbers)}: {int(samples['n']):,} samples{how}{against}; "
        f"features {as_code(str(features['name']))}, {as_code(str(features['resizing']))}"
    )


def _copies(report: Mapping[str, Any]) -> list[str]:
    found = report.get("memorisation")
    if found is None:
        return []
    return [
        f"{float(found['copies']):.1%} of the samples are as near to a training image as the nearest "
        f"{float(found['copies_of_held_out']):.1%} of {int(found['held_out']):,} held-out images"
    ]


def _likelihood(report: Mapping[str, Any]) -> list[str]:
    found = report.get("likelihood")
    if found is None:
        return []
    estimate = ", estimated" if found["estimate"] else ""
    return [
        f"{float(found['total_bits_per_dim']):.4f} bits/dim (standard error {float(found['total_stderr']):.4f}"
        f"{estimate}), on {int(found['images'])} held-out images"
    ]
