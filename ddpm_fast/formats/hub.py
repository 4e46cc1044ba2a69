"""`hf:OWNER/NAME[@REVISION][/FILE]`: models of the Hugging Face Hub, down and up (pip install 'ddpm-fast[hf]').

The library huggingface_hub transfers and caches, and knows the server (HF_ENDPOINT), the token (`hf auth login`, or
HF_TOKEN) and whether it is to work offline (HF_HUB_OFFLINE). Of a repository only the files are fetched that a model is
made of. Without a network, what the cache holds is used.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ddpm_fast.errors import InputError, printable
from ddpm_fast.formats.diffusers.folder import CONFIG, INDEX, SCHEDULER, WEIGHT_FILES, WEIGHTS

PREFIX = "hf:"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")  # the names of files that torch.save has written

_FORM = "hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME@REVISION/FILE"
_NAME = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"refs/pr/\d{1,9}|[A-Za-z0-9_][\w.-]{0,199}"
_PART = re.compile(r"[\w+=,@-][\w .+=,@-]{0,199}", re.ASCII)  # of a file's path: nothing that a pattern has a use for
_SOURCE = re.compile(rf"hf:({_NAME})/({_NAME})(?:@({_REVISION}))?(?:/(.+))?", re.ASCII)
_LONGEST_REASON = 300
_LISTED = 10

_SHARD = re.compile(rf"{WEIGHTS}-\d+-of-\d+\.safetensors")
_OURS = "model.safetensors"

T = TypeVar("T")


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


def download(source: str) -> tuple[Path, str]:
    """Fetch what a model is made of, if it is not in the cache already.

    Args:
        source: `hf:OWNER/NAME[@REVISION][/FILE]`.

    Returns:
        The folder or the file, in the cache of huggingface_hub; and the commit that it is of, if that is known.

    Raises:
        InputError: If the source is not of that form, the library is missing, there is no such repository, revision or
            file, it may not be read with this token, the network fails and the cache does not have it, or the
            repository holds no model that can be told from the others.
    """
    address = Address.of(source)
    hub = library(str(address))
    try:
        snapshot, names = _fetched(hub, address)
    except _NoNetwork as error:
        snapshot, names = _cached(hub, address, str(error))
    wanted = needed(names, address)
    missing = [name for name in wanted if not (snapshot / name).is_file()]
    if missing:
        raise InputError(
            f"{address}: {missing[0]} is not in the cache of huggingface_hub ({snapshot}), and the Hub cannot be "
            "reached: try again with a network"
        )
    return snapshot / _common(wanted), snapshot.name


def target(text: str) -> Address:
    """Where a model is to be pushed to: `hf:OWNER/NAME`. Nothing is sent.

    Raises:
        InputError: If the text is of another form.
    """
    address = Address.of(text)
    if address.revision or address.file:
        raise InputError(f"--push is {text!r:.200}; expected {PREFIX}OWNER/NAME alone")
    return address


def upload(folder: Path, address: Address, private: bool) -> str:
    """Send the files of a folder as one commit to a repository, which is made if there is none.

    Args:
        folder: The files.
        address: The repository, as target gives it.
        private: Whether a repository that is made is private. One that is there stays as it is.

    Returns:
        The address of the commit.

    Raises:
        InputError: If the library is missing, this token may not write there, or the server cannot be reached.
    """
    hub = library(str(address))
    api = hub.HfApi()
    repository, message = address.repository, "Upload from ddpm_fast"
    try:
        asked(hub, address, lambda: api.create_repo(repository, private=private, exist_ok=True))
        sent = asked(
            hub,
            address,
            lambda: api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=message),
        )
    except _NoNetwork as error:
        raise InputError(f"{address} could not be pushed to: {error}. Try again later") from error
    return str(sent.commit_url)


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


def _common(names: Sequence[str]) -> str:
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


# The library


class _NoNetwork(Exception):
    """The server cannot be reached, or is not to be."""


def library(what: str) -> types.ModuleType:
    """The library huggingface_hub.

    Args:
        what: What needs it, for the message.

    Raises:
        InputError: If it is not installed.
    """
    try:
        # An optional dependency, which imports its parts only when they are named.
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise InputError(
            f"{what} needs the library huggingface_hub ({error}); install it: pip install 'ddpm-fast[hf]'"
        ) from error
    return huggingface_hub


def asked(hub: types.ModuleType, address: Address, question: Callable[[], T]) -> T:
    """What the library answers, with its errors as ours.

    Args:
        hub: The library.
        address: Whom it is about.
        question: A call of the library that talks to the server.

    Raises:
        InputError: If there is no such repository or revision, it may not be read or written with this token, or what
            is sent is refused.
        _NoNetwork: If the server cannot be reached.
    """
    errors = hub.errors
    try:
        return question()
    except errors.GatedRepoError as error:
        raise InputError(
            f"{address.repository} is gated: ask for access on its page, {hub.constants.ENDPOINT}/{address.repository}"
            ", and log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{address.repository} has no revision {address.revision}; expected a branch, a tag or a commit: look at "
            f"{hub.constants.ENDPOINT}/{address.repository}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"there is no repository {address.repository} on {hub.constants.ENDPOINT}, or it is private and this token "
            "may not see it: check the name, or log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            raise InputError(
                f"{hub.constants.ENDPOINT} does not allow this to this token ({_reason(error)}): log in with `hf auth "
                "login`, or set HF_TOKEN to a token that may write"
            ) from error
        raise _NoNetwork(_reason(error)) from error
    except _transport_errors(hub) as error:
        raise _NoNetwork(_reason(error)) from error
    except ValueError as error:  # what the server, or the library, does not take of a page or a name
        raise InputError(f"{address}: {_reason(error)}") from error


def _transport_errors(hub: types.ModuleType) -> tuple[type[Exception], ...]:
    """What a failed connection raises, of whichever library the installed huggingface_hub talks through."""
    bases = hub.errors.HfHubHTTPError.__mro__
    return tuple(base for base in bases if issubclass(base, Exception) and base is not Exception)


def _reason(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:_LONGEST_REASON]) or type(error).__name__


def _fetched(hub: types.ModuleType, address: Address) -> tuple[Path, list[str]]:
    """The folder of a snapshot that has all that is needed, and the names of the repository's files."""
    revision = address.revision
    listing = asked(hub, address, lambda: hub.HfApi().model_info(address.repository, revision=revision).siblings)
    names = [one.rfilename for one in listing or []]
    wanted = needed(names, address)
    folder = asked(
        hub,
        address,
        lambda: hub.snapshot_download(address.repository, revision=revision, allow_patterns=wanted),
    )
    return Path(folder), names


def _cached(hub: types.ModuleType, address: Address, reason: str) -> tuple[Path, list[str]]:
    """The folder of a snapshot in the cache, and the names of the files that it has.

    Raises:
        InputError: If the cache has no such revision.
    """
    revision = address.revision or "main"
    try:
        repositories = hub.scan_cache_dir().repos
    except hub.errors.CacheNotFound:
        repositories = frozenset()
    for repository in repositories:
        if (repository.repo_type, repository.repo_id) != ("model", address.repository):
            continue
        for one in repository.revisions:
            if revision in (*one.refs, one.commit_hash):
                folder = Path(one.snapshot_path)
                return folder, [Path(file.file_path).relative_to(folder).as_posix() for file in one.files]
    raise InputError(
        f"{address}: the Hub cannot be reached ({reason}), and the cache of huggingface_hub does not have it: try "
        "again with a network"
    )
