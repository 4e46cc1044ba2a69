"""What the kinds of files share: what a case is, and where its file lies."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What was done, what loads the file, what is wrong with what was loaded, and how many megabytes that may take.
Case = tuple[str, Callable[[], Any], Callable[[Any], str], float]
MEGABYTES = 150  # that loading a small file may take; a picture may have the pixels that Pillow allows
PICTURE_MEGABYTES = 1500


def write(rng: random.Random, place: Path, data: bytes, name: str) -> Path:
    """Write a file of this name, or of an odd one; seldom put there what is no regular file."""
    path = place / (name if rng.random() < 0.9 else rng.choice(("\x1b[31mx", "a b", "x\ny", "é", "-x")) + name)
    if rng.random() < 0.02:
        special(rng, path)
    else:
        path.write_bytes(data)
    return path


def special(rng: random.Random, path: Path) -> None:
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
