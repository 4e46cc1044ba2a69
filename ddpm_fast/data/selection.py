"""`Selection`: which part of a data set is meant, where it has several."""

from typing import NamedTuple


class Selection(NamedTuple):
    """Which part of a data set is meant. What is not given is found out, or an error lists what there is.

    Attributes:
        split: Of Hugging Face's data sets: the split, such as "train", or a part of one, such as "train[:10%]".
        subset: Of Hugging Face's data sets: the name of the configuration.
        image_column: The column of the images; in tar shards, what follows the first dot in their names, such as "jpg".
        label_column: The column of the classes; in tar shards, the entry of a sample's JSON.
    """

    split: str | None = None
    subset: str | None = None
    image_column: str | None = None
    label_column: str | None = None
