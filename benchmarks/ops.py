"""Which ops are measured at which sizes, and how they are called: `python -m benchmarks ops --out FILE.json`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import ddpm_fast as df
from benchmarks import bound, machine, operations, peers, timing
from benchmarks.operations import Case, Operation
from benchmarks.rows import CEILING, rows
from benchmarks.runs import Mismatch, Options, Run
from ddpm_fast.errors import InputError
from ddpm_fast.ops import dispatch as backend

ROUNDS, QUICK_ROUNDS = 60, 3
MAX_SETS = 512  # more would rotate through sizes at which only the launches count
SIZES = ((128, 3, 32, 32), (16, 3, 256, 256))
QUICK_SIZES = ((4, 3, 16, 16), (2, 3, 40, 24))
# CIFAR-10's training batch; 67M elements, which no cache holds; a large sampling batch; one so small that only the
# calls count. The first two are measured in every dtype, contiguous and around a network.
GPU_SIZES = ((128, 3, 32, 32), (342, 3, 256, 256))
GPU_NETWORK_SIZE, SMALL_SIZE = (512, 3, 32, 32), (4, 3, 16, 16)
# What ours is called, by the kind of device: there the package's own choice, or backends by name.
OURS = {"cpu": ("ddpm_fast",), "cuda": ("cuda", "triton")}
PLAIN = (peers.DIFFUSERS, peers.LUCIDRAINS, "torch", "torch.compile")


class Kind(NamedTuple):
    """An op. prepare: gives an Operation its variants. peers: their labels. formats: what it is measured in at each
    size. calls: the op of ddpm_fast if it has another name. ours: what is measured if it is none of ours."""

    prepare: Callable[..., None]
    peers: tuple[str, ...]
    formats: tuple[str, ...] = ("float32",)
    operation: type[Operation] = Operation
    calls: str = ""
    ours: str = ""


_NOISED = ("float32", "uint8", "uint8 network", "bfloat16", "float32 channels_last")
_STEPPED = ("float32", "bfloat16", "float32 channels_last", "float32 channels_last network")
_TRAINED = ("float32", "uint8 channels_last", "uint8 network")
_COMPOSED = ("composed", "torch.compile")
KINDS = {
    CEILING: Kind(operations.copy, ("clone",), ours="copy_"),
    "normal": Kind(operations.normal, ("torch",), operation=operations.Moments),
    "q_sample": Kind(operations.q_sample, PLAIN, _NOISED),
    "training_loss": Kind(operations.training_loss, PLAIN, _TRAINED, calls="diffusion_loss"),
    "reverse_step": Kind(operations.reverse_step, (*PLAIN, operations.SCHEDULER), _STEPPED),
    "hybrid_loss": Kind(
        bound.hybrid_loss, (*_COMPOSED, peers.LUCIDRAINS), ("bfloat16", *_TRAINED), bound.BoundOperation
    ),
    "vlb_terms": Kind(bound.vlb_terms, _COMPOSED, operation=bound.BoundOperation),
    "diffusion_loss": Kind(operations.diffusion_loss, (operations.TWIN,), ()),
}


def cases(quick: bool, device: torch.device) -> list[Case]:
    """Every case, at the sizes that are measured there, or at small ones that only show that all of it runs. First come
    the ceilings, bf16 and what is around a network, which a run that is stopped should have."""

    def every(shapes: tuple) -> list[Case]:
        return [
            Case(name, shape, getattr(torch, dtype), "channels_last" in words, "network" in words)
            for shape in shapes
            for name, kind in KINDS.items()
            for dtype, *words in map(str.split, kind.formats)
        ]

    registered = [Case("diffusion_loss", shape) for shape in (SMALL_SIZE, SIZES[0])]
    if quick or device.type == "cpu":
        made = every(QUICK_SIZES) + registered[:1] if quick else every(SIZES) + registered
    else:
        made = [case for case in every(GPU_SIZES) if case.network or not case.channels_last]
        made += [case for case in every((GPU_NETWORK_SIZE,)) if case.network] + registered
        made += [Case(name, SMALL_SIZE) for name in KINDS if name not in (CEILING, "diffusion_loss")]
    first = [case for case in made if case.network or case.dtype == torch.bfloat16 or case.operation == CEILING]
    return first + [case for case in made if case not in first]


def our_labels(case: Case, device: torch.device, backends: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What is measured. Raises InputError for a backend that there is not."""
    if unknown := [name for name in backends if name not in backend.NAMES]:
        raise InputError(f"backend {unknown[0]!r} is unknown; there are {', '.join(backend.NAMES)}")
    ours = KINDS[case.operation].ours
    return (ours,) if ours else backends or OURS[device.type]


def absent(case: Case, label: str, quick: bool, device: torch.device) -> str:
    """Why a variant is not run here, or the empty string."""
    is_step, is_bf16 = case.operation == "reverse_step", case.dtype == torch.bfloat16
    if label == "torch.compile" and quick:
        return "torch.compile takes a minute to start, and --quick is short"
    if label in peers.MODULES and (reason := peers.absent(label)):
        return reason
    if label == operations.SCHEDULER and (reason := peers.absent(peers.DIFFUSERS)):
        return reason
    if label == peers.DIFFUSERS and case.operation == "q_sample" and is_bf16:
        return "its add_noise rounds alphas_cumprod to bf16, which puts x_t off by 2% of its largest value"
    if label in (peers.DIFFUSERS, operations.SCHEDULER) and is_step and case.network:
        return "its pipelines keep the state in the network's dtype, and so have no copy to make"
    if label == peers.LUCIDRAINS and is_step and case.channels_last:
        return "its p_sample_loop keeps the state contiguous, and in the dtype that it has"
    if label == peers.LUCIDRAINS and is_step and is_bf16:
        return "its tables are float32, and so is every state after its first step"
    if label in backend.NAMES:
        try:
            with df.use_backend(label):
                dtypes = {case.dtype, torch.bfloat16 if case.network else case.dtype}
                df.ops.active_backend(KINDS[case.operation].calls or case.operation, device, *dtypes)
        except InputError as error:
            return str(error)
    return ""


@functools.lru_cache(maxsize=1)  # one case's tensors at a time: variants of a case follow each other
def build(case: Case, device: torch.device) -> Operation:
    """The inputs of a case, and its variants."""
    return replica(case, device, {})


def replica(case: Case, device: torch.device, shared: dict[str, Any]) -> Operation:
    """The same case with the same values in memory of its own; what is in `shared` is not made again."""
    kind = KINDS[case.operation]
    made = kind.operation(case, device, shared)
    kind.prepare(made)
    return made


def check(operation: Operation, label: str) -> float:
    """The variant's error. Raises Mismatch if that is beyond the operation's tolerance."""
    with operation.running(label):
        error, most = operation.error(label), operation.tolerance
    if error <= most:  # not for NaN
        return error
    what = f"{label} does not give the result of {operation.case}"
    raise Mismatch(f"{what}: its error is {error:.3g}, expected at most {most:.3g}; see benchmarks/operations.py")


class Setting(NamedTuple):
    """How the calls of a case are made. graph: replayed from a CUDA graph. sets: of tensors, used in turn."""

    graph: bool = False
    sets: int = 1

    def __str__(self) -> str:
        return ("graph" if self.graph else "calls") + (", L2 rotated" if self.sets > 1 else "")


def settings(nbytes: int, l2_bytes: int | None) -> list[Setting]:
    """The ways of calling that are measured for a call that moves so many bytes. Without a GPU, and where one call
    overflows the L2 by itself, plain calls. Below that also a graph, on one set of tensors, as a training loop has
    them, and on so many that the L2 never holds what is asked for: the last is the one to quote."""
    if l2_bytes is None or (sets := timing.rotation(nbytes, l2_bytes)) == 1:
        return [Setting()]
    return [Setting(), Setting(graph=True), *([Setting(graph=True, sets=sets)] if sets <= MAX_SETS else [])]


def batches(
    operation: Operation, names: list[str], setting: Setting, left_out: Callable[[str, str], None]
) -> dict[str, timing.Batch]:
    """What is timed of each variant; left_out(label, reason) is called for those that this setting cannot have."""
    made = {}
    several = [replica(operation.case, operation.device, operation.shared) for _ in range(setting.sets - 1)]
    make = timing.graph_batch if setting.graph else timing.batch
    for label in names:
        if setting.graph and label in (peers.DIFFUSERS, operations.SCHEDULER):
            left_out(label, "its loop counts steps on the host, which a graph would freeze: only as plain calls")
            continue
        calls = [functools.partial(each.variant(label), None) for each in (operation, *several)]
        within = functools.partial(operation.running, label)
        try:
            with within():
                made[label] = make(calls, operation.device)._replace(within=within)
        except RuntimeError as error:
            if not (setting.graph or isinstance(error, torch.OutOfMemoryError)):
                raise
            left_out(label, f"{setting}: {str(error).splitlines()[0]}")
    return made


def measure(case: Case, run: Run, counted: dict[tuple[str, str], float]) -> None:
    """Checks and times all variants of a case. counted: the instructions of one call, by case and label."""
    device, ours, errors = run.device, our_labels(case, run.device, run.options.backends), {}

    def left_out(label: str, reason: str) -> None:
        if label in ours:
            run.found["failures"].append(f"{case}: {label}: {reason}")
        else:
            run.absent(label, reason, case)

    operation = build(case, device)
    for label in (*ours, *KINDS[case.operation].peers):
        if reason := absent(case, label, run.options.quick, device):
            left_out(label, reason)
            continue
        with run.surviving(f"{case}: {label}"):
            errors[label] = check(operation, label)
    elements = case.elements
    work = {"bytes": elements * operation.bytes_per_element, "normals": elements * operation.normals}
    counts = {label: work | {"instructions": counted.get((str(case), label), 0)} for label in ours if label in errors}
    l2_bytes = run.found["machine"].get("gpu", {}).get("l2_bytes")
    for setting in settings(work["bytes"], l2_bytes):
        timed = batches(operation, list(errors), setting, left_out)
        columns = timing.interleaved(list(timed.values()), run.options.rounds, device).T
        run.add(rows(case.subject, dict(zip(timed, columns, strict=True)), counts, errors, str(setting)))


def main(options: Options, counted: dict[tuple[str, str], float]) -> None:
    """Times the fused ops and all their peers, and writes the ratios to a file. counted: see measure."""
    options = options.checked(ROUNDS, QUICK_ROUNDS)
    chosen = options.matching(cases(options.quick, options.place))
    our_labels(chosen[0], options.place, options.backends)
    run = Run(options, machine.ceilings(options.place, matrices=False))
    run.each(chosen, lambda case: measure(case, run, counted))
    run.finish()
