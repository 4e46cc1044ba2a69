"""`python -m ddpm_fast.evaluate fid|kid|pr|is|all`: how samples compare with real images."""

from __future__ import annotations

from pathlib import Path

import typer

from ddpm_fast.commands.common import FlagsOption, plain_errors, say_written
from ddpm_fast.commands.drawing import unused_path
from ddpm_fast.commands.fitting import PartOption
from ddpm_fast.commands.quality.axes import parse_axes
from ddpm_fast.commands.quality.opening import open_session
from ddpm_fast.commands.quality.page import check_page, show, write_page
from ddpm_fast.commands.quality.report import print_report, report_of
from ddpm_fast.commands.quality.running import running
from ddpm_fast.commands.quality.session import Session
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
    PageOption,
    PrecisionOption,
    ReferenceCountOption,
    ReferenceFormOption,
    ReferenceOption,
    Request,
    SamplerOption,
    SamplesOption,
    SeedOption,
    StepsOption,
    SweepOption,
    WriteReferenceOption,
    parse_metrics,
)
from ddpm_fast.commands.quality.sweep import Sweep, check_sweep
from ddpm_fast.commands.ranks import Ranks, ranks_of_environment
from ddpm_fast.commands.report import check_report_path, write_report
from ddpm_fast.commands.selecting import ImageColumnOption, LabelColumnOption, SplitOption, SubsetOption
from ddpm_fast.commands.together import in_first
from ddpm_fast.data.selection import Selection
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import check_writable
from ddpm_fast.metrics.feature_set import FeatureSet
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
    page: PageOption = None,
    sweep: SweepOption = None,
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
        axes = parse_axes(sweep or [])
        out = unused_path(Path("sweep.json" if axes else "quality.json")) if out is None else out
        if axes:
            check_sweep(request, page, out)
        _check_outputs(request, out, page, ranks)
        session = open_session(request, ranks)
        if axes:
            plan = Sweep.of(session, axes, out)
            with running(session, plan.kept):
                plan.run()
            return
        if page is not None:
            show(session)
        with running(session):
            real = session.real()
            if write_reference is not None:
                in_first(lambda: _write_reference(session, real))
                say_written(write_reference)
            if model is None and samples is None:
                return
            outcome = session.measured(session.samples())
        if outcome is not None:
            report = report_of(session, outcome)
            write_report(out, report)
            print_report(report)
            if page is not None:
                write_page(page, session, outcome, report)
            say_written(out, request.keep, page)


def _write_reference(session: Session, real: FeatureSet | None) -> None:
    """Write the file of the reference that is asked for."""
    request = session.request
    assert request.write_reference is not None and real is not None
    write_statistics(request.write_reference, real, request.reference_form, session.reference_images())


def _metrics(command: str, asked: str | None) -> tuple[str, ...]:
    """The metrics that a command measures. Raises InputError for unknown ones."""
    if command == ALL:
        return METRICS if asked is None else parse_metrics(asked)
    if asked is not None:
        raise InputError(f"--metrics is for `evaluate all`: leave it out, or give `all` in place of `{command}`")
    return (command,)


def _check_outputs(request: Request, out: Path, page: Path | None, ranks: Ranks) -> None:
    """Raises InputError for output files that could not be written."""
    if request.array is not None:
        ranks.refuse_several("an .npz is written by one: give --keep a folder, such as samples/, or start one process")
    if not ranks.is_first:
        return
    check_report_path(out)
    if page is not None:
        check_page(page)
    for path in (request.array, request.write_reference):
        if path is not None:
            if path.suffix.lower() != ".npz":
                raise InputError(f"{path} is to be an .npz: give a name that ends so")
            check_writable(path)
