"""Random calls of the fused ops: what fits must give the right values, what does not must be refused.

The C++ kernels are compared with the backend `reference`, in the call's own dtypes and in float64; gradients are
compared with torch's own of the formulas in formulas.py. All tensors lie between red zones (guard.py).
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ddpm_fast
from ddpm_fast import ops
from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.backends import cpu as cpu_backend
from tests.fuzz import constructors, modules, threads
from tests.fuzz.calls import MAKERS
from tests.fuzz.derivatives import check_derivatives
from tests.fuzz.guard import Guarded
from tests.fuzz.maker import Call, Maker, describe
from tests.fuzz.mutations import mutate
from tests.fuzz.supervise import Failed, Fuzzer, Notes, limit_memory

PACKAGE = str(Path(ddpm_fast.__file__).parent)
NAMES = (*MAKERS, "q_sample", "reverse_step", "reverse_step_", "group_norm")
# In fp32 these give the same bits on every backend, and the others the same but for rounding.
EXACT = (
    "normal",
    "q_sample",
    "loss_backward",
    "reverse_step",
    "reverse_step_",
    "draw_timesteps",
    "record_losses",
    "dropout",
)
# What an error may be of the largest value, besides a few times plain torch's own.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-9}
LOOSE = {"group_norm": 1e-5, "group_norm_backward": 1e-3, "hybrid_loss": 1e-4, "vlb_terms": 1e-4}
CONVOLUTIONS = ("convolve", "winograd", "winograd_filters", "winograd_weight_gradient")
LOOSE |= dict.fromkeys(CONVOLUTIONS, 3e-5)


# Too little memory, and what the dispatcher says of an argument that the schema does not allow.
_TORCHS_OWN = (
    "allocate memory",
    "overflow",
    "too large",
    "Expected a value of type",
    "expected value of type",
    "Boolean value of Tensor",
    "unsupported scalarType",
)


class Outcome:
    """What came of a call: values (with copies of what it wrote), or an error."""

    def __init__(self, call: Call, backend: str):
        self.error: BaseException | None = None
        self.values: list[Tensor] = []
        try:
            with ops.use_backend(backend):
                returned = call()
        except Exception as error:
            self.error = error
            return
        written = [call.arguments.get(name) for name in call.written]
        self.values = [v.detach().clone() for v in _tensors(returned) + _tensors(written)]

    def __str__(self) -> str:
        if self.error is not None:
            return f"{type(self.error).__name__}: {str(self.error)[:300]}"
        return ", ".join(map(describe, self.values))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [v for part in value for v in _tensors(part)] if isinstance(value, (tuple, list)) else []


def is_expected(call: Call, error: BaseException, changes: Sequence[str]) -> bool:
    """Whether an error is one that a caller should see: ours, torch's from before our code, Python's for a number that
    is none, or too little memory."""
    if isinstance(error, InputError):
        return True
    if isinstance(error, TypeError) and any("another" in change or "no bool" in change for change in changes):
        return True
    text = str(error)
    if isinstance(error, (RuntimeError, ValueError)) and any(words in text for words in _TORCHS_OWN):
        return True
    inside = any(frame.filename.startswith(PACKAGE) for frame in traceback.extract_tb(error.__traceback__))
    return not inside and call.direct and isinstance(error, (RuntimeError, TypeError, ValueError, NotImplementedError))


class Said:
    """What a case called, as text: made where it is needed, because that takes as long as the call."""

    def __init__(self, call: Call, changes: Sequence[str]):
        self._call, self._changes = call, changes

    def __str__(self) -> str:
        return f"{self._call}\n" + (f"{'; '.join(self._changes)}\n" if self._changes else "")


def run(rng: random.Random, notes: Notes) -> int:
    """One case: mostly a call of an op, sometimes of something else that takes numbers."""
    kind = rng.random()
    if kind < 0.25:
        return sum(constructors.run(rng, notes) for _ in range(8))
    if kind < 0.28:
        return modules.run(rng, notes)
    if kind < 0.29:
        return threads.run(rng, notes)
    guarded = Guarded()
    make = Maker(rng, guarded)
    good = MAKERS[rng.choice(NAMES)](make, rng.random() < 0.5)
    count = 0
    if rng.random() < 0.7:
        notes(lambda: str(good))
        count += _check(good, guarded, [], rng, notes)
    for _ in range(rng.choice((0, 4, 8, 12))):  # making the tensors takes longer than calling an op with them
        call = replace(good, arguments=dict(good.arguments))
        changes = [mutate(call, make) for _ in range(rng.choice((1, 1, 1, 2)))]
        notes(lambda call=call: str(call), f"({'; '.join(changes)})")
        count += _check(call, guarded, changes, rng, notes)
        guarded.restore()
    return count


def _check(call: Call, guarded: Guarded, changes: Sequence[str], rng: random.Random, notes: Notes) -> int:
    said = Said(call, changes)
    name = f"{'torch.ops ' if call.direct else ''}{call.op}"
    threads_wanted = rng.choice((2, 3)) if rng.random() < 0.005 else 1
    torch.set_num_threads(threads_wanted)
    written = [v for n in call.written if isinstance(v := call.arguments.get(n), Tensor)]
    versions = [v._version for v in written]
    with guarded.outputs():
        cpu = Outcome(call, "cpu" if _takes_cpu(call) else None)
    torch.set_num_threads(1)
    notes("->", lambda: str(cpu))
    if found := guarded.damage(written):
        raise Failed(f"{name}: out of bounds", f"{said}{found}; it gave {cpu}")
    if cpu.error is not None:
        if not is_expected(call, cpu.error, changes):
            what = "".join(traceback.format_exception(cpu.error)[-4:])[:1500]
            raise Failed(f"{name}: {type(cpu.error).__name__}{_where(cpu.error)}", f"{said}{what}")
        if not changes:
            raise Failed(f"{name}: refused", f"{said}{cpu}")
        return 1
    if any(v._version == before for v, before in zip(written, versions, strict=True)):
        raise Failed(f"{name}: a write that autograd does not see", f"{said}")
    guarded.restore()
    plain = Outcome(call, "reference")
    notes("reference ->", lambda: str(plain))
    if plain.error is not None:
        if isinstance(plain.error, TypeError) or "allocate memory" in str(plain.error):
            return 1  # an odd type, such as an array of no dimensions; or the reference takes more memory
        raise Failed(f"{name}: taken, but not by the reference", f"{said}cpu: {cpu}\nreference: {plain}")
    guarded.restore()
    _compare(call, name, said, cpu.values, plain.values, _is_judged(call, changes))
    count = 1 + (_check_instruction_sets(call, name, said, cpu.values, guarded) if not changes else 0)
    if changes or not call.differentiable or rng.random() < 0.5:
        return count
    return count + check_derivatives(call, name, said, rng)


def _check_instruction_sets(call: Call, name: str, said: Said, values: list[Tensor], guarded: Guarded) -> int:
    """Every instruction set gives the same bits, but for a convolution's, and a norm's where fused products lack."""
    if call.op in CONVOLUTIONS or not _takes_cpu(call):
        return 0
    best = cpu_backend.isa()
    for isa in cpu_backend.isas():
        if isa == "generic" and call.op in ("group_norm", "group_norm_backward"):
            continue
        guarded.restore()
        cpu_backend.use_isa(isa)
        again = Outcome(call, "cpu")
        cpu_backend.use_isa(best)
        if again.error is not None or not all(
            bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(values, again.values, strict=True)
        ):
            raise Failed(f"{name}: other bits on {isa}", f"{said}{again}")
    guarded.restore()
    return len(cpu_backend.isas())


def _is_judged(call: Call, changes: Sequence[str]) -> bool:
    """Whether the values mean anything: a table or statistics of random numbers give what no formula defines."""
    if call.op == "group_norm_backward" and changes:
        return False  # the statistics are those of another image
    return not any(c.startswith(("table", "statistics", "filters", "eps")) or "shared" in c for c in changes)


def _takes_cpu(call: Call) -> bool:
    """float64 is refused where the kernels are asked for by name."""
    return not any(v.dtype == torch.float64 for v in _all_tensors(call)) and torch.float64 not in [
        v for v in call.arguments.values() if isinstance(v, torch.dtype)
    ]


def _all_tensors(call: Call) -> list[Tensor]:
    return _tensors(list(call.arguments.values()))


def _where(error: BaseException) -> str:
    """The innermost of our functions that the error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)]
    return f" in {Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else ""


def _compare(call: Call, name: str, said: Said, cpu: list[Tensor], plain: list[Tensor], judged: bool) -> None:
    if len(cpu) != len(plain):
        raise Failed(f"{name}: other results", f"{said}{len(cpu)} results, the reference has {len(plain)}")
    exact: list[Tensor] | None = None
    same_bits = call.op in EXACT and not _is_learned(call)
    for i, (value, expected) in enumerate(zip(cpu, plain, strict=True)):
        if value.shape != expected.shape or value.dtype != expected.dtype or value.device != expected.device:
            what = f"result {i}: {describe(value)}, the reference's {describe(expected)}"
            raise Failed(f"{name}: another kind of result", f"{said}{what}")
        if (
            not judged
            or value.device.type == "meta"
            or bool(((value == expected) | (value.isnan() & expected.isnan())).all())
        ):
            continue
        if same_bits:
            raise Failed(f"{name}: wrong value", f"{said}result {i}: {_difference(value, expected)}")
        _check_special(call, name, said, value, expected)
        if call.wild:
            continue  # the rounding of large numbers is not judged
        exact = exact or in_float64(call)
        _check_close(call, name, said, value, expected, exact[i])


def _is_learned(call: Call) -> bool:
    output, x = call.arguments.get("output"), call.arguments.get("x_t", call.arguments.get("x"))
    return isinstance(output, Tensor) and isinstance(x, Tensor) and output.shape != x.shape


def _check_special(call: Call, name: str, said: Said, value: Tensor, expected: Tensor) -> None:
    """What is not finite in the reference is not finite here, and no more. Which of the two it is may depend on the
    order of the operations. Of the bound's results only the loss is judged, and a convolution's tiles have a rule of
    their own."""
    if not value.is_floating_point() or (call.op in ("hybrid_loss", "vlb_terms") and value.ndim > 1):
        return
    differ = value.isfinite() != expected.isfinite()
    if call.op not in CONVOLUTIONS and bool(differ.any()):
        at = tuple(differ.nonzero()[0].tolist())
        what = f"{said}at {at}: {value[at].item()!r}, expected {expected[at].item()!r}"
        raise Failed(f"{name}: finite where the reference is not, or the other way round", what)


def _difference(value: Tensor, expected: Tensor) -> str:
    differ = ~((value == expected) | (value.isnan() & expected.isnan()))
    at = tuple(differ.nonzero()[0].tolist())
    return (
        f"{int(differ.sum())} of {differ.numel()} values differ, the first at {at}: {value[at].item()!r}, "
        f"expected {expected[at].item()!r}"
    )


def _check_close(call: Call, name: str, said: Said, value: Tensor, plain: Tensor, exact: Tensor) -> None:
    if value.dtype == torch.float64 and call.op not in ("group_norm", "group_norm_backward"):
        exact = plain
    exact = exact.double()
    if exact.shape != value.shape or not exact.numel():
        return
    error = (value.double() - exact).abs()
    theirs = (plain.double() - exact).abs().nan_to_num(nan=0.0, posinf=0.0)
    scale = exact.abs().nan_to_num(nan=0.0, posinf=0.0).max().clamp_min(1.0)
    allowed = 4 * theirs.max() + max(TOLERANCE.get(value.dtype, 0.0), LOOSE.get(call.op, 0.0)) * scale
    wrong = error > allowed
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise Failed(
            f"{name}: wrong value",
            f"{said}{int(wrong.sum())} of {wrong.numel()} values are off by more than {allowed:.3g}, the first at "
            f"{at}: {value[at].item()!r}, expected {exact[at].item()!r}",
        )


def in_float64(call: Call) -> list[Tensor]:
    """The results of the call on the reference backend in float64."""

    def widen(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            if name == "table":
                value = value.float()
            return value.detach().clone() if name in ("filters", "statistics") else value.detach().double()
        if isinstance(value, torch.dtype):
            return torch.float64
        if isinstance(value, (tuple, list)) and not isinstance(value, NoiseKey):
            return type(value)(widen(name, v) for v in value)
        return value

    arguments = {name: widen(name, value) for name, value in call.arguments.items()}
    if call.op == "reverse_step_" and call.arguments["output"] is call.arguments["x"]:
        arguments["output"] = arguments["x"]
    wide = Call(call.op, call.direct, arguments, call.positional, call.written)
    return Outcome(wide, "reference").values


def prepare() -> None:
    """In the worker: one thread, and a limit to memory, so that huge sizes are refused."""
    torch.set_num_threads(1)
    limit_memory(2)


def warm() -> None:
    """Before the workers are forked: torch's shapes on meta, whose imports take seconds."""
    ops.winograd_filters(torch.empty(1, 4, 3, 3, device="meta"))


FUZZER = Fuzzer("ops", "calls", run, seconds=20, prepare=prepare, warm=warm)
