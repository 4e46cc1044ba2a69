"""The options that the commands of quality/ share, and `Request`, which holds and checks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ddpm_fast.commands.common import SOURCES, path_option
from ddpm_fast.commands.labels import LABELS_HELP
from ddpm_fast.commands.quality.axes import AXES
from ddpm_fast.data.selection import Selection
from ddpm_fast.errors import InputError
from ddpm_fast.metrics.measure import METRICS
from ddpm_fast.metrics.statistics_file import FORMS
from ddpm_fast.pictures.images import output_kind
from ddpm_fast.samplers import SAMPLERS

DEFAULT_N = 10_000
DEFAULT_STEPS = 50

ModelOption = Annotated[str | None, path_option(f"draw the samples from this model: {SOURCES}")]
SamplesOption = Annotated[
    str | None,
    path_option(
        "samples that exist: a folder of pictures, an .npz (images or arr_0) or .npy, or their features; a folder that "
        "`sample` has begun is completed with --model"
    ),
]
ReferenceOption = Annotated[
    str | None,
    path_option(
        "the real images: whatever --data of training takes, or a statistics file of ADM (mu, sigma), EDM (mu, sigma), "
        "lucidrains (m2, s2) or --write-reference"
    ),
]
MetricsOption = Annotated[
    str | None,
    typer.Option(help=f"of `all`: some of {','.join(METRICS)}; all that can be had if not given"),
]
NOption = Annotated[
    int | None,
    typer.Option("--n", "-n", help=f"number of samples; {DEFAULT_N:,} if not given, or all that --samples has"),
]
ReferenceCountOption = Annotated[
    int | None,
    typer.Option("--n-reference", help="compare with so many real images, chosen at random; all if not given"),
]
SamplerOption = Annotated[str, typer.Option(help=", ".join(SAMPLERS))]
StepsOption = Annotated[
    str | None,
    typer.Option(help=f"a number of steps ({DEFAULT_STEPS} if not given), sections 10,15,20, or a stride ddim50"),
]
GuidanceOption = Annotated[
    float | None, typer.Option(help="how strongly to guide towards the labels: 1 is none, 2 to 4 is strong")
]
LabelsOption = Annotated[
    str | None,
    typer.Option(
        help=LABELS_HELP.replace(
            "every class in turn", "the classes in the proportions of the reference's labels, without these in turn"
        )
    ),
]
SeedOption = Annotated[int, typer.Option(help="seed of the noise of the samples")]
BatchSizeOption = Annotated[int, typer.Option(help="number of images to draw, and to look at, at a time")]
FeaturesOption = Annotated[
    str | None,
    path_option(
        "what turns images into features: efficientnet-lite0 (if not given), or a file: the Inception network of 2015 "
        "in either published form, or any TorchScript, which is code that is run"
    ),
]
FeatureSizeOption = Annotated[
    int | None, typer.Option(help="scale images to this side for the features; if not given as the features say")
]
OutOption = Annotated[
    Path | None,
    path_option("where the numbers go: a .json; if not given quality.json, or quality-2.json and so on"),
]
WriteReferenceOption = Annotated[
    Path | None,
    path_option("also write the statistics of the reference: an .npz, which --reference, ADM and EDM read"),
]
ReferenceFormOption = Annotated[
    str,
    typer.Option(
        help=f"what --write-reference writes: {' or '.join(FORMS)}; edm: mu and sigma; adm: the images too, which "
        "ADM's evaluator wants"
    ),
]
KeepOption = Annotated[
    str | None,
    path_option("keep the samples: an .npz (arr_0, as ADM reads it), or a folder, which the same command continues"),
]
PageOption = Annotated[
    Path | None,
    path_option(
        "also write a page of pictures, an .html that holds all of them: samples, their nearest real images, the worst "
        "and the best"
    ),
]
SweepOption = Annotated[
    list[str] | None,
    typer.Option(
        help="draw and measure in several ways, such as steps=10,25,50; repeated, every combination of the values; of "
        f"{', '.join(AXES)}; --out of an interrupted sweep continues it"
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu, ...")]
PrecisionOption = Annotated[str, typer.Option(help="fp32, bf16, fp16, or auto (bf16 where that is faster, else fp32)")]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, checked as far as that is possible without opening anything.

    Attributes:
        metrics: Some of measure.METRICS, each once.
        chooses: Whether these are asked for by name; otherwise one that cannot be had is left out.
        model: What draws the samples, or None.
        flags: Of another library's .pt file, or None.
        samples: Samples that exist, or None.
        reference: The real images or their statistics, or None.
        part: Which of the real images, one of fitting.PARTS.
        n: How many samples; None for DEFAULT_N, or all that there are.
        n_reference: How many real images; None for all.
        sampler: As for `sample`, like the next three.
        steps: See sampler; None for DEFAULT_STEPS or fewer.
        guidance: See sampler.
        seed: See sampler.
        labels: As parse_labels takes them; None for the proportions of the reference.
        batch_size: How many images are drawn, and looked at, at a time.
        features: As load_extractor takes it, or None.
        feature_size: The side that images are scaled to for it, or None.
        write_reference: Where the statistics of the reference go, or None.
        reference_form: One of statistics_file.FORMS.
        keep: Where the samples go, or None.
        device: The name of the device.
        precision: That of the network.
        selection: Which part of the reference's data set is meant, or None.

    Raises:
        InputError: For options that do not fit together, or that nothing can be done with.
    """

    metrics: Sequence[str]
    chooses: bool = True
    model: str | None = None
    flags: str | None = None
    samples: str | None = None
    reference: str | None = None
    part: str = "all"
    n: int | None = None
    n_reference: int | None = None
    sampler: str = "ddpm"
    steps: str | None = None
    guidance: float | None = None
    seed: int = 0
    labels: str | None = None
    batch_size: int = 64
    features: str | None = None
    feature_size: int | None = None
    write_reference: Path | None = None
    reference_form: str = "edm"
    keep: str | None = None
    device: str = "auto"
    precision: str = "fp32"
    selection: Selection | None = None

    def __post_init__(self) -> None:
        """Check what can be checked now."""
        if self.batch_size < 1:
            raise InputError(f"--batch-size is {self.batch_size}; expected at least 1")
        for name, value in (("--n", self.n), ("--n-reference", self.n_reference)):
            if value is not None and value < 2:
                raise InputError(f"{name} is {value}; expected at least 2")
        if self.feature_size is not None and self.feature_size < 1:
            raise InputError(f"--feature-size is {self.feature_size}; expected at least 1 pixel")
        if self.reference_form not in FORMS:
            raise InputError(f"--reference-form is {self.reference_form!r:.99}; expected {' or '.join(FORMS)}")
        if self.reference is None and (self.compares or self.write_reference is not None):
            raise InputError(
                "without --reference there is nothing to compare the samples with: give real images, such as the data "
                "that the model was trained on, or a file of their statistics (`is` alone needs none)"
            )
        if self.model is None and self.samples is None and self.write_reference is None:
            raise InputError("there are no samples: give --model, which draws them, or --samples, which exist")
        if self.model is not None and self.samples is not None and output_kind(self.samples) != "folder":
            raise InputError(
                f"--samples {self.samples} is a file, to which --model adds nothing: only a folder is completed; leave "
                "one of them out"
            )
        if self.keep is not None and (self.model is None or self.samples is not None):
            raise InputError("--keep is for samples that are drawn now: give it with --model and without --samples")
        if self.keep is not None and output_kind(self.keep) == ".png":
            raise InputError(f"--keep is {self.keep}; expected a name ending in .npz, or a folder")

    @property
    def folder(self) -> Path | None:
        """The folder that samples are drawn into, or None."""
        place = self.samples if self.keep is None else self.keep
        return Path(place) if place is not None and self.model is not None and output_kind(place) == "folder" else None

    @property
    def array(self) -> Path | None:
        """The .npz that samples which are drawn are written to, or None."""
        return Path(self.keep) if self.keep is not None and self.folder is None else None

    @property
    def compares(self) -> bool:
        """Whether something is asked for that needs real images."""
        return any(metric != "is" for metric in self.metrics)


def parse_metrics(text: str) -> tuple[str, ...]:
    """The metrics in a text such as "fid,kid", in the order of METRICS. Raises InputError for others."""
    asked = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in asked if name not in METRICS]
    if unknown or not asked:
        raise InputError(f"--metrics {text!r:.200}: expected some of {','.join(METRICS)}")
    return tuple(name for name in METRICS if name in asked)
