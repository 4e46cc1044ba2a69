"""Which operations are measured at which sizes and where, and when a result may be timed."""

from __future__ import annotations

import functools

import torch
from ddpm_fast.bound import HybridLoss, VlbTerms
from ddpm_fast.operations import Case, Copy, Normal, Operation, QSample, ReverseStep, TrainingLoss

import ddpm_fast as df
from ddpm_fast import peers
from ddpm_fast.errors import InputError
from ddpm_fast.ops import dispatch as backend

SIZES = ((128, 3, 32, 32), (16, 3, 256, 256))
QUICK_SIZES = ((4, 3, 16, 16), (2, 3, 40, 24))
# CIFAR-10's training batch; 67M elements, which no cache holds; a large sampling batch; one so small that only the
# calls count. The first two are measured in every dtype, contiguous and around a network.
GPU_SIZES = ((128, 3, 32, 32), (342, 3, 256, 256))
GPU_NETWORK_SIZE, GPU_SMALL_SIZE = (512, 3, 32, 32), (4, 3, 16, 16)

# What ours is called, by the kind of device: there the package's own choice, or backends by name.
OURS = {"cpu": ("ddpm_fast",), "cuda": ("cuda", "triton")}

OPERATIONS: dict[str, type[Operation]] = {
    "q_sample": QSample,
    "training_loss": TrainingLoss,
    "hybrid_loss": HybridLoss,
    "vlb_terms": VlbTerms,
    "reverse_step": ReverseStep,
    "normal": Normal,
    "copy": Copy,
}
# The ops of ddpm_fast that an operation calls under another name than its own.
_OPS = {"training_loss": "diffusion_loss"}


def cases(quick: bool, device: torch.device | str = "cpu") -> list[Case]:
    """Every case, at the sizes that are measured there, or at small ones that only show that all of it runs."""
    on_gpu = torch.device(device).type == "cuda"
    if quick or not on_gpu:
        return [case for shape in (QUICK_SIZES if quick else SIZES) for case in _all_formats(shape)]
    every = [case for shape in GPU_SIZES for case in _all_formats(shape)]
    chosen = [case for case in every if case.network or not case.channels_last]
    chosen += [case for case in _all_formats(GPU_NETWORK_SIZE) if case.network]
    return chosen + [Case(name, GPU_SMALL_SIZE) for name in OPERATIONS if name != "copy"]


def _all_formats(shape: tuple[int, ...]) -> list[Case]:
    return [
        Case("copy", shape),
        Case("normal", shape),
        Case("q_sample", shape),
        Case("q_sample", shape, torch.uint8),
        Case("q_sample", shape, torch.uint8, network=True),
        Case("q_sample", shape, torch.bfloat16),
        Case("q_sample", shape, channels_last=True),
        Case("training_loss", shape),
        Case("training_loss", shape, torch.uint8, channels_last=True),
        Case("training_loss", shape, torch.uint8, network=True),
        Case("reverse_step", shape),
        Case("reverse_step", shape, torch.bfloat16),
        Case("reverse_step", shape, channels_last=True),
        Case("reverse_step", shape, channels_last=True, network=True),
        Case("hybrid_loss", shape),
        Case("hybrid_loss", shape, torch.bfloat16),
        Case("hybrid_loss", shape, torch.uint8, channels_last=True),
        Case("hybrid_loss", shape, torch.uint8, network=True),
        Case("vlb_terms", shape),
    ]


def matching(only: str, quick: bool, device: torch.device) -> list[Case]:
    """The cases whose name holds `only`. Raises InputError if none does."""
    every = cases(quick, device)
    chosen = [case for case in every if only in str(case)]
    if not chosen:
        names = "\n  ".join(map(str, every))
        raise InputError(f"no case's name holds {only!r}; there are\n  {names}")
    return chosen


def labels(case: Case, ours: tuple[str, ...] = OURS["cpu"]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The variants of a case: (what is measured, what it is measured against)."""
    return OPERATIONS[case.operation].labels(ours)


def our_backends(names: list[str], device: torch.device) -> tuple[str, ...]:
    """What ours is called, from a command's --backend. Raises InputError for a backend that there is not."""
    for name in names:
        if name not in backend.NAMES:
            raise InputError(f"backend {name!r} is unknown; there are {', '.join(backend.NAMES)}")
    return tuple(names) or OURS[device.type]


class Mismatch(Exception):
    """A variant that does not give the operation's result, and so is not worth timing."""


def check(operation: Operation, label: str) -> float:
    """The variant's error. Raises Mismatch if that is beyond the operation's tolerance."""
    with operation.running(label):
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
    if operation.normals and operation.device.type == "cpu":
        made["normals_per_s_per_thread"] = elements * operation.normals / seconds / torch.get_num_threads()
    return made


def absent(case: Case, label: str, quick: bool, device: torch.device | str = "cpu") -> str:
    """Why a variant is not run here, or the empty string."""
    if label == "torch.compile" and quick:
        return "torch.compile takes a minute to start, and --quick is short"
    if label in peers.MODULES and (reason := peers.absent(label)):
        return reason
    if label == "diffusers" and case.operation == "q_sample" and case.dtype == torch.bfloat16:
        return "its add_noise rounds alphas_cumprod to bf16, which puts x_t off by 2% of its largest value"
    if label == "diffusers" and case.operation == "reverse_step" and case.network:
        return "its pipelines keep the state in the network's dtype, and so have no copy to make"
    if label == peers.LUCIDRAINS and case.operation == "reverse_step":
        if case.channels_last:
            return "its p_sample_loop keeps the state contiguous, and in the dtype that it has"
        if case.dtype == torch.bfloat16:
            return "its tables are float32, and so is every state after its first step"
    if label in OURS["cuda"] or label in backend.NAMES:
        try:
            with df.use_backend(label):
                dtypes = {case.dtype, torch.bfloat16 if case.network else case.dtype}
                df.ops.active_backend(_OPS.get(case.operation, case.operation), device, *dtypes)
        except InputError as error:
            return str(error)
    return ""


@functools.lru_cache(maxsize=1)  # one case's tensors at a time: variants of a case follow each other
def build(case: Case, device: torch.device) -> Operation:
    """The inputs of a case, and its variants."""
    return OPERATIONS[case.operation](case, device)
