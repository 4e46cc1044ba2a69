"""`python -m ddpm_fast.evaluate fid|kid|pr|is|all`: how samples compare with real images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import typer

from ddpm_fast.commands.common import FlagsOption, console, plain_errors, say_written
from ddpm_fast.commands.drawing import unused_path
from ddpm_fast.commands.fitting import PartOption
from ddpm_fast.commands.quality.report import print_report, report_of
from ddpm_fast.commands.quality.session import Session, open_session
from ddpm_fast.commands.quality.settings import (
    BatchSizeOption,
    DeviceOption,
    FeatureSizeOption,
    FeaturesOption,
    GuidanceOption,
    KeepOption,
    LabelsOption,
    MetricsOption,
    ModelOption,
    NOption,
    OutOption,
    PrecisionOption,
    ReferenceCountOption,
    ReferenceFormOption,
    ReferenceOption,
    Request,
    SamplerOption,
    SamplesOption,
    SeedOption,
    StepsOption,
    WriteReferenceOption,
    parse_metrics,
)
from ddpm_fast.commands.ranks import Ranks, ranks_of_environment
from ddpm_fast.commands.report import check_report_path, write_report
from ddpm_fast.commands.selecting import ImageColumnOption, LabelColumnOption, SplitOption, SubsetOption
from ddpm_fast.commands.stopping import Stopped, stop_signals
from ddpm_fast.commands.together import joined, share_signal
from ddpm_fast.data.selection import Selection
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import check_writable
from ddpm_fast.metrics.measure import METRICS
from ddpm_fast.metrics.statistics_file import write_statistics

ALL = "all"
HELP = {
    "fid": "The Frechet distance of samples from real images, FID if the features are Inception's: lower is better.",
    "kid": "The kernel distance of samples from real images, without bias and with its error: lower is better.",
    "pr": "Precision and recall: how many samples look real, and how much of what is real they cover.",
    "is": "The inception score: how sure a classifier is of each sample, and how much samples differ.",
    ALL: "All of it, with density and coverage.",
}


def quality(
    context: typer.Context,
    model: ModelOption = None,
    flags: FlagsOption = None,
    samples: SamplesOption = None,
    reference: ReferenceOption = None,
    part: PartOption = "all",
    metrics: MetricsOption = None,
    n: NOption = None,
    n_reference: ReferenceCountOption = None,
    sampler: SamplerOption = "ddpm",
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    labels: LabelsOption = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 64,
    features: FeaturesOption = None,
    feature_size: FeatureSizeOption = None,
    out: OutOption = None,
    write_reference: WriteReferenceOption = None,
    reference_form: ReferenceFormOption = "edm",
    keep: KeepOption = None,
    split: SplitOption = None,
    subset: SubsetOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
) -> None:
    """Compare samples with real images."""
    with plain_errors():
        ranks = ranks_of_environment()
        request = Request(
            metrics=_metrics(context.info_name or ALL, metrics),
            chooses=context.info_name != ALL or metrics is not None,
            model=model,
            flags=flags,
            samples=samples,
            reference=reference,
            part=part,
            n=n,
            n_reference=n_reference,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            labels=labels,
            seed=seed,
            batch_size=batch_size,
            features=features,
            feature_size=feature_size,
            write_reference=write_reference,
            reference_form=reference_form,
            keep=keep,
            device=device,
            precision=precision,
            selection=Selection(split, subset, image_column, label_column),
        )
        out = unused_path(Path("quality.json")) if out is None else out
        _check_outputs(request, out, ranks)
        session = open_session(request, ranks)
        with running(session):
            real = session.real()
            if write_reference is not None and real is not None:
                write_statistics(write_reference, real, reference_form, session.reference_images())
                say_written(write_reference)
            if model is None and samples is None:
                return
            outcome = session.measured(session.samples())
        if outcome is not None:
            report = report_of(session, outcome)
            write_report(out, report)
            print_report(report)
            say_written(out, request.keep)


def _metrics(command: str, asked: str | None) -> tuple[str, ...]:
    """The metrics that a command measures. Raises InputError for unknown ones."""
    if command == ALL:
        return METRICS if asked is None else parse_metrics(asked)
    if asked is not None:
        raise InputError(f"--metrics is for `evaluate all`: leave it out, or give `all` in place of `{command}`")
    return (command,)


def _check_outputs(request: Request, out: Path, ranks: Ranks) -> None:
    """Raises InputError for output files that could not be written."""
    if request.array is not None:
        ranks.refuse_several("an .npz is written by one: give --keep a folder, such as samples/, or start one process")
    if not ranks.is_first:
        return
    check_report_path(out)
    for path in (request.array, request.write_reference):
        if path is not None:
            if path.suffix.lower() != ".npz":
                raise InputError(f"{path} is to be an .npz: give a name that ends so")
            check_writable(path)


@contextlib.contextmanager
def running(session: Session) -> Iterator[None]:
    """Inside, the ranks work together, and a signal ends the command in all of them."""
    first = "stopping after this step; Ctrl-C again to abort" if session.ranks.is_first else ""
    with joined(session.ranks, "evaluate"), stop_signals(first, lambda: "aborted") as stopping:
        session.check = stopping.check
        try:
            yield
        except Stopped:
            share_signal(stopping, console.print)
            folder = session.request.folder
            kept = "nothing was written; with --keep FOLDER what is drawn is kept"
            if folder is not None:
                kept = f"what was drawn is in {folder}, and the same command draws the rest"
            console.print(f"Stopped: {kept}.", markup=False)
            raise typer.Exit(stopping.status) from None
