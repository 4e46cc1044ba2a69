"""python -m tests.fuzz.faults ops|files|kills: puts faults into the package and says whether the fuzzer finds them.

A program of its own, because a fuzzer forks, and a process in which OpenMP has run must not.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import ctypes
import dataclasses
import io
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ddpm_fast.files import tensorfile
from ddpm_fast.loops.training import Trainer
from ddpm_fast.ops.backends import cpu
from tests.fuzz import files, kills, ops, states
from tests.fuzz.supervise import run


def _kernel(name: str, after: Callable[..., None]) -> Any:
    """The kernel with something done afterwards, given its arguments."""
    original = cpu.OPS[name]

    def run_kernel(*arguments: Any) -> None:
        original(*arguments)
        after(*arguments)

    return mock.patch.dict(cpu.OPS, {name: run_kernel})


def _beyond(x0: torch.Tensor, *rest: Any) -> None:
    """Writes the byte behind the result."""
    out = rest[-1]
    if out.is_contiguous() and out.numel():
        ctypes.memset(out.data_ptr() + out.numel() * out.element_size(), 0, 1)


def _into_input(x0: torch.Tensor, *rest: Any) -> None:
    x0.add_(1)


@contextlib.contextmanager
def _written_in_place(target: Path, durable: bool = True) -> Iterator[Path]:
    """Not atomic: a file that is half written is at its place for a while."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"half")
    for _ in range(300):
        os.listdir(target.parent)
    yield target


def _perturbed(self: Trainer, path: Path) -> None:
    """Continues from something else than what was saved."""
    _load(self, path)
    with torch.no_grad():
        next(self.model.parameters()).add_(1e-3)


def _other_value(*arguments: Any) -> Any:
    return tuple(
        {name: value + 1 for name, value in part.items()}
        if isinstance(part, dict) and all(isinstance(value, torch.Tensor) for value in part.values())
        else part
        for part in _read(*arguments)
    )


def _raising(*arguments: Any) -> Any:
    raise KeyError("unet")


def _greedy(*arguments: Any) -> Any:
    torch.ones(50 << 20)
    return _read(*arguments)


def _starting(*arguments: Any) -> Any:
    os.system("true")
    return _read(*arguments)


_read, _load = tensorfile.read, Trainer.load


def _reading(function: Callable[..., Any]) -> list[Any]:
    return [mock.patch.object(tensorfile, "read", function), mock.patch.object(files, "KINDS", (states.model,))]


def _of_op(name: str, kernel: str, after: Callable[..., None]) -> list[Any]:
    return [_kernel(kernel, after), mock.patch.object(ops, "NAMES", (name,))]


# By fuzzer, its faults: what makes one, and what the fuzzer must call it.
FAULTS: dict[str, dict[str, tuple[list[Any], str]]] = {
    "ops": {
        "a wrong value": (_of_op("q_sample", "q_sample", lambda *a: a[-1].mul_(1.001)), "q_sample: wrong value"),
        "a byte out of bounds": (_of_op("q_sample", "q_sample", _beyond), "q_sample: out of bounds"),
        "an input that is written to": (_of_op("q_sample", "q_sample", _into_input), "q_sample: out of bounds"),
        "a crash": (_of_op("q_sample", "q_sample", lambda *_: os.kill(os.getpid(), signal.SIGSEGV)), "crash: SIGSEGV"),
        "a hang": (_of_op("q_sample", "q_sample", lambda *_: time.sleep(9)), "no end after 2 s"),
        "an error of Python's": (_of_op("q_sample", "q_sample", lambda *_: {}["x"]), "q_sample: KeyError"),
        "a wrong gradient": (
            _of_op("diffusion_loss", "loss_backward", lambda stored, scale, grad: grad.mul_(1.1)),
            "diffusion_loss: wrong gradient",
        ),
    },
    "files": {
        "an error of Python's": (_reading(_raising), "model: KeyError"),
        "another value": (_reading(_other_value), "model: another value was loaded"),
        "too much memory": (_reading(_greedy), "model: .* MB were not enough"),
        "a program": (_reading(_starting), "model: started os.system"),
    },
    "kills": {
        "a save that is not atomic": (
            [mock.patch.object(tensorfile, "atomic_path", _written_in_place)],
            "unreadable|ends with 2",
        ),
        "a resumed run that differs": (
            [mock.patch.object(Trainer, "load", _perturbed)],
            "is not that of an undisturbed run",
        ),
    },
}
FUZZERS = {"ops": ops.FUZZER, "files": files.FUZZER, "kills": kills.FUZZER}
CASES = {"ops": 40, "files": 40, "kills": 6}
COSTLY = {"a crash": 4, "a hang": 3, "a wrong gradient": 200}  # cases


def find(name: str, fault: str, patches: list[Any], kind: str) -> str:
    """Run the fuzzer with the fault. Returns why it did not find it, or the empty string."""
    fuzzer, said = FUZZERS[name], io.StringIO()
    if fault == "a hang":
        fuzzer = dataclasses.replace(fuzzer, seconds=2.0)
    fuzzer.warm()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        with contextlib.redirect_stdout(said):
            report = run(fuzzer, seed=3, minutes=2, cases=COSTLY.get(fault, CASES[name]))
    if not any(re.search(kind, found) for found in report.kinds):
        return f"not found, but {dict(report.kinds) or 'nothing'}"
    if not re.search(rf"reproduce: python -m tests.fuzz {name} --seed 3 --case \d+", said.getvalue()):
        return f"found without a reproduction: {said.getvalue()}"
    return ""


if __name__ == "__main__":
    chosen = sys.argv[1]
    wrong = {name: why for name, fault in FAULTS[chosen].items() if (why := find(chosen, name, *fault))}
    for name in FAULTS[chosen]:
        print(f"{name}: {wrong.get(name, 'found')}")
    sys.exit(1 if wrong else 0)
