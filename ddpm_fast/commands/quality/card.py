"""`python -m ddpm_fast.evaluate card`: all that can be said of a model's samples, on one page."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from ddpm_fast.commands.common import FlagsOption, console, path_option, plain_errors, say_written
from ddpm_fast.commands.common import ModelOption as RequiredModelOption
from ddpm_fast.commands.drawing import unused_path
from ddpm_fast.commands.fitting import load_fitting
from ddpm_fast.commands.labels import check_null_class
from ddpm_fast.commands.likelihood import evaluate_images, finished_part, merge
from ddpm_fast.commands.likelihood import report_of as likelihood_report
from ddpm_fast.commands.quality.copies import Copies
from ddpm_fast.commands.quality.counting import count
from ddpm_fast.commands.quality.opening import open_session
from ddpm_fast.commands.quality.page import Gallery, add_numbers, check_page, show
from ddpm_fast.commands.quality.quantities import FRECHET
from ddpm_fast.commands.quality.reference import Reference
from ddpm_fast.commands.quality.report import print_report, report_of
from ddpm_fast.commands.quality.running import running
from ddpm_fast.commands.quality.samples import StoredImages, some_of
from ddpm_fast.commands.quality.session import Outcome, Session
from ddpm_fast.commands.quality.settings import (
    BatchSizeOption,
    DeviceOption,
    FeatureSizeOption,
    FeaturesOption,
    GuidanceOption,
    LabelsOption,
    NOption,
    PrecisionOption,
    ReferenceCountOption,
    Request,
    SamplerOption,
    SeedOption,
    StepsOption,
)
from ddpm_fast.commands.quality.sweep_report import add_sweep, read_sweep
from ddpm_fast.commands.ranks import ranks_of_environment
from ddpm_fast.commands.report import check_report_path, write_report
from ddpm_fast.commands.together import in_all
from ddpm_fast.data import ImageSet, split_as_recorded
from ddpm_fast.errors import InputError
from ddpm_fast.files.checkpoint import DEFAULT_MODEL
from ddpm_fast.formats.facts import facts
from ddpm_fast.loops.distributed import of_each_process
from ddpm_fast.loops.likelihood import LikelihoodOptions
from ddpm_fast.metrics import Statistics, density_coverage, frechet_distance, precision_recall
from ddpm_fast.metrics.jackknife import jackknife
from ddpm_fast.metrics.measure import METRICS
from ddpm_fast.pictures.figures import draw_bound
from ddpm_fast.pictures.page import HtmlPage

KIND = "card"  # what the JSON says that it is
LIKELIHOOD_IMAGES = 200
_LIKELIHOOD_STEPS = 50


def card(
    reference: Annotated[
        str, path_option("the images that the model was trained on, whatever --data of training takes")
    ],
    model: RequiredModelOption = DEFAULT_MODEL,
    flags: FlagsOption = None,
    held_out: Annotated[
        str | None,
        path_option(
            "images of the same kind that the model was not trained on; if not given, those that its training held out "
            "of --reference, if it did"
        ),
    ] = None,
    n: NOption = None,
    n_reference: ReferenceCountOption = None,
    n_likelihood: Annotated[
        int, typer.Option(help="number of held-out images whose bits/dim are estimated; 0 for none")
    ] = LIKELIHOOD_IMAGES,
    sampler: SamplerOption = "ddpm",
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    labels: LabelsOption = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 64,
    features: FeaturesOption = None,
    feature_size: FeatureSizeOption = None,
    sweep: Annotated[
        Path | None, path_option("also show a sweep: the .json that `evaluate fid --sweep ... --out` has written")
    ] = None,
    out: Annotated[
        Path | None,
        path_option("the page: an .html, beside which a .json has the numbers; if not given card.html, or card-2.html"),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
) -> None:
    """All of it on one page: the model, samples, metrics with error bars, copies, held-out bits/dim, a sweep.

    It is an HTML file that holds its pictures, and beside it the numbers as JSON.
    """
    with plain_errors():
        ranks = ranks_of_environment()
        request = Request(
            metrics=METRICS,
            chooses=False,
            model=model,
            flags=flags,
            reference=reference,
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
            device=device,
            precision=precision,
        )
        if n_likelihood < 0 or n_likelihood == 1:
            raise InputError(f"--n-likelihood is {n_likelihood}; expected at least 2 images, or 0 for none")
        out = unused_path(Path("card.html")) if out is None else out
        numbers = out.with_suffix(".json")
        if ranks.is_first:
            check_page(out)
            check_report_path(numbers)
        found = None if sweep is None else read_sweep(sweep)
        session = open_session(request, ranks)
        show(session)
        images, why = _held_out(session, held_out)
        if n_likelihood and images is not None and images.labels is None:
            assert session.loaded is not None
            check_null_class(session.loaded, f"--held-out: {images.name} has no labels, so the null class is used")
        made = Card(session, images, why, found)
        with running(session, lambda: "nothing was written"):
            outcome = made.measure(n_likelihood)
        if outcome is not None:
            report = made.report(outcome)
            made.page(outcome, report).save(out)
            write_report(numbers, report)
            print_report(report)
            say_written(out, numbers)


def _held_out(session: Session, source: str | None) -> tuple[ImageSet | None, str]:
    """The images that the model was not trained on, numbered as its classes are, or None and why there are none.

    Those that the training held out are taken out of the reference.

    Raises:
        InputError: If they are the training set, or do not fit the model.
    """
    loaded, reference, request = session.loaded, session.reference, session.request
    assert loaded is not None and reference is not None
    if source is not None:
        dataset = load_fitting(source, loaded)
        if reference.images is not None and dataset.digest == reference.images.dataset.digest:
            raise InputError("--held-out are the images of --reference: give images that the model was not trained on")
        return dataset, ""
    recorded = (loaded.config.get("training") or {}).get("held_out")
    if recorded is None or not reference.training_set:
        return None, "no held-out images were given, and none are known of the training"
    training, dataset = split_as_recorded(load_fitting(str(request.reference), loaded), recorded)
    chosen = some_of(len(training), request.n_reference, "--n-reference", training.name)
    name = f"{training.name} without the {len(dataset)} held-out images"
    session.reference = replace(reference, name=name, images=StoredImages(training, chosen))
    console.print(f"The {len(dataset)} images that the training held out are the yardstick.")
    return dataset, ""


@dataclass
class Card:
    """What is put on a card.

    Attributes:
        session: What draws and measures.
        held_out: Images that the model was not trained on, or None.
        why: Why there are none.
        sweep: A sweep's report, or None.
        copies: What the test for copies found, or None; like what follows, in the first rank.
        likelihood: What `evaluate nll` would report of held-out images, or None.
        errors: The standard errors of quantities that have none of their own, by their names.
    """

    session: Session
    held_out: ImageSet | None
    why: str
    sweep: dict[str, Any] | None = None
    copies: Copies | None = field(default=None, init=False)
    likelihood: dict[str, Any] | None = field(default=None, init=False)
    errors: dict[str, float] = field(default_factory=dict, init=False)

    def measure(self, n_likelihood: int) -> Outcome | None:
        """Do all work, by all ranks together. Returns what was found, in the first rank; None in the others."""
        session = self.session
        outcome = session.measured(session.samples())
        held_out = self._features_of_held_out()
        self._measure_likelihood(n_likelihood)
        if outcome is None:
            return None
        fake, real = outcome.fake.features, None if outcome.real is None else outcome.real.features
        if fake is not None and real is not None:
            console.print("computing standard errors ...") if console.is_terminal else None
            self.errors = _errors(fake, real)
            if held_out is not None:
                self.copies = Copies.of(fake, real, held_out)
        return outcome

    def _features_of_held_out(self) -> Tensor | None:
        """Those of the held-out images, in the first rank, if there are any."""
        if self.held_out is None:
            return None
        session = self.session
        reference = Reference(self.held_out.name, StoredImages(self.held_out))
        assert reference.images is not None
        batches = reference.images.batches(
            "features of held-out images", session.check, session.ranks, session.request.batch_size
        )
        counted = count(batches, session.extractor, frozenset({"features"}), reference.name)
        return None if counted is None else counted.features.features

    def _measure_likelihood(self, n: int) -> None:
        """Estimate the bits/dim of the first n held-out images."""
        session, dataset = self.session, self.held_out
        loaded = session.loaded
        if dataset is None or loaded is None or not n or len(dataset) < 2:
            return
        n = min(n, len(dataset))
        steps = min(_LIKELIHOOD_STEPS, loaded.diffusion.num_timesteps)
        options = LikelihoodOptions(steps=steps, seed=session.request.seed)

        def own() -> dict:
            size = session.request.batch_size
            parts = evaluate_images(loaded, dataset, n, size, options, session.check, session.ranks)
            session.check()  # which is what ended it early
            return parts

        gathered = of_each_process(in_all(own))
        parts = finished_part({first: part for batches in gathered for first, part in batches.items()})
        self.likelihood = likelihood_report(
            merge(parts), model=loaded.name, data=dataset.name, decoder=options.decoder, seed=options.seed
        )

    def report(self, outcome: Outcome) -> dict[str, Any]:
        """All numbers, in JSON's types."""
        loaded = self.session.loaded
        assert loaded is not None
        return {
            "kind": KIND,
            "model": facts(loaded),
            **report_of(self.session, outcome),
            "errors": self.errors,
            "memorisation": None if self.copies is None else self.copies.report(),
            "likelihood": self.likelihood,
            "sweep": self.sweep,
        }

    def page(self, outcome: Outcome, report: dict[str, Any]) -> HtmlPage:
        """The page."""
        loaded = self.session.loaded
        assert loaded is not None
        page = HtmlPage(f"Model card of {loaded.name}")
        page.facts({**facts(loaded), "File": f"SHA-256 {loaded.digest}"})
        add_numbers(page, report, self.errors)
        if self.errors:
            page.text(
                "± is a standard error, of the choice of the samples; of IS it is the spread of the splits.", note=True
            )
        page.section("Samples")
        gallery = Gallery.of(self.session, outcome)
        gallery.add_to(page)
        if self.copies is not None:
            self.copies.add_to(page)
        else:
            page.section("Copies of training images")
            page.text(f"Not tested: {self.why}.", note=True)
        if self.likelihood is not None:
            _add_likelihood(page, self.likelihood)
        if self.sweep is not None:
            add_sweep(page, self.sweep)
        return page


def _errors(fake: Tensor, real: Tensor) -> dict[str, float]:
    """Standard errors of the quantities that come without one, by their names in quantities.QUANTITIES."""
    known = Statistics.of(real)
    covariance = known.covariance

    def measure(chosen: Tensor) -> dict[str, float]:
        part = fake[chosen]
        own = Statistics.of(part)
        found = {FRECHET: frechet_distance(own.mean, own.covariance, known.mean, covariance)}
        return found | precision_recall(real, part)._asdict() | density_coverage(real, part)._asdict()

    return jackknife(measure, len(fake))


def _add_likelihood(page: HtmlPage, report: dict[str, Any]) -> None:
    page.section("Likelihood of held-out images")
    estimate = f", estimated from {report['steps']} terms of the bound" if report["estimate"] else ""
    page.text(
        f"{report['total_bits_per_dim']:.4f} ± {report['total_stderr']:.4f} bits/dim on {report['images']} images of "
        f"{report['data']}{estimate}. Less is better; it is an upper bound on the negative log-likelihood."
    )
    page.figure(draw_bound(report), "The terms of the bound over the timesteps")
