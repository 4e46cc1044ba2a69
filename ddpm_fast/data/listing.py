"""`list_pictures`: the pictures of a source, of whatever kind of folder, archive or table it is."""

import os
from pathlib import Path

from ddpm_fast.data.archive import list_zip
from ddpm_fast.data.files import Listing, files_alone, list_folder
from ddpm_fast.data.hugging_face import HUGGING_FACE, list_rows
from ddpm_fast.data.patterns import expand, is_pattern
from ddpm_fast.data.selection import Selection
from ddpm_fast.data.tar import LABEL, list_tar
from ddpm_fast.errors import InputError, printable

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # the compressed ones are refused with advice
_TABLES = (".parquet", ".arrow")


def stands_for_files(source: str) -> bool:
    """Whether a source is given by something else than the path of a file or folder: by a name, or a pattern."""
    return source.startswith(HUGGING_FACE) or is_pattern(source)


def refuse_splits(source: str, selection: Selection) -> None:
    """Raises InputError if a part is selected that only Hugging Face's data sets have."""
    if selection.split is not None or selection.subset is not None:
        raise InputError(
            f"{printable(source)} has no splits and no subsets; leave --split and --subset out, or give a data set of "
            "Hugging Face (hf:NAME) or a parquet file"
        )


def refuse_columns(source: str, selection: Selection) -> None:
    """Raises InputError if a column is selected."""
    if selection.has_columns:
        raise InputError(
            f"{printable(source)} has no columns; leave --image-column and --label-column out, or give tar shards, a "
            "data set of Hugging Face (hf:NAME) or a parquet file"
        )


def list_pictures(source: str, selection: Selection) -> Listing | None:
    """The pictures of a source.

    Args:
        source: "hf:" and the name of a data set of Hugging Face; or a path, or a pattern of paths.
        selection: Which part of it.

    Returns:
        The pictures; None if it is a file that holds no pictures, such as one with an array.

    Raises:
        InputError: If there is no picture in it, it cannot be read, or has no such part.
    """
    if source.startswith(HUGGING_FACE):
        return list_rows(source.removeprefix(HUGGING_FACE), selection)
    if tables := _files(source, _TABLES):
        return list_rows(tables, selection)
    refuse_splits(source, selection)
    if tars := _files(source, _TARS):
        return list_tar(tars, selection.image_column, selection.label_column or LABEL)
    refuse_columns(source, selection)
    path = Path(source)
    if path.is_dir():
        return list_folder(path)
    return list_zip(path) if path.suffix.lower() == ".zip" else None


def _files(source: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of some kind that a source stands for, in their order; none if it stands for something else."""
    if is_pattern(source):
        return expand(source) if source.lower().endswith(suffixes) else []
    if not os.path.isdir(source):
        return [Path(source)] if source.lower().endswith(suffixes) else []
    return files_alone(source, suffixes)
