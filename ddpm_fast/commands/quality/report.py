"""What a command says of samples: the JSON, and the table on the terminal."""

from __future__ import annotations

import platform
from typing import Any

import torch
from rich.markup import escape

from ddpm_fast import __version__
from ddpm_fast.commands.common import console
from ddpm_fast.commands.labels import Turns
from ddpm_fast.commands.quality.drawing import DrawnImages
from ddpm_fast.commands.quality.quantities import measured
from ddpm_fast.commands.quality.session import Outcome, Session
from ddpm_fast.errors import printable

_SEVERAL = 4
FEW = 10_000  # samples below which the Frechet distance is noticeably too large


def report_of(session: Session, outcome: Outcome) -> dict[str, Any]:
    """All that there is to say, in JSON's types: the numbers of each metric, and what they were measured on."""
    request, reference = session.request, session.reference
    values = dict(outcome.values)
    about = values.pop("about")
    return {
        **values,
        "features": {
            "name": about["features"],
            "resizing": about["resizing"],
            "dimensions": session.extractor.dimensions,
            "digest": session.extractor.kind.digest,
        },
        "samples": {"name": outcome.samples.name, "n": outcome.fake.n, **drawn_how(session, outcome)},
        "reference": None
        if reference is None
        else {
            "name": reference.name,
            "n": about["reference_n"],
            "part": request.part,
            "training_set": reference.training_set,
        },
        "seconds": outcome.seconds,
        "device": str(session.extractor.device),
        "ranks": session.ranks.world_size,
        "batch_size": request.batch_size,
        "versions": {"ddpm_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def drawn_how(session: Session, outcome: Outcome) -> dict[str, Any]:
    """How samples were drawn, in JSON's types; nothing if they were there already."""
    request, samples = session.request, outcome.samples
    drawn = samples if isinstance(samples, DrawnImages) else session.drawn
    if drawn is None or session.loaded is None:
        return {"path": request.samples}
    options = drawn.prepared.options
    return {
        "path": None if request.folder is None else str(request.folder),
        "model": session.loaded.name,
        "model_digest": session.loaded.digest,
        "sampler": options.sampler,
        "steps": int(str(options.steps)) if str(options.steps).isdecimal() else str(options.steps),
        "network_calls": drawn.network_calls,
        "guidance": options.guidance,
        "seed": options.seed,
        "labels": _classes(drawn, request.labels),
        "precision": drawn.precision,
    }


def print_report(report: dict[str, Any]) -> None:
    """The numbers as a short table, and what they are of."""
    for quantity in measured([report]):
        console.print(f"[bold]{quantity.name:<18}{quantity.text(report)}[/]")
    samples, reference, features = (report[key] for key in ("samples", "reference", "features"))
    how = "" if samples.get("sampler") is None else f" ({samples['sampler']}, {samples['network_calls']} calls)"
    against = ""
    if reference is not None:
        count = "the statistics" if reference["n"] is None else f"{reference['n']:,} images"
        against = f" against {count} of {printable(reference['name'])}"
    console.print(escape(f"{samples['n']:,} samples of {printable(samples['name'])}{how}{against}"))
    seconds = sum(report["seconds"].values())
    console.print(escape(f"features: {printable(features['name'])}, {features['resizing']}; {seconds:.1f} s"))
    if "fid" in report and samples["n"] < FEW:
        console.print(escape(_few(report["fid"], samples["n"], features["dimensions"])))


def _few(fid: dict[str, Any], n: int, dimensions: int) -> str:
    """What to say of a Frechet distance of few samples."""
    bias = fid.get("bias")
    # Halves tell too little where there are not several times as many samples as numbers in a feature.
    about = "" if bias is None else f", here by about {bias:.3g}{' or more' if n < _SEVERAL * dimensions else ''}"
    return (
        f"A Frechet distance of fewer than {FEW:,} samples is too large{about}: compare it only with others of {n:,}."
    )


def _classes(drawn: DrawnImages, labels: str | None) -> str | None:
    """Which classes the samples have: what --labels says, or how they were chosen without it."""
    if drawn.classes is None or labels is not None:
        return labels
    return "in turn" if isinstance(drawn.classes, Turns) else "as the reference"
