"""Files of somebody else's folder: which of them may be read, and the JSON in them.

A folder may come from anywhere. Its files are read where they are; a link that leads out of the folder is refused,
unless it leads to where Hugging Face's cache keeps the contents of its files. Nothing in JSON is executed, and how much
of it is read is bounded.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.memory import memory_for

# A scheduler's config with a million betas is 25 MB; a network's is 1 KB.
_MOST_JSON_BYTES = 32 * 2**20


def file_in(folder: Path, name: str) -> Path | None:
    """The path of a folder's file.

    Args:
        folder: The folder that was given.
        name: The file's name, or a path below the folder, such as "unet/config.json".

    Returns:
        The path with links followed; None if there is no such file.

    Raises:
        InputError: If it is no regular file, or a link leads out of the folder.
    """
    path, root = folder / name, Path(os.path.realpath(folder))
    if not os.path.lexists(path):
        return None
    real = Path(os.path.realpath(path))
    if root not in real.parents and not _is_cached(root, real):
        raise InputError(
            f"{path} is a link that leads out of the folder, to {printable(str(real))}: only what the folder holds is "
            "read; copy the file into it"
        )
    try:
        mode = real.stat().st_mode
    except OSError as error:
        raise InputError(f"{path} cannot be opened ({error.strerror or error}): fetch it again") from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is no file; expected one: fetch the folder again")
    return real


def _is_cached(root: Path, real: Path) -> bool:
    """Whether a file is the content of a link of Hugging Face's cache: models--X/snapshots/REVISION/... links to
    models--X/blobs/DIGEST."""
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots":
            return real.parent == parent.parent.parent / "blobs"
    return False


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        InputError: If it is too large, cannot be read, or holds anything else. A name that is given twice is refused
            as well, because it is unclear which value is meant, and so are NaN and Infinity, which JSON has not.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): fetch it again") from error
    if len(data) > _MOST_JSON_BYTES:
        raise InputError(f"{path} has more than {_MOST_JSON_BYTES // 2**20} MiB; expected a small JSON file")
    try:
        with memory_for(path, 16 * len(data)):
            content = json.loads(data, object_pairs_hook=_unrepeated, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON ({printable(str(error))[:200]}): fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name is given twice")
    return made


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON's")
