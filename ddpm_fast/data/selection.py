"""`Selection`: what is said of a data set besides its name."""

from collections.abc import Sequence
from typing import NamedTuple


class Selection(NamedTuple):
    """Which part of a data set is meant, and how its values are. What is not given is found out, or an error lists what
    there is.

    Attributes:
        split: Of Hugging Face's data sets: the split, such as "train", or a part of one, such as "train[:10%]".
        subset: Of Hugging Face's data sets: the name of the configuration.
        image_column: The column of the images; in tar shards, what follows the first dot in their names, such as "jpg".
        label_column: The column of the classes; in tar shards, the entry of a sample's JSON.
        layout: Of arrays of floats: "NCHW" or "NHWC". By default the one that has squares, if the other has none.
        value_range: Of arrays of floats, what becomes [-1, 1]: a low and a high end for all channels, or for each in
            turn. Values beyond are clipped. By default the smallest and the largest value of each channel.
    """

    split: str | None = None
    subset: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    layout: str | None = None
    value_range: Sequence[float] | None = None

    @property
    def has_columns(self) -> bool:
        """Whether a column is named."""
        return self.image_column is not None or self.label_column is not None

    @property
    def is_of_floats(self) -> bool:
        """Whether something is said that only arrays of floats have."""
        return self.layout is not None or self.value_range is not None
