"""What `hf:OWNER/NAME[@REVISION][/FILE]` names, and which files of such a repository a model is made of.

Nothing here talks to the Hub: hub.py does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ddpm_fast.errors import InputError, printable
from ddpm_fast.formats.diffusers.folder import CONFIG, INDEX, SCHEDULER, WEIGHT_FILES, WEIGHTS

PREFIX = "hf:"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")  # the names of files that torch.save has written

_FORM = "hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME@REVISION/FILE"
_NAME = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"refs/pr/\d{1,9}|[A-Za-z0-9_][\w.-]{0,199}"
_PART = re.compile(r"[\w+=,@-][\w .+=,@-]{0,199}", re.ASCII)  # of a file's path: nothing that a pattern has a use for
_SOURCE = re.compile(rf"hf:({_NAME})/({_NAME})(?:@({_REVISION}))?(?:/(.+))?", re.ASCII)
_LISTED = 10

_SHARD = re.compile(rf"{WEIGHTS}-\d+-of-\d+\.safetensors")
_OURS = "model.safetensors"


@dataclass(frozen=True)
class Address:
    """What `hf:OWNER/NAME[@REVISION][/FILE]` names.

    Attributes:
        repository: OWNER/NAME.
        revision: A branch, a tag, a commit or refs/pr/N; None is the main branch.
        file: A file or a folder of the repository; the empty string is all of it.
    """

    repository: str
    revision: str | None
    file: str

    @classmethod
    def of(cls, source: str) -> Address:
        """Read a source. Nothing is sent.

        Raises:
            InputError: If it names no repository, or what it names could lead elsewhere.
        """
        match = _SOURCE.fullmatch(source)
        if match is None or ".." in match[1] + match[2] + (match[3] or "") or "--" in match[1] + match[2]:
            raise InputError(f"{source!r:.200} names no model of the Hugging Face Hub; expected {_FORM}")
        file = (match[4] or "").removesuffix("/")
        if file and not _is_plain(file):
            raise InputError(
                f"{source!r:.200} names no file of a repository; expected {_FORM}, where FILE is its path below the "
                "repository"
            )
        return cls(f"{match[1]}/{match[2]}", match[3], file)

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repository}{at}" + (f"/{self.file}" if self.file else "")


def is_repository(text: str) -> bool:
    """Whether a text has the form OWNER/NAME, without the prefix."""
    return re.fullmatch(rf"{_NAME}/{_NAME}", text, re.ASCII) is not None


def target(text: str) -> Address:
    """Where a model is to be pushed to: `hf:OWNER/NAME`. Nothing is sent.

    Raises:
        InputError: If the text is of another form.
    """
    address = Address.of(text)
    if address.revision or address.file:
        raise InputError(f"--push is {text!r:.200}; expected {PREFIX}OWNER/NAME alone")
    return address


def needed(names: Sequence[str], address: Address) -> list[str]:
    """Which files of a repository a model is made of.

    Args:
        names: The paths of all files, as the server lists them: those that are no plain paths are passed over.
        address: What was asked for.

    Raises:
        InputError: If there is no model, or there are several.
    """
    plain = [name for name in names if _is_plain(name)]
    if address.file in plain:
        return [address.file]
    folder = f"{address.file}/" if address.file else ""
    inside = {name.removeprefix(folder) for name in plain if name.startswith(folder)}
    if not inside:
        raise InputError(f"{address}: there is no such file or folder in the repository; it holds {_listed(plain)}")
    for chosen in (_pipeline(inside), _network(inside)):
        if chosen:
            return sorted(folder + name for name in chosen)
    single = [name for name in sorted(inside) if "/" not in name and name.endswith((*PICKLES, ".safetensors"))]
    if _OURS in single:
        return [folder + _OURS]
    if len(single) != 1:
        raise InputError(
            f"{address}: which file is the model cannot be told; expected a diffusers folder, {_OURS}, or one file "
            f"ending in {', '.join(PICKLES)}: name one as {PREFIX}{address.repository}/FILE. It holds "
            f"{_listed(sorted(inside))}"
        )
    return [folder + single[0]]


def _pipeline(names: set[str]) -> list[str]:
    """The network and the scheduler of a diffusers pipeline, or nothing if this is none."""
    folder = {name.removeprefix("unet/") for name in names if name.startswith("unet/")}
    network = [f"unet/{name}" for name in _network(folder)]
    return [*network, *(names & {INDEX, f"scheduler/{SCHEDULER}"})] if network and INDEX in names else []


def _network(names: set[str]) -> list[str]:
    """The config, the weights and the scheduler beside a network of diffusers, or nothing if this is none."""
    weights = [name for name in WEIGHT_FILES if name in names][:1]
    if weights and weights[0].endswith(".json"):
        weights += [name for name in names if _SHARD.fullmatch(name)]
    return [CONFIG, *weights, *(names & {SCHEDULER})] if weights and CONFIG in names else []


def common_place(names: Sequence[str]) -> str:
    """The file, if there is one; of several the folder that holds them all."""
    if len(names) == 1:
        return names[0]
    parents = [PurePosixPath(name).parent.parts for name in names]
    shared = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "/".join(shared)


def _is_plain(name: str) -> bool:
    """Whether a path stays below the folder that it is meant for, and is no pattern."""
    return all(_PART.fullmatch(part) for part in name.split("/"))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return printable(", ".join(names[:_LISTED]) or "nothing") + more
