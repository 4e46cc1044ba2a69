"""Damaged and hostile files: models, training states, pictures, arrays, archives and folders.

Each is loaded as a user would. It must be refused with an InputError, or be skipped with a warning, or load right; in
seconds, within a bound of memory, and without starting a program or running what it holds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import socket
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import typer

import ddpm_fast as df
from ddpm_fast.commands.common import plain_errors
from ddpm_fast.data.load import Dataset, load_dataset, read_picture
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint, tensorfile
from tests.fuzz import damage, material
from tests.fuzz.supervise import Failed, Fuzzer, Notes, folder, limit_memory, memory

SECONDS = 30.0  # what hangs never ends; a busy machine may take some
MEGABYTES = 150  # that loading a small file may take; a picture may have the pixels that Pillow allows
PICTURE_MEGABYTES = 1500
_started: list[str] = []  # the programs that were started, and the classes that were unpickled


def run(rng: random.Random, notes: Notes) -> int:
    """One file."""
    place = folder() / "case"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    kind = rng.choice(KINDS)
    how, load, check, most = kind(rng, place)
    notes(f"{kind.__name__.strip('_')}: {how}")
    name = kind.__name__.strip("_")
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


# --- models and training states

Case = tuple[str, Callable[[], Any], Callable[[Any], str], float]


class State(NamedTuple):
    """A file that may be damaged, what was done to it, and what it holds if it is readable."""

    data: bytes
    how: str
    tensors: dict[str, torch.Tensor]
    payload: Any  # None: not compared


def _state_file(rng: random.Random, form: str, good: bytes, held: tuple[dict, dict]) -> State:
    tensors, payload = held
    kind = rng.randrange(10)
    if kind < 1:
        return State(good, "nothing", tensors, payload)
    if kind < 3:
        data, how = damage.bytes_of(good, rng)
        return State(data, how, tensors, payload)
    if kind < 4:
        metadata = {"format": form, "version": "1", "config" if form == tensorfile.MODEL else "meta": "{}"}
        return State(damage.safetensors(tensors, metadata, rng), "the header was edited", tensors, payload)
    if kind < 6:
        changed, how = damage.weights(tensors, rng)
        return State(damage.signed(form, changed, json.dumps(payload), rng), how, changed, payload)
    text, how = damage.config_text(payload, rng)
    version = "1" if rng.random() < 0.95 else rng.choice(("0", "2", "-1", "", "9" * 30, "1.0"))
    return State(damage.signed(form, tensors, text, rng, version), how, tensors, None)


def _model(rng: random.Random, place: Path) -> Case:
    state = _state_file(rng, tensorfile.MODEL, material.states().model, material.model_state())
    path = _write(rng, place, state.data, "model.safetensors")

    def check(loaded: df.LoadedModel) -> str:
        found = loaded.model.state_dict()
        if any(not t.isfinite().all() or not t.is_floating_point() for t in found.values()):
            return "weights that are not finite were loaded"
        if any(not torch.equal(found[n].float(), t.float()) for n, t in state.tensors.items() if n in found):
            return "another value was loaded"
        names = loaded.label_names
        if names is not None and (
            not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(names) != 2
        ):
            return "label_names that are none were loaded"
        made = loaded.model.config
        shape = (1, made.in_channels, made.image_size, made.image_size)
        with torch.inference_mode():
            label = torch.zeros(1).long() if made.num_classes else None
            x = loaded.model(torch.zeros(shape), torch.zeros(1).long(), label)
        return "" if x.shape == (1, made.out_channels, *shape[2:]) else "another network was loaded"

    return state.how, lambda: df.load_model(path), check, MEGABYTES


def _training(rng: random.Random, place: Path) -> Case:
    state = _state_file(rng, tensorfile.TRAINING, material.states().training, material.training_state())
    path = _write(rng, place, state.data, "step-00000001.safetensors")
    if rng.random() < 0.5:

        def check(loaded: tuple[dict, dict]) -> str:
            same = loaded[0].keys() == state.tensors.keys() and all(
                loaded[0][n].dtype == t.dtype and bool(((loaded[0][n] == t) | (t != t)).all())
                for n, t in state.tensors.items()
            )
            return "" if same and state.payload in (None, loaded[1]) else "another value was loaded"

        return f"read_training, {state.how}", lambda: checkpoint.read_training(path), check, MEGABYTES
    made = material.trainer()

    def look(_: object) -> str:
        bad = [n for n, p in made.model.named_parameters() if p.dtype != torch.float32]
        if bad or type(made.step) is not int or made.step < 0:
            return "a state that is none was loaded"
        pairs = [(p, state.tensors[f"model.{n}"]) for n, p in made.model.named_parameters()]
        same = all(bool(((a == b) | (b != b)).all()) for a, b in pairs)
        return "" if same else "another value was loaded"

    return f"Trainer.load, {state.how}", lambda: made.load(path), look, MEGABYTES


def _write(rng: random.Random, place: Path, data: bytes, name: str) -> Path:
    path = place / (name if rng.random() < 0.9 else rng.choice(("\x1b[31mx", "a b", "x\ny", "é", "-x")) + name)
    if rng.random() < 0.02:
        _special(rng, path)
    else:
        path.write_bytes(data)
    return path


def _special(rng: random.Random, path: Path) -> None:
    """What is no regular file."""
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to("/dev/zero")
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        path.symlink_to(path.parent / "nothing")
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))


# --- pictures


def _one_picture(rng: random.Random) -> tuple[bytes, str, str, bool]:
    """A file, a suffix, what was done, and whether it is a good picture."""
    good = material.pictures()
    if rng.random() < 0.15:
        name = rng.choice(sorted(material.FOREIGN))
        return material.FOREIGN[name], rng.choice(("png", "jpg", "eps", "gif", "tif", "bmp")), name, False
    name = rng.choice(sorted(good))
    data, suffix, how = good[name], name.rpartition(".")[2], name
    is_good = rng.random() < 0.15
    if not is_good:
        data, what = damage.bytes_of(data, rng)
        how = f"{name}, {what}"
        if rng.random() < 0.15 and suffix == "png":
            size = rng.choice((60000, 2**31 - 1, 100000))
            data = _huge_png(good["png"], size)
            how = f"png that says it has {size}x{size} pixels"
    if rng.random() < 0.1:
        suffix = rng.choice(("png", "jpg", "PNG", "gif", "webp", "tif"))
        how += f", named .{suffix}"
    return data, suffix, how, is_good


def _huge_png(data: bytes, size: int) -> bytes:
    import struct
    import zlib

    head = data[12:16] + struct.pack(">II", size, size) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


def _picture(rng: random.Random, place: Path) -> Case:
    data, suffix, how, good = _one_picture(rng)
    size = rng.choice((None, None, 8))
    if rng.random() < 0.6:
        path = _write(rng, place, data, f"a.{suffix}")

        def check(loaded: torch.Tensor) -> str:
            wrong = loaded.ndim != 3 or loaded.shape[0] not in (1, 3) or loaded.dtype != torch.uint8
            return "no picture was loaded" if wrong or (good and loaded.shape[1:] not in _SIZES) else ""

        return f"read_picture, {how}", lambda: read_picture(path, "--init-image", size), check, PICTURE_MEGABYTES
    (place / f"a.{suffix}").write_bytes(data)
    (place / "good.png").write_bytes(material.pictures()["png"])
    strict, channels = rng.random() < 0.2, rng.choice((None, 1, 3))
    return (
        f"in a folder, strict={strict}, {how}",
        lambda: load_dataset(place, 8, channels, strict=strict),
        lambda loaded: _check_dataset(loaded, 1, 2),
        PICTURE_MEGABYTES,
    )


_SIZES = ((10, 12), (12, 10), (8, 8))


def _check_dataset(loaded: Dataset, least: int, most: int) -> str:
    images, labels, names = loaded.images, loaded.labels, loaded.label_names
    if images.dtype != torch.uint8 or images.ndim != 4 or not images.is_contiguous():
        return f"the images are {images.dtype} {list(images.shape)}"
    if not least <= len(images) <= most:
        return f"{len(images)} images were loaded"
    if labels is not None:
        if labels.shape != (len(images),) or labels.dtype != torch.int64 or int(labels.min()) < 0:
            return "the labels are none"
        if names is None and (loaded.num_classes or 0) > 10**6:
            return f"{loaded.num_classes} classes"
        if names is not None and int(labels.max()) >= len(names):
            return "a label has no name"
    return ""


# --- arrays


def _array(rng: random.Random, place: Path) -> Case:
    good = dict(material.arrays())
    kind = rng.randrange(8)
    suffix = "npz"
    if kind == 0:
        data, how = damage.bytes_of(material.npz(good, rng.random() < 0.5), rng)
    elif kind == 1:
        data, how = damage.bytes_of(material.npy(good["images"]), rng)
        suffix = "npy"
    elif kind == 2:
        data, how = damage.npy_header(good["images"], rng)
        suffix = "npy"
    elif kind == 3:
        header, how = damage.npy_header(good["images"], rng)
        name = rng.choice(("images.npy", "labels.npy", "label_names.npy"))
        members = [(f"{n}.npy", material.npy(a)) for n, a in good.items() if f"{n}.npy" != name]
        data, how = material.archive([*members, (name, header)]), f"{name}: {how}"
    elif kind == 4:
        head = material.npy(np.zeros((1, 1, 1), np.uint8))[:128].replace(b"(1, 1, 1)", b"(4,10000,10000)")
        data, how = material.bomb("images.npy", 300, head), "300 MB of zeros"
    else:
        name, value, how = _strange_array(rng)
        data, how = material.npz({**good, name: value}, True), f"{name} is {how}"
    path = _write(rng, place, data, f"a.{suffix}")
    size, channels = rng.choice((None, None, 4, 8)), rng.choice((None, None, 1, 3, 2))
    classes = rng.random() < 0.3
    return (
        f"{how}; image_size={size}, channels={channels}",
        lambda: load_dataset(path, size, channels, classes=classes),
        lambda loaded: _check_dataset(loaded, 1, 1000),
        MEGABYTES,
    )


class _Program:
    """Starts a program when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def _strange_array(rng: random.Random) -> tuple[str, np.ndarray, str]:
    name = rng.choice(("images", "images", "labels", "labels", "label_names"))
    images = material.arrays()["images"]
    choices = {
        "images": (
            images.astype(np.float32),
            images.astype(np.int64),
            images.astype(np.float16),
            images[:0],
            images[:, :0],
            images[..., :2],
            images[..., 0],
            images.transpose(0, 3, 1, 2),
            images.ravel(),
            np.array([_Program()], dtype=object),
            np.zeros((6, 1, 1, 200), np.uint8),
            np.zeros((6, 5, 5, 3), dtype="V1"),
            np.zeros((6, 5, 5), dtype="M8[s]"),
            np.array(5, np.uint8),
            np.zeros((1,) * 32, np.uint8),
            images.astype(">u2"),
            images > 3,
        ),
        "labels": (
            np.array([0, 1, 2, 0, 1, 2 * 10**8]),
            np.array([0, 1, 2, 0, 1, 2**62]),
            np.array([0, 1, 2, 0, 1, 2**64 - 1], np.uint64),
            np.array([0, -1, 2, 0, 1, 2]),
            np.array([0.0] * 6),
            np.array(["cat"] * 6),
            np.array([[0]] * 6),
            np.array([0]),
            np.array([], np.int64),
            np.array([None] * 6),
            np.array([_Program()] * 6),
            np.array([True] * 6),
            np.array([0, 1, 2, 0, 1, 2], ">i2"),
            np.array(3),
        ),
        "label_names": (
            np.array(["a"]),
            np.array(["\x1b[31mred", "b", "c"]),
            np.array(["same", "same", "same"]),
            np.array(["", "", ""]),
            np.array([b"a", b"b", b"c"]),
            np.array([1, 2, 3]),
            np.array([["a", "b", "c"]]),
            np.array([_Program()] * 3),
            np.array(["x" * 100000, "b", "c"]),
            np.array("cat"),
        ),
    }
    value = rng.choice(choices[name])
    return name, value, f"{value.dtype} {list(value.shape)}"


# --- archives and folders


def _archive(rng: random.Random, place: Path) -> Case:
    good = material.pictures()
    members = [(f"cat/{i}.png", good["png"]) for i in range(2)] + [("dog/0.png", good["png"])]
    kind = rng.randrange(8)
    how = f"kind {kind}"
    if kind == 0:
        data, how = damage.bytes_of(material.archive(members), rng)
    elif kind == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data, how = material.archive([*members, members[0]]), "two members of one name"
    elif kind == 2:
        data, how = material.bomb("0.png", 300, good["png"]), "a member of 300 MB"
    elif kind == 3:
        name = rng.choice(_NAMES)
        data, how = material.archive([*members, (name, good["png"])]), f"a member called {name!r:.50}"
    elif kind == 4:
        inner, suffix, how, _ = _one_picture(rng)
        data, how = material.archive([*members, (f"dog/1.{suffix}", inner)]), f"a member is {how}"
    elif kind == 5:
        method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        data, how = damage.bytes_of(material.archive(members, method), rng)
    elif kind == 6:
        data, how = material.archive([]), "empty"
    else:
        made = bytearray(material.archive(members))
        at = made.rfind(b"PK\x01\x02", 0, made.rfind(b"PK\x01\x02"))
        offset = rng.choice((8, 10, 16, 20, 24, 28, 42))  # flags, method, CRC, sizes, name, place
        made[at + offset : at + offset + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x01\0\0\0"))
        data, how = bytes(made), f"its directory was edited at {offset}"
    path = _write(rng, place, data, "a.zip")
    classes = rng.random() < 0.5
    return (
        f"{how}; classes={classes}",
        lambda: load_dataset(path, rng.choice((None, 8)), classes=classes),
        lambda loaded: _check_dataset(loaded, 1, 4),
        MEGABYTES,
    )


_NAMES = (
    "../../evil.png",
    "/tmp/evil.png",
    "dog\\1.png",
    "dog/\x1b[31m.png",
    "dog/a\nb.png",
    "dog/.png",
    "dog//1.png",
    "dog/" + "x" * 255 + ".png",
    "C:/a.png",
    "dog/1.png/2.png",
    "top.png",
    "dog/\u202egnp.png",
    "__MACOSX/dog/1.png",
    "dog/1.PNG",
)
_FILE_NAMES = (
    "\x1b[31mred.png",
    "a\nb.png",
    "-rf.png",
    "[red]x.png",
    "é.png",
    "\udcff.png",
    "x" * 250 + ".png",
    " .png",
    "a.PNG",
    "b.png.txt",
    "c",
    "%s.png",
    "'$(x)'.png",
)


def _folder(rng: random.Random, place: Path) -> Case:
    """Good pictures beside whatever else a folder may hold."""
    good = material.pictures()["png"]
    classes = rng.random() < 0.5
    count, done = 0, []
    for name in ("1", "10", "2") if classes else ("",):
        (place / name).mkdir(exist_ok=True)
        (place / name / "good.png").write_bytes(good)
        count += 1
    most = count
    for i in range(rng.choice((1, 2, 3))):
        parent = place / rng.choice(("1", "new")) if classes else place
        parent.mkdir(exist_ok=True)
        kind = rng.randrange(5)
        if kind == 0:
            _special(rng, parent / f"special{i}.png")
            done.append("no regular file")
        elif kind == 1:
            name = rng.choice(_FILE_NAMES)
            (parent / name).write_bytes(good)
            done.append(f"a file called {name!r:.40}")
            most += 1
        elif kind == 2:
            name = rng.choice(("\x1b[31m", "a\nb", "\udcff", "-", ".hidden", "__MACOSX", "[b]"))
            (parent / name).mkdir(exist_ok=True)
            (parent / name / "x.png").write_bytes(good)
            done.append(f"a folder called {name!r}")
            most += 1
        elif kind == 3:
            (parent / f"loop{i}").symlink_to(rng.choice((place, place.parent, parent)), target_is_directory=True)
            done.append("a loop")
            most += 10000
        else:
            data, suffix, how, _ = _one_picture(rng)
            (parent / f"bad{i}.{suffix}").write_bytes(data)
            done.append(how)
            most += 1
    strict = rng.random() < 0.2
    return (
        f"{'; '.join(done)}; classes={classes}, strict={strict}",
        lambda: load_dataset(place, 8, classes=classes, strict=strict),
        lambda loaded: _check_dataset(loaded, count, most),
        PICTURE_MEGABYTES,
    )


KINDS = (_model, _model, _training, _picture, _picture, _array, _archive, _folder)
FUZZER = Fuzzer("files", "files", run, seconds=SECONDS, warm=material.make_all, prepare=prepare)
