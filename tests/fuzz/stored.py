"""Tar shards and prepared folders, damaged or hostile."""

from __future__ import annotations

import functools
import io
import json
import random
import tarfile
import tempfile
from pathlib import Path

from ddpm_fast.commands import preparing
from ddpm_fast.data import StoredDataset, open_dataset
from ddpm_fast.data.load import load_dataset
from tests.fuzz import damage, specimens
from tests.fuzz.datasets import check_dataset
from tests.fuzz.places import MEGABYTES, Case, special, write

_BLOCK = 512
_FORMS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
# Where a field of a header is, and what it may be made to say.
_FIELDS = {
    0: (b"../x.png", b"/x.png", b"\xff\xfe.png", b"\x1b[31m.png", b"", b".png", b"a" * 100),
    124: (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-1", b"0" * 12, b"9", b"0x10", b"00000001000\0"),
    156: (b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"X", b"V", b"\0", b"?"),
    257: (b"ustar\0", b"ustar  \0", b"\0" * 8),
    345: (b"..", b"a" * 155, b"\xff"),
}
_LABELS = (b"7", b"-1", b"cat", b"9" * 30, b"", b"\xff", b"99999999", b" 1 \n")
_JSONS = (
    b'{"label": 1}',
    b'{"label": "\\u001b[31m"}',
    b"[" * 5000,
    b"{}",
    b"null",
    b'{"label": [1]}',
    b'{"label": 1e400}',
)


def _tar(members: list[tuple[str, bytes]], form: int) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def _edit_header(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One field of a header says something else, with the right checksum."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = rng.choice([member.offset for member in tar.getmembers()])
    place = rng.choice(sorted(_FIELDS))
    value = rng.choice(_FIELDS[place])
    header = bytearray(data[at : at + _BLOCK])
    header[place : place + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + _BLOCK :], f"the header at {at} says {value!r:.30} at {place}"


def shards(rng: random.Random, place: Path) -> Case:
    good, form = specimens.pictures()["png"], rng.choice(_FORMS)
    long = "d/" * 60 if rng.random() < 0.3 and form != tarfile.USTAR_FORMAT else ""
    members = [(f"{long}{i}.{kind}", data) for i in range(3) for kind, data in (("png", good), ("cls", b"%d" % i))]
    kind = rng.randrange(4)
    if kind == 0:
        data, how = damage.bytes_of(_tar(members, form), rng)
    elif kind == 1:
        data, how = _edit_header(_tar(members, form), rng)
    elif kind == 2:
        name, content = rng.choice((("3.cls", rng.choice(_LABELS)), ("3.json", rng.choice(_JSONS)), ("0.png", good)))
        data, how = _tar([*members, ("3.png", good), (name, content)], form), f"{name} is {content!r:.30}"
    else:
        data, how = _tar([*members, ("3.png", damage.bytes_of(good, rng)[0])], form), "a damaged picture"
    path = write(rng, place, data, "a.tar")
    classes = rng.random() < 0.5
    return (
        f"{how}; classes={classes}",
        lambda: load_dataset(path, rng.choice((None, 8)), classes=classes),
        lambda loaded: check_dataset(loaded, 1, 5),
        MEGABYTES,
    )


@functools.cache
def _prepared() -> dict[str, bytes]:
    """The files of a prepared folder of two classes."""
    with tempfile.TemporaryDirectory() as name:
        pictures, out = Path(name, "pictures"), Path(name, "out")
        out.mkdir()
        for label in ("cat", "dog"):
            (pictures / label).mkdir(parents=True)
            for i in range(2):
                (pictures / label / f"{i}.png").write_bytes(specimens.pictures()["png"])
        dataset = open_dataset(pictures, 8, classes=True, in_memory=False)
        assert isinstance(dataset, StoredDataset)
        index = preparing.begin(dataset, out)
        preparing.write_images(dataset, out, index, lambda _: None)
        return {path.name: path.read_bytes() for path in out.iterdir()}


def prepared(rng: random.Random, place: Path) -> Case:
    files = dict(_prepared())
    name = rng.choice((*files, "index.json", "index.json"))
    if name == "index.json" and rng.random() < 0.7:
        value, how = damage.edited(json.loads(files[name]), rng)
        files[name] = json.dumps(value, indent=1).encode()
    else:
        files[name], how = damage.bytes_of(files[name], rng)
    for other, data in files.items():
        (place / other).write_bytes(data)
    if rng.random() < 0.05:
        (place / name).unlink()
        special(rng, place / name)
        how = "no regular file"
    size, in_memory = rng.choice((None, 4, 8, (3, 8))), rng.random() < 0.5
    return (
        f"{name}: {how}; image_size={size}",
        lambda: open_dataset(place, size, in_memory=True if in_memory else None),
        lambda loaded: check_dataset(loaded, 4, 4),
        MEGABYTES,
    )
