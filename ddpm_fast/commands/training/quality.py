"""What a training run measures of its averaged weights now and then: how its samples compare with the images that it is
trained on, and the loss on images that it is not.

The samples have the same noise and classes each time, so that two evaluations differ by the weights alone. All
processes draw a part of them. Whatever goes wrong is a warning, and the training goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.commands.common import in_words
from ddpm_fast.commands.quality.classes import in_proportion
from ddpm_fast.commands.quality.counting import probe
from ddpm_fast.commands.quality.samples import check_images
from ddpm_fast.commands.stopping import Stopped
from ddpm_fast.commands.training.averaged import Averaged, own_share
from ddpm_fast.commands.training.best_model import BEST_NAME, BestModel, add_line
from ddpm_fast.commands.training.log import duration, say, warn
from ddpm_fast.commands.training.reference import LEAST, Reference
from ddpm_fast.data import ImageSet
from ddpm_fast.errors import InputError
from ddpm_fast.loops.distributed import of_each_process, of_first_process, rank, to_first_process, world_size
from ddpm_fast.loops.held_out import EVALUATIONS, evaluate_losses, mean_loss
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.loops.sampling import prepare
from ddpm_fast.loops.training import Trainer
from ddpm_fast.metrics import Statistics, memorisation
from ddpm_fast.metrics.feature_set import FeatureSet
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.features.load import load_extractor
from ddpm_fast.metrics.measure import measure
from ddpm_fast.pictures.images import to_uint8

_BATCH = 64  # images that are drawn, or looked at, at a time
# Shows the progress of some work of so many images: update(done).
Working = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass
class _Part:
    """What one process has found: features and losses, on the CPU, in parts."""

    reference: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)


class Quality:
    """The evaluations of one run. Where several processes train together, each has one."""

    def __init__(
        self,
        trainer: Trainer,
        averaged: Averaged,
        held_out: ImageSet | None,
        arguments: dict[str, Any],
        extractor: Extractor | None,
    ):
        """Nothing is drawn yet.

        Args:
            trainer: What is trained.
            averaged: What is drawn from.
            held_out: Images that are not trained on, or None.
            arguments: The command's.
            extractor: What computes features; None: no samples are drawn.
        """
        self._trainer, self._averaged, self._held_out, self._extractor = trainer, averaged, held_out, extractor
        self._folder, self._n = Path(arguments["out"]), arguments["evaluate_n"] if extractor is not None else 0
        self._options = SamplingOptions(
            sampler=arguments["evaluate_sampler"],
            steps=min(arguments["evaluate_steps"], trainer.diffusion.num_timesteps),
            seed=trainer.config.seed,
            batch_size=_BATCH,
            cuda_graph=False if trainer.cuda_graph is False else None,
        )
        self._labels = _classes(trainer, self._n)
        self._reference = None
        if extractor is not None:
            self._reference = Reference(self._folder, trainer.dataset, held_out, extractor)
        settings: dict[str, Any] = {"held_out": None if held_out is None else len(held_out)}
        if self._reference is not None:
            settings = {"sampler": self._options.sampler, "steps": self._options.steps, "n": self._n}
            settings |= {"reference": self._reference.said}
        self._best = BestModel(self._folder, settings, warn)

    @classmethod
    def of(
        cls, trainer: Trainer, averaged: Averaged, held_out: ImageSet | None, arguments: dict[str, Any]
    ) -> Quality | None:
        """What the command's options ask for; None for no evaluations.

        Raises:
            InputError: If the features cannot be had, or the images are too few or none that features are of.
        """
        if not arguments["evaluate_every"]:
            return None
        if not arguments["evaluate_n"]:
            if held_out is None:
                raise InputError(
                    "--evaluate-n is 0 and no images are held out, so there is nothing to evaluate: give --held-out "
                    "0.05, or an --evaluate-n"
                )
            return cls(trainer, averaged, held_out, arguments, None)
        check_images(trainer.dataset, "--evaluate-every (--evaluate-n 0 draws nothing)")
        if len(trainer.dataset) < LEAST:
            raise InputError(
                f"--evaluate-every compares with at least {LEAST} images, and there are {len(trainer.dataset)}: give "
                "--evaluate-n 0 (with --held-out), which draws nothing"
            )
        extractor = load_extractor(arguments["features"], trainer.device)
        probe(extractor, trainer.dataset.shape)
        return cls(trainer, averaged, held_out, arguments, extractor)

    def evaluate(self, check: Callable[[], object], working: Working) -> dict[str, Any] | None:
        """Measure, note and say it, and keep the model if it is the best so far. All processes call this.

        Args:
            check: Called before each sampling step. If it raises Stopped, in any process, there is no evaluation.
            working: Shows the progress.

        Returns:
            What was measured, in JSON's types, in the first process; None in the others, and if there is nothing.
        """
        started, step = time.monotonic(), self._trainer.step
        parts = self._find(check, working)
        if parts is None:
            return None
        try:
            record = {"step": step, **self._measured(parts), "seconds": round(time.monotonic() - started, 1)}
            check()
        except Stopped:
            return None
        except Exception as error:
            self._failed(_told(error))
            return None
        self._keep(record)
        told = f"; the best so far, kept as {BEST_NAME}" if record["best"] else ""
        say(f"step {step}: {_in_words(record)}{told}")
        return record

    def _find(self, check: Callable[[], object], working: Working) -> list[_Part] | None:
        """What each process has found, in the first one; None in the others, and if something has stopped one.

        After each batch the processes tell each other how they fare, so that all stop if one does.
        """
        reference = self._reference
        is_known = reference is None or reference.known is not None or (rank() == 0 and reference.read())
        known = bool(of_first_process(is_known))
        sizes = [0 if known or reference is None else len(reference), self._n]
        rounds = sum(math.ceil(math.ceil(size / world_size()) / _BATCH) for size in sizes)
        rounds += 2 * (self._held_out is not None)  # the losses; and a batch that is cut where those images begin
        part = _Part()
        with working("evaluating", rounds) as update:
            work = self._work(part, not known, check)
            for number in range(rounds):
                outcomes = of_each_process(_advance(work))
                if any(outcome is None for outcome in outcomes):
                    return None
                if problem := next((outcome for outcome in outcomes if outcome), ""):
                    self._failed(problem)
                    return None
                update(number + 1)
        return to_first_process(part)

    def _work(self, part: _Part, needs_reference: bool, check: Callable[[], object]) -> Iterator[None]:
        """Fill this process's part, batch by batch."""
        if self._reference is not None and needs_reference:
            for features in self._reference.compute(own_share(len(self._reference)), _BATCH, check):
                part.reference.append(features)
                yield
        trainer, model = self._trainer, self._averaged.network()
        if self._held_out is not None:
            share = own_share(EVALUATIONS)
            part.losses.append(
                evaluate_losses(
                    model, trainer.diffusion, self._held_out, share, trainer.config.seed, batch_size=_BATCH, check=check
                )
            )
            yield
        share = own_share(self._n)
        if self._extractor is None or share.start == share.stop:
            return
        labels = None if self._labels is None else self._labels[share]
        options = replace(self._options, first_sample_id=share.start, labels=labels)
        prepared = prepare(Network.of(model), trainer.diffusion, share.stop - share.start, options)
        for _, x in prepared.batches(check):
            images = torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2)
            part.samples.append(self._extractor.compute(images)[0].float().cpu())
            yield

    def _measured(self, parts: list[_Part]) -> dict[str, Any]:
        """The numbers, from what all processes have found."""
        reference, samples, losses = (
            [tensor for part in parts for tensor in getattr(part, name)] for name in ("reference", "samples", "losses")
        )
        found: dict[str, Any] = {}
        if self._reference is not None and self._extractor is not None:
            if reference:
                self._reference.set(torch.cat(reference))
                self._try_writing(self._reference.write)
            found = self._compared(torch.cat(samples), self._extractor, self._reference)
        if losses:
            loss, quarters = mean_loss(torch.cat(losses), self._trainer.diffusion.num_timesteps)
            if not math.isfinite(loss):
                raise InputError(f"the held-out loss is {loss}")
            found["held_out"] = {"loss": loss, "quarters": [_json(quarter) for quarter in quarters]}
        return found

    def _compared(self, samples: Tensor, extractor: Extractor, reference: Reference) -> dict[str, Any]:
        """How the samples' features compare with the reference's."""
        real = reference.known
        assert real is not None and real.features is not None
        fake = FeatureSet(extractor.kind, "samples", Statistics.of(samples), samples)
        found = measure(fake, real, ("fid", "kid"))
        # Balls around as many real images as there are samples [Kynkaanniemi et al. 2019, sec. 3.1], spread evenly.
        places = torch.linspace(0, real.n - 1, min(real.n, len(samples))).round().long()
        some = real.features[places]
        found["pr"] = measure(fake, FeatureSet(real.kind, real.source, Statistics.of(some), some), ("pr",))["pr"]
        if reference.held_out is not None:
            copied = memorisation(samples, real.features, reference.held_out)
            found["memorisation"] = {"nearer": copied.nearer, "z": copied.z, "copies": copied.copies}
        return {**found, "sampler": self._options.sampler, "steps": self._options.steps}

    def _keep(self, record: dict[str, Any]) -> None:
        """Write the model if it is the best so far, note whether it is, and write a line."""
        value = record["kid"]["value"] if "kid" in record else record["held_out"]["loss"]
        record["best"] = bool(self._try_writing(lambda: self._best.offer(self._trainer, dict(record), value)))
        self._try_writing(lambda: add_line(self._folder, record))

    def _failed(self, problem: str) -> None:
        """Say so, and free what it needs."""
        self._averaged.drop()
        warn(f"the evaluation of step {self._trainer.step} failed, and the training goes on: {problem:.500}")

    def _try_writing(self, write: Callable[[], bool | None]) -> bool | None:
        try:
            return write()
        except (InputError, OSError) as error:
            warn(f"what was measured at step {self._trainer.step} could not be kept, and the training goes on: {error}")
            return None


def _advance(work: Iterator[None]) -> str | None:
    """Do the next part of some work. Returns what went wrong; None if a signal stopped it."""
    try:
        next(work, None)
    except Stopped:
        return None
    except Exception as error:  # of a network of the user's it may be any
        return _told(error)
    return ""


def _told(error: Exception) -> str:
    """What went wrong, in words."""
    return in_words(error) or f"{type(error).__name__}: {error}"


def _classes(trainer: Trainer, n: int) -> Tensor | None:
    """The class of each sample, in the proportions of the images; None without classes."""
    classes, labels = trainer.model.config.num_classes, trainer.dataset.labels
    if not classes or labels is None:
        return None
    return in_proportion(torch.bincount(labels, minlength=classes).tolist(), n)


def _json(number: float) -> float | None:
    """A number as JSON has it: it has no NaN."""
    return number if math.isfinite(number) else None


def _in_words(record: dict[str, Any]) -> str:
    """An evaluation on one line."""
    told = []
    if "kid" in record:
        kid, pr = record["kid"], record["pr"]
        told += [f"kernel distance x 1000 {1000 * kid['value']:.3g} +- {1000 * kid['error']:.2g}"]
        told += [f"Frechet distance {record['fid']['value']:.4g}"]
        told += [f"precision {pr['precision']:.2f}", f"recall {pr['recall']:.2f}"]
    if "memorisation" in record:
        told += [f"copies {record['memorisation']['copies']:.1%}"]
    if "held_out" in record:
        told += [f"held-out loss {record['held_out']['loss']:.4f}"]
    return f"{', '.join(told)} (in {duration(record['seconds'])})"
