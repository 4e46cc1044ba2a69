"""The layers above the ops: what there is to compare of one case, when it may be timed, and how it becomes rows."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import networks, peers, timing
from benchmarks.machine import DTYPES
from benchmarks.rows import Row, Subject, rows
from benchmarks.runs import Options, Run
from ddpm_fast.errors import InputError
from ddpm_fast.nn.work import parameters, work

WARMUP = 1  # rounds: each run has run before, when it was compared, and takes up to half a minute
COMPILED = "diffusers torch.compile"
# diffusers' network under torch.compile, by torch's names of the modes: the last two replay it from CUDA graphs.
MODES: dict[str, str | None] = {
    COMPILED: None,
    f"{COMPILED}, reduce-overhead": "reduce-overhead",
    f"{COMPILED}, max-autotune": "max-autotune",
}
# How ours is asked to run a loop, by the kind of device.
WAYS: dict[str, dict[str, dict[str, bool]]] = {
    "cpu": {"ddpm_fast": {}},
    "cuda": {
        "graph": {"cuda_graph": True},
        "graph, compiled": {"cuda_graph": True, "compile": True},
        "no graph": {"cuda_graph": False},
    },
}


class Case(NamedTuple):
    """One layer at one size. layer: "unet forward", "unet forward+backward", "training" or "sampling". size: of
    networks.py. dtype: fp32 or bf16. steps: of a sampling chain, or the training steps that are timed at once."""

    layer: str
    size: str
    dtype: str
    batch: int
    steps: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def subject(self) -> Subject:
        name = f"{self.layer} {self.dtype}"
        if self.layer == "sampling":
            name += ", one image" if self.batch == 1 else ", a batch"
        text = f"{self.layer} {self.size} {self.dtype} {self.batch}"
        return Subject(self.layer, text, name, self.size, self.dtype, self.batch, self.steps)

    def __str__(self) -> str:
        return self.subject.text


class Comparison:
    """A case's network, and the variants of the work on it. runs: by label, each makes case.steps steps. ours: the
    labels that are measured. counts: what one step takes at least. errors: ||out - truth|| / ||truth|| of the runs
    whose results could be compared. What is absent, differs or fails is put down in the run's file."""

    def __init__(self, case: Case, run: Run):
        made = networks.network(case.size)
        self.case, self.run, self.device = case, run, run.device
        self.model, self.diffusion, self.config = made.model.to(run.device), made.diffusion, made.model.config
        self.work = work(self.config)
        side, classes = self.config.image_size, self.config.num_classes
        self.shape = (case.batch, self.config.in_channels, side, side)
        self.labels = torch.arange(case.batch, device=run.device) % classes if classes else None
        if run.options.compiling:
            torch.compiler.reset()  # after eight recompilations of one function dynamo runs it uncompiled
        self.counts: dict[str, float] = {}
        self.runs: dict[str, Callable[[], object]] = {}
        self.ours: list[str] = []
        self.errors: dict[str, float] = {}

    def absent(self, label: str, reason: str) -> None:
        self.run.absent(label, reason, self.case)

    def has(self, peer: str) -> bool:
        """Whether a peer can be used; if not, it is put down as absent."""
        if reason := peers.absent(peer):
            self.absent(peer, reason)
        return not reason

    def ways(self) -> dict[str, dict[str, bool]]:
        """How ours is asked to run a loop for this case; the ways that are left out are put down as absent."""
        found = WAYS[self.device.type]
        if self.run.options.compiling:
            return found
        for label in [label for label, options in found.items() if options.get("compile")]:
            self.absent(label, "it runs with --compile")
        return {label: options for label, options in found.items() if not options.get("compile")}

    def add_compiled(self, add: Callable[[str, Callable], None]) -> None:
        """Calls add(label, compiled) for each way in which diffusers' network is compiled for this case, and puts down
        the others as absent. compiled(function) is the compiled function."""
        for label in compiled_labels(self.device):
            if reason := uncompiled(self.case, self.device, self.run.options, label):
                self.absent(label, reason)
                continue
            try:
                add(label, lambda function, mode=MODES[label]: peers.compiled(function, mode))
            except Exception as error:  # whatever a compiler raises, the other variants are measured
                self.runs.pop(label, None)
                self.absent(label, f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")

    def note_lucidrains(self, what: str) -> None:
        """Put down that denoising-diffusion-pytorch runs a network of its own."""
        size, ours = self.case.size, 1e-6 * self.work.parameters
        with torch.device("meta"):
            theirs = 1e-6 * parameters(peers.lucidrains_network(size, self.config.in_channels))
        options = ", ".join(f"{name}={value}" for name, value in peers.lucidrains_options(size).items())
        text = f"another network, its own Unet({options}): {theirs:.1f} million parameters, where ours has {ours:.1f}"
        self.run.found["notes"].setdefault(f"{peers.LUCIDRAINS}: {text}; {what}", []).append(str(self.case))

    def compare(self, label: str, out: Tensor, truth: Tensor, tolerance: float) -> None:
        """Put down how far a run's result is off. If that is too far to be the same work, it will not be timed."""
        with self.run.surviving(str(self.case)):
            error = deviation(out, truth, tolerance, label)
            self.errors[label] = max(self.errors.get(label, 0.0), error)
            return
        self.errors[label] = math.inf

    def rows(self) -> list[Row]:
        """Times what did not fail, in turns."""
        timed = {label: run for label, run in self.runs.items() if self.errors.get(label) != math.inf}
        batches = [timing.Batch(run, self.case.steps) for run in timed.values()]
        columns = timing.interleaved(batches, self.run.options.rounds, self.device, WARMUP).T
        counts = dict.fromkeys(self.ours, self.counts)
        return rows(self.case.subject, dict(zip(timed, columns, strict=True)), counts, self.errors)


def compiled_labels(device: torch.device) -> tuple[str, ...]:
    """The ways of compiling that a device has."""
    return tuple(MODES) if device.type == "cuda" else (COMPILED,)


def uncompiled(case: Case, device: torch.device, options: Options, label: str = COMPILED) -> str:
    """Why diffusers' network is not compiled in this way for a case, or the empty string."""
    if not options.compiling:
        return "torch.compile of a network takes a minute to start, a case: it runs with --compile"
    if MODES[label] == "max-autotune" and not options.autotuning:
        return "it takes minutes to choose its kernels, a case: it runs with --max-autotune"
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
