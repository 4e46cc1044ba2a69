"""The axes of `--sweep`, such as steps=10,25,50, and the ways of drawing that they combine to."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ddpm_fast.errors import InputError, check_number
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.respacing import check_spacing
from ddpm_fast.samplers import check_sampler

_STEPS = re.compile(r"(ddim)?0*[1-9][0-9]*")
_WITH_ETA = "ddim"  # the only sampler that has it


@dataclass(frozen=True)
class Combination:
    """One way of drawing images. Two that draw the same images are equal.

    Attributes:
        model: The model, as on the command line.
        sampler: The sampler.
        steps: The number of steps, or a stride such as "ddim50".
        spacing: How the steps are spaced.
        eta: How much noise ddim adds; None for the other samplers, which have no eta.
        guidance: The scale of the guidance; 1 is none.
    """

    model: str
    sampler: str = "ddpm"
    steps: int | str = 50
    spacing: str = "even"
    eta: float | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.sampler != _WITH_ETA:
            object.__setattr__(self, "eta", None)
        elif self.eta is None:
            object.__setattr__(self, "eta", 0.0)

    def options(self, base: SamplingOptions) -> SamplingOptions:
        """The options of sampling: those of the combination, and `base` for all others. Raises InputError."""
        return replace(
            base,
            sampler=self.sampler,
            steps=self.steps,
            spacing=self.spacing,
            eta=self.eta,
            guidance=None if self.guidance == 1 else self.guidance,
        )

    def settings(self) -> dict[str, Any]:
        """Its fields, in JSON's types."""
        return asdict(self)

    def describe(self, named: Sequence[str]) -> str:
        """The combination in words: the sampler and its steps, and those of its other fields that are named."""
        words = [f"{self.sampler} {self.steps}"]
        if self.spacing != "even" or "spacing" in named:
            words.append(self.spacing)
        if "eta" in named and self.eta is not None:
            words.append(f"eta {self.eta:g}")
        if "guidance" in named:
            words.append(f"guidance {self.guidance:g}")
        return " ".join([*words, *([self.model] if "model" in named else [])])


def _steps(text: str) -> int | str:
    if not _STEPS.fullmatch(text):
        raise InputError(f"steps is {text!r:.200}; expected a number of steps such as 50, or a stride such as ddim50")
    return int(text) if text.isdecimal() else text


def _spacing(text: str) -> str:
    check_spacing(text)
    return text


def _sampler(text: str) -> str:
    check_sampler(text, None)
    return text


def _eta(text: str) -> float:
    eta = _float("eta", text)
    check_sampler(_WITH_ETA, eta)
    return eta


def _guidance(text: str) -> float:
    expected = "a number of at least 0 (1 is no guidance; 1.5 to 8 are common)"
    return check_number("guidance", _float("guidance", text), lambda v: 0 <= v < math.inf, expected)


def _float(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{name} is {text!r:.200}; expected a number") from None


# What reads one value of each axis. The models vary slowest, so that each is loaded once.
AXES: dict[str, Callable[[str], Any]] = {
    "model": str,
    "sampler": _sampler,
    "guidance": _guidance,
    "spacing": _spacing,
    "eta": _eta,
    "steps": _steps,
}


def parse_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each axis, in the order of AXES.

    Args:
        texts: What --sweep was given, such as ["steps=10,25,50", "sampler=ddpm,ddim"].

    Raises:
        InputError: For an axis that does not exist or is given twice, and for values that cannot be read.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip()
        if not equals or name not in AXES:
            raise InputError(
                f"--sweep is {text!r:.200}; expected an option and its values, such as steps=10,25,50; the options are "
                f"{', '.join(AXES)}"
            )
        if name in found:
            raise InputError(f"--sweep {name} is given twice: give all of its values in one")
        parts = [part.strip() for part in values.split(",") if part.strip()]
        if not parts:
            raise InputError(f"--sweep {name} has no values; expected such as steps=10,25,50")
        try:
            found[name] = list(dict.fromkeys(AXES[name](part) for part in parts))
        except InputError as error:
            raise InputError(f"--sweep {name}: {error}") from None
    return {name: found[name] for name in AXES if name in found}


def expand(axes: Mapping[str, Sequence[Any]], base: Combination) -> tuple[list[Combination], list[str]]:
    """Every combination of the axes' values, each once; what is no axis is as in `base`.

    Args:
        axes: What parse_axes returns.
        base: The combination that the command would draw without a sweep.

    Returns:
        The combinations, and lines that say which values were not combined.
    """
    combinations = dict.fromkeys(
        replace(base, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    )
    said = []
    if "eta" in axes:
        without = list(dict.fromkeys(one.sampler for one in combinations if one.eta is None))
        if without:
            said.append(f"eta belongs to {_WITH_ETA}: {', '.join(without)} is drawn without it, once")
    return list(combinations), said
