"""The options that say which part of a data set is meant, where it has several."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ddpm_fast.data.selection import Selection

PARTS = ("split", "subset", "image_column", "label_column")  # the options below

SplitOption = Annotated[
    str | None, typer.Option(help="the split of a Hugging Face data set, such as train or train[:10%]")
]
SubsetOption = Annotated[str | None, typer.Option(help="the configuration of a Hugging Face data set")]
ImageColumnOption = Annotated[
    str | None,
    typer.Option(help="the column of the images; in tar shards, what their names end in, such as jpg"),
]
LabelColumnOption = Annotated[
    str | None, typer.Option(help="the column of the classes; in tar shards, the entry of a sample's .json")
]


def selection_of(arguments: dict[str, Any]) -> Selection:
    """What a command's options select."""
    return Selection(**{name: arguments[name] for name in Selection._fields})
