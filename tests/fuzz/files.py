"""Damaged and hostile files: models, ours and others', training states, pictures, arrays, archives, shards, sets,
features, statistics and options.

Each is loaded as a user would. It must be refused with an InputError, or be skipped with a warning, or load right; in
seconds, within a bound of memory, and without starting a program or running what it holds.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer

from ddpm_fast.commands.common import plain_errors
from ddpm_fast.errors import InputError
from tests.fuzz import checkpoints, datasets, foreign, measured, settings, specimens, states, stored
from tests.fuzz.supervise import Failed, Fuzzer, Notes, folder, limit_memory, memory

SECONDS = 30.0  # what hangs never ends; a busy machine may take some
_started: list[str] = []  # the programs that were started, and the classes that were unpickled


def run(rng: random.Random, notes: Notes) -> int:
    """One file."""
    place = folder() / "case"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    kind = rng.choice(KINDS)
    how, load, check, most = kind(rng, place)
    notes(f"{kind.__name__}: {how}")
    name = kind.__name__
    _started.clear()
    before = _reset_peak()
    try:
        with _quiet(notes), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = load()
    except InputError as error:
        loaded = error
        notes(f"InputError: {error!s:.500}")
    except Exception as error:
        what = "".join(traceback.format_exception(error)[-3:])
        raise Failed(f"{name}: {type(error).__name__}{_place_of(error)}", f"{how}\n{what[-1500:]}") from error
    else:
        notes(lambda: f"loaded; warnings: {[str(w.message)[:200] for w in caught]}")
    took = (memory("VmHWM") - before) / 1024
    if _started:
        raise Failed(f"{name}: started {_started[0].split()[0]}", f"{how}\n{_started}")
    if took > most:
        raise Failed(f"{name}: {most} MB were not enough", f"{how}\nit took {took:.0f} MB; {loaded!s:.300}")
    if isinstance(loaded, InputError):
        _check_message(name, how, loaded)
    elif wrong := check(loaded):
        raise Failed(f"{name}: {wrong}", how)
    return 1


@contextlib.contextmanager
def _quiet(notes: Notes) -> Iterator[None]:
    """Inside, decoders in C do not write their complaints to the terminal."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        if not notes.aloud:
            os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _place_of(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}ddpm_fast{os.sep}" in f.filename]
    return f" in {Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else ""


def _check_message(name: str, how: str, error: InputError) -> None:
    """What a command prints of the error has no control characters."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(typer.Exit), plain_errors():
        raise error
    odd = [c for c in said.getvalue() if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2066"]
    if odd:
        raise Failed(f"{name}: control characters reach the terminal", f"{how}\n{said.getvalue()!r:.500}")


# --- memory and programs


def _reset_peak() -> int:
    """Forget the peak of memory. Returns what is in use, in kB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
        _started.append(f"{event} {arguments[:2]!r:.200}")
    elif event == "pickle.find_class":
        _started.append(f"{event} {arguments!r:.200}")


def prepare() -> None:
    """In the worker: a limit to memory, and a watch over what is started."""
    torch.set_num_threads(1)
    programs = folder() / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("gs", "gswin64c", "djpeg", "xv", "display", "convert"):
        (programs / name).write_text("#!/bin/sh\nexit 0\n")
        (programs / name).chmod(0o755)
    os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    limit_memory(4)
    sys.addaudithook(_watch)


KINDS = (
    states.model,
    states.model,
    states.training,
    datasets.picture,
    datasets.picture,
    datasets.array,
    datasets.archive,
    datasets.folder,
    stored.shards,
    stored.prepared,
    foreign.diffusers,
    checkpoints.checkpoint,
    measured.measured,
    settings.options,
)
FUZZER = Fuzzer("files", "files", run, seconds=SECONDS, warm=specimens.make_all, prepare=prepare)
