"""Runs of the same work that take turns: what there is to compare at the layers above the ops, when it may be timed,
and how its times become results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_fast import machine, peers, timing
from ddpm_fast.commands.common import DTYPE_NAMES
from ddpm_fast.errors import InputError

WARMUP = 1  # rounds: each run has run before, when it was compared, and takes up to half a minute
COMPILED = "diffusers torch.compile"


class Case(NamedTuple):
    """One piece of work at one size. layer: "unet forward", "unet forward+backward", "training" or "sampling". size: of
    networks.py. dtype: fp32 or bf16. steps: of a sampling chain, or the training steps that are timed at once."""

    layer: str
    size: str
    dtype: str
    batch: int
    steps: int = 1

    def __str__(self) -> str:
        return f"{self.layer} {self.size} {self.dtype} {self.batch}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return next(dtype for dtype, name in DTYPE_NAMES.items() if name == self.dtype)


@dataclasses.dataclass
class Comparison:
    """What is timed of a case.

    runs: by label, each makes case.steps steps. ours: the labels that are measured. errors: of the runs whose results
    could be compared, ||out - truth|| / ||truth||. failures: of those that are not timed for it. absent: what is not
    run, and why. notes: what differs between runs that did not do the same work. flops, bytes, normals: of one step, at
    least.
    """

    case: Case
    flops: int
    bytes: int
    normals: int = 0
    runs: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)
    ours: list[str] = dataclasses.field(default_factory=list)
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add_ours(self, label: str, run: Callable[[], object]) -> None:
        self.ours.append(label)
        self.runs[label] = run

    def has(self, peer: str) -> bool:
        """Whether a peer can be used; if not, it is put down as absent."""
        if reason := peers.absent(peer):
            self.absent[peer] = reason
        return not reason

    def compare(self, label: str, out: Tensor, truth: Tensor, tolerance: float) -> None:
        """Put down how far a run's result is off; if that is too far to be the same work, as a failure."""
        try:
            error = deviation(out, truth, tolerance, f"{self.case}, {label}")
            self.errors[label] = max(self.errors.get(label, 0.0), error)
        except InputError as error:
            self.failures[label] = str(error)

    @property
    def timed(self) -> dict[str, Callable[[], object]]:
        """The runs that did not fail."""
        return {label: run for label, run in self.runs.items() if label not in self.failures}

    def results(self, rounds: int, device: torch.device, ceilings: machine.Ceilings) -> list[dict]:
        """One for each pair of ours and a baseline, from runs that take turns; the baseline is None without any."""
        case, runs = self.case, self.timed
        ours = [label for label in self.ours if label in runs]
        batches = [timing.Batch(run, case.steps) for run in runs.values()]
        seconds = dict(zip(runs, timing.interleaved(batches, rounds, device, WARMUP).T, strict=True))
        floor = ceilings.floor(self.bytes, self.flops, case.dtype, self.normals)
        images = case.batch / (case.steps if case.layer == "sampling" else 1)
        said = {
            label: {
                "median_s": float(np.median(times)),
                "min_s": float(times.min()),
                "images_per_s": images / float(np.median(times)),
            }
            for label, times in seconds.items()
        }
        for label in ours:
            said[label]["flops_per_s"] = self.flops / said[label]["median_s"]
            said[label]["mfu"] = said[label]["flops_per_s"] / ceilings.flops_per_s[case.dtype]
        row = {
            **{"what": case.layer, "network": case.size, "dtype": case.dtype, "batch": case.batch},
            **{"steps": case.steps, "errors": self.errors, "notes": self.notes},
            **{"flops": self.flops, "bytes": self.bytes, "normals": self.normals},
            **{"floor_s": floor.seconds, "floor_is": floor.bound_by},
        }
        baselines = [label for label in runs if label not in ours]
        return [
            {
                **row,
                **{"measured": mine, "baseline": other, **_ratio(seconds[mine], seconds.get(other))},
                "floor_share": floor.seconds / said[mine]["median_s"],
                **{label: said[label] for label in (mine, other) if label},
            }
            for mine in ours
            for other in baselines or [None]
        ]


def _ratio(measured: np.ndarray, baseline: np.ndarray | None) -> dict:
    """timing.ratio, or nothing to say where there is no baseline."""
    return {"speedup": None, "speedup_95": None} if baseline is None else timing.ratio(baseline, measured)


def uncompiled(case: Case, device: torch.device, wanted: bool) -> str:
    """Why diffusers' network is not compiled for a case, or the empty string. wanted: whether it was asked for."""
    if not wanted:
        return "torch.compile of a network takes a minute to start, a case: it runs with --compile"
    backward = case.layer in ("unet forward+backward", "training")
    if case.dtype == "bf16" and backward and device.type == "cpu" and torch.__version__ < (2, 14):
        return (
            "under bf16 autocast on a CPU its gradients are wrong before torch 2.14: of the digits' network the first "
            "convolution's was off by 36%, eager's by less than 5%"
        )
    return ""


def deviation(out: Tensor, truth: Tensor, tolerance: float, what: str) -> float:
    """||out - truth|| / ||truth||. Raises InputError if that is more than the tolerance."""
    out, truth = out.double(), truth.double()
    error = float(torch.linalg.vector_norm(out - truth) / torch.linalg.vector_norm(truth))
    if not error <= tolerance:
        raise InputError(f"{what} is off by {error:.3g}; expected at most {tolerance:g} of what it is compared with")
    return error
