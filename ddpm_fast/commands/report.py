"""Reports of `python -m ddpm_fast.evaluate`: JSON files. That of `nll` is also read again, to be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ddpm_fast.commands.outcome import note
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path, check_writable

# The fields of a report of `evaluate nll` that draw_bound needs. float stands for any number.
_REPORT: dict[str, type] = {
    "model": str,
    "data": str,
    "images": int,
    "estimate": bool,
    "prior_bits_per_dim": float,
    "total_bits_per_dim": float,
    "total_stderr": float,
    "timesteps": list,
    "counts": list,
    "terms_bits_per_dim": list,
    "terms_stderr": list,
    "mse_x0": list,
    "mse_eps": list,
}


def check_report_path(out: Path) -> None:
    """Raises InputError for a path (given as --out) that no report could be written to."""
    if out.suffix.lower() != ".json":
        raise InputError(f"--out is {out}; expected a name ending in .json (--plot is for a picture)")
    check_writable(out)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report, whole or not at all, and note it for --json. Raises InputError if it cannot be written."""
    with atomic_path(path) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    note(report=report)


def read_report(path: Path) -> dict[str, Any]:
    """The report of `evaluate nll`, as draw_bound takes it.

    Raises:
        InputError: If the file is not such a report.
    """
    advice = "expected the .json that `python -m ddpm_fast.evaluate nll --out FILE.json` writes"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {advice}") from error
    if not isinstance(report, dict):
        raise InputError(f"{path} holds a {type(report).__name__}; {advice}")
    wrong = [name for name, kind in _REPORT.items() if not _is(report.get(name), kind)]
    if wrong:
        raise InputError(f"{path} is not such a report: {', '.join(wrong)} missing or of another kind; {advice}")
    timesteps = report["timesteps"]
    lists = [report[name] for name, kind in _REPORT.items() if kind is list]
    numbers = all(_is(x, float) for values in lists for x in values)
    if not numbers or not timesteps or min(timesteps) < 0 or any(len(values) != len(timesteps) for values in lists):
        raise InputError(
            f"{path}: its lists do not have one number for each of its {len(timesteps)} timesteps; {advice}"
        )
    return report


def _is(value: object, kind: type) -> bool:
    """Whether a value from a JSON file is of a kind. float stands for any number."""
    return isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
