"""`--sweep` of `python -m ddpm_fast.evaluate fid` and the like: samples drawn in many ways from the same noise, and
measured.

The JSON has what is finished after each combination, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from ddpm_fast.commands.common import console, say_written
from ddpm_fast.commands.labels import check_null_class
from ddpm_fast.commands.precision import choose_dtype
from ddpm_fast.commands.quality.axes import Combination, expand
from ddpm_fast.commands.quality.drawing import DrawnImages
from ddpm_fast.commands.quality.quantities import measured
from ddpm_fast.commands.quality.session import Outcome, Session
from ddpm_fast.commands.quality.settings import DEFAULT_STEPS, Request
from ddpm_fast.commands.quality.sweep_report import KIND, best_of_sweep, figure_of, markdown_of, read_sweep
from ddpm_fast.commands.report import write_report
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.atomic import atomic_path, check_writable
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.load import load_model
from ddpm_fast.loops.distributed import of_first_process
from ddpm_fast.pictures.canvas import save_figure

_WARMING_STEPS = 3  # as many as a CUDA graph needs to be captured


def check_sweep(request: Request, page: Path | None, out: Path) -> None:
    """Raises InputError for options that a sweep cannot have, and files that it could not write. out: the JSON."""
    if request.model is None or request.samples is not None:
        raise InputError("--sweep draws samples in several ways: give --model, and leave --samples out")
    for name, value in (("--keep", request.keep), ("--page", page), ("--write-reference", request.write_reference)):
        if value is not None:
            raise InputError(f"{name} is for one way of drawing: leave it or --sweep out")
    for path in _others(out):
        check_writable(path)


def _others(out: Path) -> tuple[Path, Path]:
    """What is written beside the JSON: the table and the figure."""
    return out.with_suffix(".md"), out.with_suffix(".png")


@dataclass
class Models:
    """The models of a sweep, of which one is in memory at a time beside the first.

    Attributes:
        session: The session, whose model is the first one.
    """

    session: Session
    _last: tuple[str, LoadedModel] | None = None

    def get(self, source: str) -> LoadedModel:
        """A model. Raises InputError if its images or classes are others than those of the first one."""
        first, request = self.session.loaded, self.session.request
        assert first is not None
        if source == request.model:
            return first
        if self._last is None or self._last[0] != source:
            device = self.session.extractor.device
            loaded = load_model(source, device, choose_dtype(request.precision, device), request.flags)
            for what, one, other in (
                ("shape", first.shape, loaded.shape),
                ("classes", first.classes, loaded.classes),
                ("range of values", first.value_range, loaded.value_range),
            ):
                if one != other:
                    raise InputError(
                        f"--sweep model: {source} has another {what} than {request.model} ({other} and {one}); one "
                        "sweep compares models of the same images: measure this one by itself"
                    )
            self._last = source, loaded
        return self._last[1]


@dataclass
class Sweep:
    """Ways of drawing images, and what was measured of those that are finished.

    Attributes:
        session: What measures.
        axes: The values of each axis.
        out: The JSON.
        combinations: Those that can be drawn.
        left_out: Lines that say which are not drawn, and why.
        rows: What was measured, in JSON's types: a row for each finished combination.
    """

    session: Session
    axes: Mapping[str, Sequence[Any]]
    out: Path
    combinations: list[Combination] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    _models: Models = field(init=False)
    _calls: dict[Combination, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._models = Models(self.session)

    @classmethod
    def of(cls, session: Session, axes: Mapping[str, Sequence[Any]], out: Path) -> Sweep:
        """Every combination that can be drawn, and what a file has of them already. Nothing is drawn.

        Raises:
            InputError: For guidance without classes, if nothing can be drawn, and if the file has another sweep.
        """
        assert session.loaded is not None
        request, T = session.request, session.loaded.diffusion.num_timesteps
        steps = str(min(DEFAULT_STEPS, T)) if request.steps is None else request.steps
        base = Combination(
            model=str(request.model),
            sampler=request.sampler,
            steps=int(steps) if steps.isdecimal() else steps,
            guidance=1.0 if request.guidance is None else request.guidance,
        )
        asked, said = expand(axes, base)
        sweep = cls(session, axes, out, left_out=said)
        for source in dict.fromkeys(one.model for one in asked):
            sweep._models.get(source)
        sweep._check_guidance(asked)
        for combination in asked:
            try:
                sweep._calls[combination] = sweep.drawn(combination).network_calls
                sweep.combinations.append(combination)
            except InputError as error:
                sweep.left_out.append(f"{combination.describe(tuple(axes))} is left out: {error}")
        if not sweep.combinations:
            raise InputError(f"--sweep: no combination can be drawn; {sweep.left_out[-1]}")
        sweep._resume()
        return sweep

    def _check_guidance(self, combinations: Sequence[Combination]) -> None:
        """Raises InputError for a guidance that a model cannot have."""
        for source in dict.fromkeys(one.model for one in combinations if one.guidance != 1):
            loaded = self._models.get(source)
            assert self.session.drawn is not None
            if not loaded.classes or self.session.drawn.classes is None:
                whose = f"{source} has no classes" if not loaded.classes else "the samples have no classes"
                raise InputError(
                    f"--sweep guidance: {whose}, so there is nothing to guide towards: leave guidance out, or draw "
                    "with labels"
                )
            check_null_class(loaded, "--sweep guidance leads away from the null class")

    def drawn(self, combination: Combination) -> DrawnImages:
        """The samples of a combination, from the noise and with the classes that all have. Raises InputError."""
        first = self.session.drawn
        assert first is not None
        options = combination.options(replace(first.prepared.options, labels=None))
        return DrawnImages.of(self._models.get(combination.model), len(first), options, first.classes)

    def settings(self) -> dict[str, Any]:
        """What all combinations have in common, in JSON's types: only with the same are results of one sweep."""
        session, request = self.session, self.session.request
        kind, reference = session.extractor.kind, session.reference
        assert session.drawn is not None
        classes = session.drawn.prepared.labels
        return {
            "metrics": list(session.metrics),
            "n": len(session.drawn),
            "seed": request.seed,
            "classes": None if classes is None else hashlib.sha256(classes.numpy().tobytes()).hexdigest(),
            "precision": request.precision,
            "features": {"name": kind.features, "resizing": kind.resizing, "digest": kind.digest},
            "reference": None if reference is None else {"name": reference.name, "n": reference.count},
            "device": session.extractor.device.type,
            "ranks": session.ranks.world_size,
            "batch_size": request.batch_size,
        }

    def report(self) -> dict[str, Any]:
        """All that is known, in JSON's types."""
        return {
            "kind": KIND,
            "settings": self.settings(),
            "axes": {name: list(values) for name, values in self.axes.items()},
            "left_out": self.left_out,
            "best": best_of_sweep(self.rows),
            "combinations": self.rows,
        }

    def key(self, combination: Combination) -> dict[str, Any]:
        """What a row says of its combination: with the digest of the model, whose file may change."""
        return {**combination.settings(), "model_digest": self._models.get(combination.model).digest}

    def _resume(self) -> None:
        """Take over what the file has of the same sweep, if it exists. Raises InputError if it has something else."""
        if not self.out.exists():
            return
        report = read_sweep(self.out)
        known = {one.model: self._models.get(one.model).digest for one in self.combinations}
        mine, found = self.settings(), report["settings"]
        different = [name for name in mine if found.get(name) != mine[name]]
        if different:
            raise InputError(
                f"--out {self.out} has a sweep with another {', '.join(different)}: give the same options to go on "
                "with it, or another --out"
            )
        for row in report["combinations"]:
            source = row["model"]
            if source in known and row["model_digest"] != known[source]:
                console.print(escape(f"{printable(source)} has changed since, so what was measured of it is dropped"))
            else:
                self.rows.append(row)

    def kept(self) -> str:
        """What is kept after a signal."""
        if not self.rows:
            return "no combination was finished, so nothing was written"
        return f"{len(self.rows)} combinations are in {self.out}; the same command with --out {self.out} goes on"

    def missing(self) -> list[Combination]:
        """The combinations that are not finished."""

        def same(row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
            return all(row.get(name) == value for name, value in key.items() if name != "model")

        return [one for one in self.combinations if not any(same(row, self.key(one)) for row in self.rows)]

    def run(self) -> None:
        """Draw and measure what is missing, and write what is known after each combination.

        The ranks call it together. The first one writes: the JSON, and in the end a table and a figure beside it.
        """
        missing = of_first_process(self.missing())
        finished, left = len(self.combinations) - len(missing), _TimeLeft([self._cost(one) for one in missing])
        if finished:
            console.print(f"{finished} of {len(self.combinations)} combinations are finished already and are kept")
        warm: set[tuple[str, bool]] = set()
        for number, combination in enumerate(missing, finished + 1):
            kind = (combination.model, combination.guidance != 1)
            if kind not in warm:
                self._warm(combination)
                warm.add(kind)
            place = f"{number} of {len(self.combinations)}"
            drawn = self.drawn(combination)
            outcome = self.session.measured(drawn, f"{place}: {combination.sampler} {combination.steps}")
            if outcome is None:  # the first rank has it
                continue
            left.note(outcome.seconds)
            self.rows.append(self._row(combination, drawn, outcome))
            write_report(self.out, self.report())
            numbers = ", ".join(f"{one.name} {one.text(outcome.values)}" for one in measured([outcome.values]))
            words = combination.describe(tuple(self.axes))
            console.print(
                escape(f"{place}: {words}: {numbers}; {outcome.seconds['drawing']:.1f} s of drawing; {left.text()}")
            )
        if self.session.ranks.is_first:
            self._write()

    def _write(self) -> None:
        """Write the report, the table and the figure, and print the table."""
        table, picture = _others(self.out)
        write_report(self.out, self.report())
        text = markdown_of(self.rows)
        with atomic_path(table) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
        save_figure(figure_of(self.report()), picture)
        console.print(escape(text))
        for line in self.left_out:
            console.print(escape(line))
        say_written(self.out, table, picture)

    def _cost(self, combination: Combination) -> int:
        return self._calls[combination] * (1 if combination.guidance in (0, 1) else 2)

    def _warm(self, combination: Combination) -> None:
        """Draw a first batch in few steps, so that what is only done once is not counted as drawing."""
        steps = min(_WARMING_STEPS, self._models.get(combination.model).diffusion.num_timesteps)
        drawn = self.drawn(replace(combination, steps=steps, spacing="even"))
        drawn.take(torch.arange(min(self.session.request.batch_size, len(drawn))))

    def _row(self, combination: Combination, drawn: DrawnImages, outcome: Outcome) -> dict[str, Any]:
        seconds = outcome.seconds["drawing"]
        values = {name: value for name, value in outcome.values.items() if name != "about"}
        return {
            **self.key(combination),
            "network_calls": drawn.network_calls,
            "seconds": seconds,
            "seconds_per_image": seconds / len(drawn),
            **values,
        }


class _TimeLeft:
    """How long a sweep still takes: drawing in proportion to the calls of the network, and the rest for each."""

    def __init__(self, costs: Sequence[int]):
        self._costs = list(costs)
        self._done, self._drawing, self._others = 0, 0.0, 0.0

    def note(self, seconds: Mapping[str, float]) -> None:
        """A combination took so long."""
        self._done += 1
        self._drawing += seconds["drawing"]
        self._others += sum(seconds.values()) - seconds["drawing"]

    def text(self) -> str:
        """The time left in words."""
        done, rest = sum(self._costs[: self._done]), self._costs[self._done :]
        if not rest:
            return "done"
        left = self._drawing / max(1, done) * sum(rest) + self._others / max(1, self._done) * len(rest)
        return f"about {left:.0f} s left" if left < 100 else f"about {left / 60:.0f} min left"
