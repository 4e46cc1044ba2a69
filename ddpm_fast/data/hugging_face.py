"""`Table`: the pictures of a data set that Hugging Face's library `datasets` loads (pip install 'ddpm-fast[hf]').

The library downloads a data set of the Hub, or reads local files (parquet, Arrow, a folder), into Arrow files that it
maps into memory. From there one picture is read at a time, and decoded as other pictures are. No program that comes
with a data set is ever run: from version 4 on the library has no way to.
"""

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ddpm_fast.data.bounds import Unreadable, open_regular
from ddpm_fast.data.files import Listing
from ddpm_fast.data.index import Entry
from ddpm_fast.data.labels import UNLABELLED, check_class_numbers, number_names
from ddpm_fast.data.selection import Selection
from ddpm_fast.errors import InputError, printable

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

HUGGING_FACE = "hf:"  # before the name of a data set
_LABEL = "label"  # the column of the classes, if none is given and none says by its type that it is one
_SAVED = ("state.json", "dataset_dict.json")  # one of these is in a folder that `save_to_disk` wrote
_OLDEST = 4  # version of the library; older ones run the program that comes with a data set
_NAMED = 20  # of many columns or splits, so many are named in a message
_LONGEST_REASON = 300


class Table:
    """The pictures of a column. They may be opened in several threads at once.

    Args:
        contents: The bytes of each picture, or nothing; None if there is no such column.
        paths: The path of each picture, or nothing; None if there is no such column.
        lengths: How many bytes each picture has, int64; 0 where there is none.
        follows_paths: Whether a picture without bytes is the file of its path.
    """

    def __init__(
        self,
        contents: "pa.ChunkedArray | None",
        paths: "pa.ChunkedArray | None",
        lengths: np.ndarray,
        follows_paths: bool,
    ) -> None:
        self._contents, self._paths, self._lengths, self._follows_paths = contents, paths, lengths, follows_paths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, i: int) -> Entry:
        return Entry(self._path(i) or f"row {i}", partial(self._open, i), int(self._lengths[i]))

    def __iter__(self) -> Iterator[Entry]:
        return (self[i] for i in range(len(self)))

    def identity(self) -> bytes:
        """The sizes of the pictures."""
        return self._lengths.astype("<i8").tobytes()

    def close(self) -> None:
        """Give the mapped files up."""
        self._contents = self._paths = None

    def _path(self, i: int) -> str | None:
        return None if self._paths is None else self._paths[i].as_py()

    def _open(self, i: int) -> BinaryIO:
        content = None if self._contents is None else self._contents[i].as_buffer()
        if content is not None:
            return io.BytesIO(content)
        path = self._path(i)
        if path is None or not self._follows_paths:
            raise Unreadable("its row has no bytes" + ("" if path is None else ", only a path, which is not followed"))
        return open_regular(path)


def list_rows(source: str | Sequence[Path], selection: Selection) -> Listing:
    """The pictures of a data set that Hugging Face's library loads, and their classes.

    Args:
        source: The name of a data set of the Hub, or a local folder, which may be followed by ":" and a split; or the
            paths of parquet or Arrow files.
        selection: Which split and columns to take. Without, the only split, or "train"; the only column of pictures;
            and the only column of classes, or one called "label".

    Raises:
        InputError: If the library is missing, it cannot load the data set, or this has no such split or columns.
    """
    where = printable(source if isinstance(source, str) else str(source[0]))
    rows = _load(source, selection, where)
    image = _image_column(rows.features, selection.image_column, where)
    label = _label_column(rows.features, selection.label_column, where)
    if len(rows) == 0:
        raise InputError(f"{where} has no rows; give a data set or a split that has some")
    # As Arrow, a picture takes 6 us to find, and as the library's own rows 128 us.
    table = rows.select_columns([image] if label is None else [image, label]).with_format("arrow")[:]
    try:
        table.validate(full=True)  # a file of others may have places in it that lie outside of it
    except ValueError as error:
        raise InputError(f"{where} is damaged: {error}; download it or make it again") from error
    labels, names, unlabelled = None, None, ""
    if label is not None:
        known = getattr(rows.features[label], "names", None)  # those of a ClassLabel
        labels, names = _classes(table.column(label), known, f"the column {printable(label)} of {where}")
        if labels.min() == UNLABELLED:
            unlabelled = f"row {labels.argmin()}" if labels.max() > UNLABELLED else ""
            labels = names = None
    return Listing(_pictures(table.column(image), isinstance(source, str)), Counter(), labels, names, unlabelled)


def _load(source: str | Sequence[Path], selection: Selection, where: str) -> "datasets.Dataset":
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{where} needs Hugging Face's library `datasets` ({error}); install it: pip install 'ddpm-fast[hf]'"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < _OLDEST:
        raise InputError(
            f"{where} needs version {_OLDEST} or later of Hugging Face's library `datasets`, and this is "
            f"{datasets.__version__}; install it: pip install -U 'ddpm-fast[hf]'"
        )
    split = selection.split
    try:
        if isinstance(source, str):
            name, _, after = source.partition(":")
            split = split or after or None
            if any(os.path.isfile(os.path.join(name, file)) for file in _SAVED):
                found = datasets.load_from_disk(name)
            else:
                found = datasets.load_dataset(name, selection.subset, split=split)
        else:
            kind = "arrow" if source[0].suffix.lower() == ".arrow" else "parquet"
            found = datasets.load_dataset(kind, data_files=[str(path) for path in source], split=split or "train")
    except Exception as error:  # of the library, of those that it reads files with, and of networks
        reason = " ".join(f"{error.__cause__ or error}".split())[:_LONGEST_REASON]
        raise InputError(
            f"Hugging Face's library `datasets` cannot load {where}: {printable(reason)} ({type(error).__name__}); "
            "check the name, the split (--split) and the subset (--subset)"
        ) from error
    return found if isinstance(found, datasets.Dataset) else _one_split(found, split, where)


def _one_split(found: "datasets.DatasetDict", split: str | None, where: str) -> "datasets.Dataset":
    name = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if name not in found:
        raise InputError(f"{where} has no split {printable(name)}, only {_listed(found)}; say which with --split")
    return found[name]


def _listed(names: Sequence[str]) -> str:
    names = list(names)
    shown = ", ".join(printable(name[:100]) for name in names[:_NAMED]) or "none"
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _image_column(features: "datasets.Features", given: str | None, where: str) -> str:
    """The column of the pictures."""
    types = {name: features.arrow_schema.field(name).type for name in features}
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    possible = images or [name for name in features if _holds_files(types[name])]
    if given is not None:
        if given not in features:
            raise InputError(f"{where} has no column {printable(given)} for --image-column, only {_listed(features)}")
        if not _holds_files(types[given]):
            raise InputError(
                f"the column {printable(given)} of {where} is of the type {types[given]}, expected pictures as the "
                f"bytes of files; such columns are {_listed(possible)}"
            )
        return given
    if "image" in possible:
        return "image"
    if len(possible) != 1:
        raise InputError(
            f"{where} has {len(possible)} columns of pictures ({_listed(possible)}) among {_listed(features)}; say "
            "which one with image_column (--image-column)"
        )
    return possible[0]


def _holds_files(kind: "pa.DataType") -> bool:
    """Whether a column of this type can hold the bytes of files."""
    kinds = {field.name: field.type for field in kind}.get("bytes") if str(kind).startswith("struct") else kind
    return str(kinds) in ("binary", "large_binary")


def _label_column(features: "datasets.Features", given: str | None, where: str) -> str | None:
    """The column of the classes; None if there is none."""
    if given is not None:
        if given not in features:
            raise InputError(f"{where} has no column {printable(given)} for --label-column, only {_listed(features)}")
        return given
    classes = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    if len(classes) == 1:
        return classes[0]
    kind = str(features.arrow_schema.field(_LABEL).type) if _LABEL in features else ""
    return _LABEL if kind.startswith(("int", "uint")) or kind in ("string", "large_string") else None


def _pictures(column: "pa.ChunkedArray", follows_paths: bool) -> Table:
    """The pictures of a column that holds files."""
    import pyarrow.compute as pc

    fields = [field.name for field in column.type] if str(column.type).startswith("struct") else []
    contents = pc.struct_field(column, "bytes") if fields else column
    paths = pc.struct_field(column, "path") if "path" in fields else None
    if paths is not None and (str(paths.type) not in ("string", "large_string") or paths.null_count == len(paths)):
        paths = None
    lengths = pc.fill_null(pc.binary_length(contents), 0).to_numpy().astype(np.int64)
    return Table(contents, paths, lengths, follows_paths)


def _classes(column: "pa.ChunkedArray", names: list[str] | None, where: str) -> tuple[np.ndarray, list[str] | None]:
    """The labels of a column, UNLABELLED where there is none, and the names of the classes.

    Args:
        column: The column.
        names: The names of the numbers in it, if it is one of numbers that have names.
        where: What to call it in messages.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if str(column.type) in ("string", "large_string"):
        found = pc.drop_null(pc.unique(column))
        positions = pc.fill_null(pc.index_in(column, value_set=found), UNLABELLED)
        return number_names(positions.to_numpy().astype(np.int64), found.to_pylist(), where)
    if not pa.types.is_integer(column.type):
        raise InputError(
            f"{where} is of the type {column.type}, expected class numbers or names; give another column with "
            "label_column (--label-column)"
        )
    labels = pc.fill_null(column.cast(pa.int64()), UNLABELLED).to_numpy()
    check_class_numbers(labels, names, where)
    return labels, names
