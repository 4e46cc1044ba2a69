"""`python -m ddpm_fast.average RUN --sweep 0.05,0.1,0.2`: which width of the average gives the best model.

The widths are measured on samples that all have the same noise and classes (fid, kid; see quality/), or by the loss on
images (loops/held_out.py), which takes a fraction of the time. The paper's authors choose the width by FID.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ddpm_fast.commands.common import choose_device, console, say_written
from ddpm_fast.commands.fitting import is_training_set, load_fitting, say_training_set
from ddpm_fast.commands.precision import choose_dtype
from ddpm_fast.commands.quality.drawing import DrawnImages
from ddpm_fast.commands.quality.opening import open_session
from ddpm_fast.commands.quality.quantities import QUANTITIES, Quantity
from ddpm_fast.commands.quality.settings import Request
from ddpm_fast.commands.ranks import ranks_of_environment
from ddpm_fast.commands.report import write_report
from ddpm_fast.commands.stopping import Stopped, stop_signals
from ddpm_fast.data import split_as_recorded
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.atomic import check_writable
from ddpm_fast.files.averages import Average, Plan
from ddpm_fast.files.checkpoint import assemble, read_model, save_model
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.load import load_model
from ddpm_fast.loops.held_out import EVALUATIONS, evaluate_losses, mean_loss
from ddpm_fast.loops.snapshot import MODEL_NAME
from ddpm_fast.pictures.averages import Measured, draw_widths
from ddpm_fast.pictures.canvas import save_figure

LOSS = Quantity("loss", "loss", "value", lower_is_better=True, form=".5f")
QUALITIES = {one.metric: one for one in (*QUANTITIES, LOSS) if one.metric in ("fid", "kid", "loss")}

# Measures a model: its numbers, in JSON's types, of which QUALITIES names one. check: what it raises ends the work.
Measure = Callable[[LoadedModel, str, Callable[[], object]], dict[str, Any]]


class Judge(NamedTuple):
    """What tells which of several models is the best.

    Attributes:
        quantity: What is measured.
        about: In words, on which images.
        measure: Measures a model, whose name is for the progress.
    """

    quantity: Quantity
    about: str
    measure: Measure


@dataclass(frozen=True)
class Sweep:
    """Averages of several widths, of which the best is written.

    Attributes:
        planned: The averages.
        judge: What tells which is the best.
        run: The folder of the run.
        out: The file to write; a report and a figure go beside it.
        request: Where and in which precision the models are run, and on what they are measured.
    """

    planned: Plan
    judge: Judge
    run: Path
    out: Path
    request: Request

    def measure(self, averages: Callable[[], Any]) -> None:
        """Measure each width and write the best. averages: Gives them one after the other."""
        with stop_signals("stopping; Ctrl-C again to abort", lambda: "aborted") as stopping:
            try:
                self._measure(averages, stopping.check)
            except Stopped:
                console.print("Stopped: nothing was written.")
                raise typer.Exit(stopping.status) from None

    def _measure(self, averages: Callable[[], Any], check: Callable[[], object]) -> None:
        quantity, rows = self.judge.quantity, []
        best: tuple[float, dict[str, Tensor], Average] | None = None
        for average in averages():
            # As they are written, so that what is measured is the file.
            state = {name: tensor.bfloat16() for name, tensor in average.state.items()}
            width = average.profile.width
            values = self.judge.measure(self._loaded(average, state), f"width {width:g}", check)
            rows.append({"width": width, "error": average.error, **values})
            cost = self._cost(values)
            console.print(escape(f"width {width:g}: {quantity.name} {quantity.text(values)}"))
            if best is None or cost < best[0]:
                best = cost, state, average
        assert best is not None
        self._write(rows, self._plain(check), best[1], best[2])

    def _cost(self, values: dict[str, Any]) -> float:
        value = self.judge.quantity.value(values)
        assert value is not None
        return value if self.judge.quantity.lower_is_better else -value

    def _loaded(self, average: Average, state: dict[str, Tensor]) -> LoadedModel:
        device = choose_device(self.request.device)
        return assemble(self.out, state, average.config, device, choose_dtype(self.request.precision, device))

    def _plain(self, check: Callable[[], object]) -> dict[str, Any] | None:
        """The same of the run's own model, if that is of the same training step."""
        path = self.run / MODEL_NAME
        try:
            training = read_model(path)[1].get("training")
        except InputError:
            return None
        if not isinstance(training, dict) or training.get("steps") != self.planned.wanted[0].step:
            return None
        device = choose_device(self.request.device)
        loaded = load_model(path, device, choose_dtype(self.request.precision, device))
        return self.judge.measure(loaded, MODEL_NAME, check)

    def _write(
        self, rows: list[dict[str, Any]], plain: dict[str, Any] | None, state: dict[str, Tensor], best: Average
    ) -> None:
        """Write the best model, the report and the figure, and show the table."""
        quantity, table = self.judge.quantity, Table("width", self.judge.quantity.name, "profile within")
        report, picture = beside(self.out)
        for row in rows:
            mark = " (the best)" if row["width"] == best.profile.width else ""
            table.add_row(f"{row['width']:g}", quantity.text(row) + mark, f"{row['error']:.2%}")
        if plain is not None:
            table.add_row(MODEL_NAME, quantity.text(plain), "")
        console.print(table)
        save_model(self.out, state, best.config)
        about = {"by": quantity.metric, "on": self.judge.about, "step": best.profile.step, "best": best.profile.width}
        write_report(report, {"kind": "widths of an average", **about, "widths": rows, "model": plain})
        points = [Measured(row["width"], quantity.value(row) or 0.0, quantity.error_of(row)) for row in rows]
        figure = draw_widths(
            points,
            quantity.name,
            quantity.lower_is_better,
            None if plain is None else quantity.value(plain),
            f"{quantity.name} after {best.profile.step:,} training steps, {self.judge.about}",
        )
        save_figure(figure, picture)
        say_written(self.out, report, picture)


def beside(out: Path) -> tuple[Path, Path]:
    """What is written beside the best model: the report and the figure."""
    return out.with_suffix(".json"), out.with_suffix(".png")


def check_sweep(by: str, out: Path) -> None:
    """Raises InputError for a quantity that there is not, and for files that could not be written."""
    if by not in QUALITIES:
        raise InputError(f"--by is {by!r:.200}; expected one of {', '.join(QUALITIES)}")
    if out.suffix != ".safetensors":
        raise InputError(f"--out is {out}; expected a name ending in .safetensors, for the best of the widths")
    for path in (out, *beside(out)):
        check_writable(path)


def judge_of(by: str, request: Request) -> Judge:
    """What measures the models that request.model is one of.

    Raises:
        InputError: If the images or the features do not fit the model.
    """
    return _by_loss(request) if by == LOSS.metric else _by_samples(by, request)


def _by_samples(by: str, request: Request) -> Judge:
    session = open_session(request, ranks_of_environment())
    first, reference = session.drawn, session.reference
    assert first is not None and reference is not None

    def measure(loaded: LoadedModel, title: str, check: Callable[[], object]) -> dict[str, Any]:
        session.check = check
        options = replace(first.prepared.options, labels=None)
        outcome = session.measured(DrawnImages.of(loaded, len(first), options, first.classes), title)
        assert outcome is not None
        return {by: outcome.values[by]}

    about = f"{len(first):,} samples against {printable(reference.name)}, {session.extractor.kind.features}"
    return Judge(QUALITIES[by], about, measure)


def _by_loss(request: Request) -> Judge:
    assert request.model is not None and request.reference is not None
    model = load_model(request.model)
    dataset = load_fitting(request.reference, model)
    recorded = (model.config.get("training") or {}).get("held_out")
    if recorded is None:
        say_training_set(dataset, is_training_set(dataset, model))
    else:
        dataset = split_as_recorded(dataset, recorded)[1]
    held_out = "" if recorded is None else " that were held out"

    def measure(loaded: LoadedModel, title: str, check: Callable[[], object]) -> dict[str, Any]:
        part = slice(0, EVALUATIONS)
        losses = evaluate_losses(loaded.unet, loaded.diffusion, dataset, part, request.seed, request.batch_size, check)
        found = mean_loss(losses, loaded.diffusion.num_timesteps)
        return {LOSS.metric: {"value": found.loss, "quarters": list(found.quarters)}}

    about = f"{len(dataset):,} images of {printable(dataset.name)}{held_out}"
    return Judge(LOSS, about, measure)
