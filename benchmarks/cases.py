"""Which operations are measured at which sizes, and when a result may be timed: shared by test_ops.py and ratios.py."""

from __future__ import annotations

import functools
import importlib.util

import torch

from .bound import HybridLoss, VlbTerms
from .operations import Case, Copy, Normal, Operation, QSample, ReverseStep, TrainingLoss

SIZES = ((128, 3, 32, 32), (16, 3, 256, 256))
QUICK_SIZES = ((4, 3, 16, 16), (2, 3, 40, 24))

OPERATIONS: dict[str, type[Operation]] = {
    "q_sample": QSample,
    "training_loss": TrainingLoss,
    "hybrid_loss": HybridLoss,
    "vlb_terms": VlbTerms,
    "reverse_step": ReverseStep,
    "normal": Normal,
    "copy": Copy,
}


def cases(quick: bool) -> list[Case]:
    """Every case, at the sizes that are measured, or at small ones that only show that all of it runs."""
    return [
        case
        for shape in (QUICK_SIZES if quick else SIZES)
        for case in (
            Case("copy", shape),
            Case("normal", shape),
            Case("q_sample", shape),
            Case("q_sample", shape, torch.uint8),
            Case("q_sample", shape, torch.bfloat16),
            Case("q_sample", shape, channels_last=True),
            Case("training_loss", shape),
            Case("training_loss", shape, torch.uint8, channels_last=True),
            Case("hybrid_loss", shape),
            Case("hybrid_loss", shape, torch.bfloat16),
            Case("hybrid_loss", shape, torch.uint8, channels_last=True),
            Case("vlb_terms", shape),
            Case("reverse_step", shape),
            Case("reverse_step", shape, torch.bfloat16),
            Case("reverse_step", shape, channels_last=True),
        )
    ]


def labels(case: Case) -> tuple[str, ...]:
    """The variants of a case, the measured one first."""
    return OPERATIONS[case.operation].labels


class Mismatch(Exception):
    """A variant that does not give the operation's result, and so is not worth timing."""


def check(operation: Operation, label: str) -> float:
    """The variant's error. Raises Mismatch if that is beyond the operation's tolerance."""
    error = operation.error(label)
    if not error <= operation.tolerance:  # also for NaN
        raise Mismatch(
            f"{label} does not give the result of {operation.case}: its error is {error:.3g}, "
            f"expected at most {operation.tolerance:.3g}; see benchmarks/operations.py"
        )
    return error


def rates(operation: Operation, seconds: float) -> dict[str, float]:
    """What a time means: per element, per byte that has to move, and for the noise per core in use."""
    elements = operation.case.elements
    made = {
        "ns_per_element": 1e9 * seconds / elements,
        "gb_per_s": 1e-9 * elements * operation.bytes_per_element / seconds,
    }
    if operation.normals:
        made["normals_per_s_per_thread"] = elements * operation.normals / seconds / torch.get_num_threads()
    return made


def absent(case: Case, label: str, quick: bool) -> str:
    """Why a variant is not run here, or the empty string."""
    if label == "torch.compile" and quick:
        return "torch.compile takes a minute to start, and --quick is short"
    if label == "diffusers" and importlib.util.find_spec("diffusers") is None:
        return "diffusers is not installed: pip install -e '.[peers]'"
    if label == "diffusers" and case.operation == "q_sample" and case.dtype == torch.bfloat16:
        return "its add_noise rounds alphas_cumprod to bf16, which puts x_t off by 2% of its largest value"
    return ""


@functools.lru_cache(maxsize=1)  # one case's tensors at a time: variants of a case follow each other
def build(case: Case) -> Operation:
    """The inputs of a case, and its variants."""
    return OPERATIONS[case.operation](case)
