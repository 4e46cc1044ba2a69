"""`hf:OWNER/NAME[@REVISION][/FILE]`: models of the Hugging Face Hub, down and up (pip install 'ddpm-fast[hf]').

The library huggingface_hub transfers and caches, and knows the server (HF_ENDPOINT), the token (`hf auth login`, or
HF_TOKEN) and whether it is to work offline (HF_HUB_OFFLINE). Of a repository only the files are fetched that a model is
made of. Without a network, what the cache holds is used.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ddpm_fast.errors import InputError, printable
from ddpm_fast.formats.repository import Address, common_place, needed

_LONGEST_REASON = 300
T = TypeVar("T")


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
    return snapshot / common_place(wanted), snapshot.name


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
