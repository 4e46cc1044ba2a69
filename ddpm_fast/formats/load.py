"""`load_model`: a model from wherever it is, its network and its diffusion as ours.

What a source is, is told by what it holds and not by its name: a file of ours, a diffusers folder, or a file that
torch.save has written, whose format is the one that claims it. Nothing that could run code is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.errors import InputError, printable
from ddpm_fast.files import checkpoint, tensorfile
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.files.memory import memory_for
from ddpm_fast.files.pickles import read_pickle
from ddpm_fast.formats import hub, lucidrains, pesser, w86763777
from ddpm_fast.formats.diffusers import folder as diffusers_folder
from ddpm_fast.formats.imported import Imported, Wrapped
from ddpm_fast.formats.openai import classifier as openai_classifier
from ddpm_fast.formats.openai import network as openai
from ddpm_fast.formats.repository import PREFIX, is_repository

_SHOWN = 5  # entries of a file that no format claims


@dataclass(frozen=True)
class Format:
    """A format of files that torch.save writes.

    Attributes:
        name: Whose format it is.
        claims: Whether what a file holds is of this format.
        read: The model in it, from what the file holds, its path and the flags.
    """

    name: str
    claims: Callable[[object], bool]
    read: Callable[[object, Path, str | None], Imported | Wrapped]


@dataclass(frozen=True)
class Folder:
    """A format of folders.

    Attributes:
        name: Whose format it is.
        claims: Whether a folder is of this format.
        read: The model in it, from its path and the flags.
    """

    name: str
    claims: Callable[[Path], bool]
    read: Callable[[Path, str | None], Imported]


# In the order in which they are asked.
FORMATS: tuple[Format, ...] = (
    Format("improved-diffusion and guided-diffusion", openai.claims, openai.read),
    Format(w86763777.CODE, w86763777.claims, w86763777.read),
    Format(pesser.CODE, pesser.claims, pesser.read),
    Format(lucidrains.CODE, lucidrains.claims, lucidrains.read),
)
FOLDERS: tuple[Folder, ...] = (Folder("diffusers", diffusers_folder.is_folder, diffusers_folder.read_folder),)


def load_model(
    source: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    flags: str | None = None,
) -> LoadedModel:
    """Load a model of ours or of another library.

    Args:
        source: One of

            - a model file, a training state (step-*.safetensors: its averaged weights), the folder of a training run
              (its model.safetensors, or, if it has none yet, its newest training state), or the name of a model that
              comes with the package.
            - a diffusers folder: a UNet2DModel's, or that of a pipeline with one.
            - a .pt or .ckpt file of a format that is known (FORMATS).
            - `hf:OWNER/NAME`, `hf:OWNER/NAME@REVISION` or `hf:OWNER/NAME@REVISION/FILE`: any of these on the Hugging
              Face Hub. It is downloaded once and kept in that library's cache.

        device: Where to put the model.
        dtype: The dtype of the parameters; None means float32.
        flags: What the training script of a .pt file was given, such as "--image_size 64 --num_channels 128", where
            its weights do not say it; or what a diffusers folder leaves out.

    Raises:
        InputError: For a source that is missing, damaged, of no known format or of several, or that needs other flags;
            for what the network, the diffusion or the package lacks for it; if weights are not finite; and if the
            memory is too small.
    """
    name = os.fspath(source)
    if not name.startswith(PREFIX):
        return _load(name, device, dtype, flags)
    path, commit = hub.download(name)
    loaded = _load(os.fspath(path), device, dtype, flags)
    loaded.config["origin"] = loaded.origin | {"hub": name, "commit": commit}
    return loaded


def _load(name: str, device: str | torch.device, dtype: torch.dtype | None, flags: str | None) -> LoadedModel:
    path = Path(os.path.expanduser(name))
    folder = _folder_format(path)
    if folder is not None:
        return _place(path, folder.read(path, flags), _files_of(path), device, dtype)
    if is_pickle(path):
        content = read_pickle(path)
        return _place(path, _format_of(path, content).read(content, path, flags), (path,), device, dtype)
    if is_repository(name) and not os.path.lexists(path):
        raise InputError(
            f"{name} does not exist; expected a file or a folder: check the path, or for a model of the Hugging Face "
            f"Hub give {PREFIX}{name}"
        )
    try:
        loaded = checkpoint.load_model(name, device, dtype)
    except tensorfile.DamagedFile as error:
        folder = _folder_format(path.parent)
        if folder is None:
            raise
        raise InputError(f"{error}. It belongs to a folder of {folder.name}: give that, {path.parent}") from error
    if flags is not None:
        raise InputError(
            f"{path} says itself how its model is made; flags are for files that do not, such as improved-diffusion's "
            "and guided-diffusion's .pt: leave them out"
        )
    return loaded


def _folder_format(path: Path) -> Folder | None:
    """The format of a folder; None for another one, such as that of a training run, and for what is no folder."""
    return next((one for one in FOLDERS if one.claims(path)), None) if os.path.isdir(path) else None


def is_pickle(path: Path) -> bool:
    """Whether torch.save may have written a file: it is a zip archive, or it begins as a pickle does."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            begin = file.read(9)
    except (OSError, ValueError):  # whoever reads it as ours says what is wrong
        return False
    # A safetensors file begins with the length of its header, which may be any number, and then the header's brace.
    return begin.startswith(b"PK\x03\x04") or (begin.startswith(b"\x80") and begin[8:] != b"{")


def _format_of(path: Path, content: object) -> Format:
    """The one format that claims what a file holds. Raises InputError for none, for several, and for a classifier."""
    if openai_classifier.claims(content):
        raise InputError(
            f"{path} is a classifier of noised images, which draws nothing itself: give it beside a model, as "
            "--classifier (in Python: load_classifier, and sample's classifier=)"
        )
    claiming = [one for one in FORMATS if one.claims(content)]
    if len(claiming) == 1:
        return claiming[0]
    if claiming:
        raise InputError(
            f"{path} could be of {' or of '.join(one.name for one in claiming)}; expected a file of one format: save "
            "the weights alone, under the names of its library"
        )
    folder = _folder_format(path.parent)
    if folder is not None:
        raise InputError(f"{path} belongs to a folder of {folder.name}: give that, {path.parent}")
    raise InputError(
        f"{path} is of no known format: it holds {_described(content)}; expected a file of "
        f"{', '.join(one.name for one in FORMATS)}, a folder of {', '.join(one.name for one in FOLDERS)}, or a "
        "model.safetensors of ours"
    )


def _described(content: object) -> str:
    """What a file holds, in a few words."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    shown = [f"{printable(str(key))[:80]} ({_kind(value)})" for key, value in list(content.items())[:_SHOWN]]
    more = f" and {len(content) - _SHOWN} more" if len(content) > _SHOWN else ""
    return f"a dict of {', '.join(shown) or 'nothing'}{more}"


def _kind(value: object) -> str:
    return tensorfile.kind(value) if isinstance(value, Tensor) else type(value).__name__


def _files_of(folder: Path) -> tuple[Path, ...]:
    """The files of a diffusers folder that make the model what it is."""
    kinds = (".json", ".safetensors", ".bin")
    folders = [folder, folder / "unet", folder / "scheduler"]
    return tuple(path for one in folders for path in sorted(one.glob("*")) if path.suffix in kinds and path.is_file())


def _place(
    path: Path,
    read: Imported | Wrapped,
    files: Sequence[Path],
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> LoadedModel:
    """What was read, as a model on a device.

    Args:
        path: The file or folder.
        read: What it holds.
        files: As in LoadedModel.
        device: Where to put it.
        dtype: The dtype of the parameters; None means float32.
    """
    config: dict[str, Any] = {"diffusion": read.diffusion.to_dict(), "origin": dict(read.origin)}
    if isinstance(read, Imported):
        config |= {"unet": read.unet.to_dict(), "label_names": read.label_names}
        return checkpoint.assemble(path, read.state, config, device, dtype, tuple(files))
    with memory_for(path, sum(tensor.nbytes for tensor in read.model.state_dict().values())):
        model = read.model.to(device=device, dtype=dtype).eval()
    return LoadedModel(model, read.diffusion, config, None, path, None, tuple(files))
