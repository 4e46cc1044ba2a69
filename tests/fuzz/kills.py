"""Training and sampling that are killed at a random moment, and continued.

The commands run in processes that are forked from one that has imported everything, so that a run of some steps takes
less than a second. What a run leaves when it is killed must be readable; continued, it must end with the very weights
(or pictures) of a run that nobody killed.

Some kills come after a random time, others from inside: at the n-th time that the run opens, renames or removes a file,
which repeats exactly, or while a thread waits for a slow disk and the training goes on.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from torch import Tensor

from ddpm_fast.commands import train as train_command
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from tests.fuzz.processes import GRACE, Ended, Kill, Process, running
from tests.fuzz.supervise import Failed, Fuzzer, Notes, folder

STEPS, SAVE_EVERY, KEPT = 6, 2, 2
N, BATCH = 6, 2  # pictures to draw
PARTS = "-parts"  # how the name of a folder of array files ends

# --- what nobody kills


@dataclass(frozen=True)
class Usual:
    """An undisturbed run: how long it takes, how many events and waits for the disk it has, and what it leaves."""

    seconds: float
    events: int
    syncs: int
    tensors: dict[str, Tensor]
    model: dict[str, Tensor]


def _train_arguments(place: Path, run: Path) -> list[str]:
    options = {
        "data": str(place / "data.npz"),
        "out": str(run),
        "model-channels": "16",
        "channel-mult": "1,2",
        "num-res-blocks": "1",
        "batch-size": "4",
        "steps": str(STEPS),
        "timesteps": "10",
        "log-every": "1",
        "sample-every": "0",
        "save-every": str(SAVE_EVERY),
        "warmup": "1",
        "device": "cpu",
        "precision": "fp32",
    }
    return [f"--{name}={value}" for name, value in options.items()]


def _data(place: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    np.savez(place / "data.npz", images=images, labels=np.arange(12) % 3)


@functools.cache
def usual() -> Usual:
    """The run that nobody kills, once."""
    place = folder() / "usual"
    place.mkdir(exist_ok=True)
    _data(place)
    for _ in range(2):  # the first one warms up
        shutil.rmtree(place / "run", ignore_errors=True)
        ended = Process("train", _train_arguments(place, place / "run"), place / "log").wait()
    if ended.code:
        raise RuntimeError(f"the undisturbed run fails: {ended.output}")
    state = checkpoint.latest_checkpoint(place / "run")
    assert state is not None
    tensors, _ = checkpoint.read_training(state)
    model, _ = checkpoint.read_model(place / "run" / "model.safetensors")
    return Usual(ended.seconds, ended.events, ended.syncs, tensors, model)


def _sample_arguments(out: Path) -> list[str]:
    model = folder() / "usual" / "run" / "model.safetensors"
    options = {"model": model, "n": N, "batch-size": BATCH, "steps": 3, "out": out, "device": "cpu"}
    if out.name.endswith(PARTS):
        options["format"] = "npz"
    return [f"--{name}={value}" for name, value in options.items()]


@dataclass(frozen=True)
class Drawn:
    """Undisturbed sampling."""

    seconds: float
    events: int
    files: dict[str, bytes]


@functools.cache
def drawn(suffix: str) -> Drawn:
    usual()
    place = folder() / "usual"
    out = place / f"samples{suffix}"
    ended = Process("sample", _sample_arguments(out), place / "log").wait()
    if ended.code:
        raise RuntimeError(f"undisturbed sampling fails: {ended.output}")
    return Drawn(ended.seconds, ended.events, _files(out))


def _files(out: Path) -> dict[str, bytes]:
    paths = [out] if out.is_file() else sorted(out.glob("*.[pn][np][gz]")) if out.is_dir() else []
    return {"" if path == out else path.name: path.read_bytes() for path in paths}


# --- a case


def run(rng: random.Random, notes: Notes) -> int:
    """A run that is killed some times."""
    place = folder() / "case"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        if rng.random() < 0.2:
            return _sampling(rng, notes, place)
        return _training(rng, notes, place)
    finally:
        for process in list(running):
            process.end()


def _training(rng: random.Random, notes: Notes, place: Path) -> int:
    _data(place)
    out, log = place / "run", place / "log"
    kills, done = rng.choice((1, 2, 2, 3, 4)), []
    damaged: list[tuple[Path, int]] = []
    for _ in range(kills):
        arguments = _next_arguments(rng, place, out)
        kill = Kill.random(rng, usual().events, usual().syncs)
        both = rng.random() < 0.1
        done.append(f"{'two at once, ' * both}{kill}{', resumed' * (len(arguments) < 5)}")
        notes(done[-1])
        other = Process("train", arguments, place / "other") if both else None
        process = Process("train", arguments, log, kill)
        process.kill(kill, usual().seconds)
        ended = process.wait(90.0 if kill.inside else GRACE)
        _check_end(ended, kill, both, done)
        if other is not None:
            _check_other(other.wait(), done)
        _check_folder(out, damaged, done)
        if rng.random() < 0.15:
            damaged += _damage(rng, out, done, notes)
    ended = Process("train", _next_arguments(rng, place, out), log).wait()
    notes(lambda: ended.output)
    _check_finished(out, ended, done)
    return kills


def _can_auto_resume() -> bool:
    return any(option.name == "auto_resume" for option in typer.main.get_command(train_command.app).params)


def _next_arguments(rng: random.Random, place: Path, out: Path) -> list[str]:
    """The command that starts the run, or continues it."""
    if _can_auto_resume() and rng.random() < 0.5:
        return [*_train_arguments(place, out), "--auto-resume"]
    if checkpoint.latest_checkpoint(out) is None:
        return _train_arguments(place, out)
    return [f"--out={out}", "--resume"]


def _said(done: list[str], output: str = "") -> str:
    return "; ".join(done) + ("\n" + output[-1500:] if output else "")


def _check_end(ended: Ended, kill: Kill, both: bool, done: list[str]) -> None:
    """What a signal makes of the process."""
    if ended.code in (-kill.signal, 128 + kill.signal, 0) or (ended.code == 2 and both):
        return
    if kill.signal == signal.SIGINT and ended.code == 1 and "Traceback" not in ended.output:
        return  # typer's Abort, before anything was begun
    kind = "a traceback" if "Traceback" in ended.output else f"exit status {ended.code}"
    raise Failed(f"train: {kind} after {kill.signal.name}", _said(done, ended.output))


def _check_other(ended: Ended, done: list[str]) -> None:
    """The other of two at once runs, or is refused."""
    if "Traceback" in ended.output or ended.code not in (0, 2):
        raise Failed(f"train: two at once end with {ended.code}", _said(done, ended.output))


def _check_folder(out: Path, damaged: list[tuple[Path, int]], done: list[str]) -> None:
    """Every state is readable, but for those that were damaged on purpose, and little else is left."""
    for path in out.glob("step-*.safetensors"):
        if (path, path.stat().st_size) in damaged:
            continue
        try:
            checkpoint.read_training(path)
        except InputError as error:
            raise Failed("train: an unreadable state is left", f"{_said(done)}\n{error}") from error
    if (out / "model.safetensors").exists():
        try:
            checkpoint.load_model(out / "model.safetensors")
        except InputError as error:
            raise Failed("train: an unreadable model is left", f"{_said(done)}\n{error}") from error
    left = _leftovers(out)
    if len(left) > 2 * len(done):
        raise Failed("train: leftovers pile up", f"{_said(done)}\n{left}")


def _leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in out.glob(".*") if p.name.endswith(".tmp")) if out.is_dir() else []


def _damage(rng: random.Random, out: Path, done: list[str], notes: Notes) -> list[tuple[Path, int]]:
    """What a power cut does to the newest state where there is an older one. Returns its path and size."""
    states = sorted(out.glob("step-*.safetensors"))
    if len(states) < 2:
        return []
    data = states[-1].read_bytes()
    states[-1].write_bytes(data[: rng.choice((0, 7, 100, len(data) // 2, len(data) - 1))])
    done.append("the newest state was cut off")
    notes(done[-1])
    return [(states[-1], states[-1].stat().st_size)]


def _check_finished(out: Path, ended: Ended, done: list[str]) -> None:
    """The weights are those of the undisturbed run, and the folder is tidy."""
    what = _said(done, ended.output)
    if ended.code:
        raise Failed(f"train: continuing ends with {ended.code}", what)
    state = checkpoint.latest_checkpoint(out)
    if state is None or state.name != f"step-{STEPS:08d}.safetensors":
        raise Failed("train: the last state is missing", f"{what}\n{state}")
    _check_same("the last state", usual().tensors, lambda: checkpoint.read_training(state)[0], what)
    model = out / "model.safetensors"
    if not model.exists():
        raise Failed("train: the run is finished and has no model", what)
    _check_same("the model", usual().model, lambda: checkpoint.read_model(model)[0], what)
    if left := _leftovers(out):
        raise Failed("train: leftovers remain after the end", f"{what}\n{left}")
    if len(states := list(out.glob("step-*.safetensors"))) > KEPT:
        raise Failed("train: more states remain than are kept", f"{what}\n{states}")


def _check_same(name: str, expected: dict[str, Tensor], read: Callable[[], dict[str, Tensor]], what: str) -> None:
    found = read()
    differ = [n for n in expected.keys() | found.keys() if n not in found or not torch.equal(found[n], expected.get(n))]
    if differ:
        raise Failed(f"train: {name} is not that of an undisturbed run", f"{what}\n{len(differ)} differ: {differ[:4]}")


def _sampling(rng: random.Random, notes: Notes, place: Path) -> int:
    """Sampling into a folder or a file, by one command that is killed and given again."""
    suffix = rng.choice(("", "", PARTS, PARTS, ".png", ".npz"))
    wanted = drawn(suffix)
    out, log = place / f"samples{suffix}", place / "log"
    kills, done = rng.choice((1, 2, 3)), []
    for _ in range(kills):
        kill = Kill.random(rng, wanted.events)
        done.append(f"sample to {suffix or 'a folder'}, {kill}")
        notes(done[-1])
        process = Process("sample", _sample_arguments(out), log, kill)
        process.kill(kill, wanted.seconds)
        ended = process.wait(90.0 if kill.inside else GRACE)
        if "Traceback" in ended.output and kill.signal != signal.SIGINT:
            raise Failed(f"sample: a traceback after {kill.signal.name}", _said(done, ended.output))
        for name, content in _files(out).items():
            if wanted.files.get(name) != content:
                raise Failed("sample: another picture is left", f"{_said(done)}\n{name}")
    ended = Process("sample", _sample_arguments(out), log).wait()
    if ended.code:
        raise Failed(f"sample: the same command again ends with {ended.code}", _said(done, ended.output))
    if _files(out) != wanted.files:
        raise Failed("sample: the pictures are not those of an undisturbed command", _said(done, ended.output))
    if left := _leftovers(out if out.is_dir() else place):
        raise Failed("sample: leftovers remain after the end", f"{_said(done)}\n{left}")
    return kills


@functools.cache
def warm() -> None:
    """What every run would load anew: the first optimizer imports torch's compiler, which takes seconds."""
    torch.set_num_threads(1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.sum().backward()
    torch.optim.AdamW([parameter], fused=True).step()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        train_command.app(["--out=nothing", "--steps=0"])  # is refused once its options have been read


def prepare() -> None:
    """In the worker: the undisturbed runs."""
    usual()
    for suffix in ("", PARTS, ".png", ".npz"):
        drawn(suffix)


FUZZER = Fuzzer("kills", "kills", run, seconds=300, warm=warm, prepare=prepare)
