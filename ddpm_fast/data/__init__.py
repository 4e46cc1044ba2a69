"""Where images come from: a built-in set, a folder, a .zip or an array file becomes one uint8 tensor in memory.

`load_dataset` in load.py is the entry point, and dataset.py says what it returns. files.py lists folders and archives,
raster.py opens a picture as one of the formats that are read, pixels.py turns one picture into pixels, reading.py many.
arrays.py reads .npz and .npy files, parts.py several of them as one. bounds.py says what a file may ask for. order.py
says which image is the k-th training example, augmentation.py how it is changed, and held_out.py which images are never
one.
"""

from ddpm_fast.data.augmentation import Augmentation
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.data.examples import CROPS, Examples
from ddpm_fast.data.files import natural_key
from ddpm_fast.data.held_out import parse_held_out, split_as_recorded, split_held_out
from ddpm_fast.data.hugging_face import HUGGING_FACE
from ddpm_fast.data.imageset import ImageSet
from ddpm_fast.data.load import BUILTIN, load_dataset, open_dataset, read_picture
from ddpm_fast.data.order import ORDERS, batch_indices, flip_mask
from ddpm_fast.data.selection import Selection
from ddpm_fast.data.source import Source
from ddpm_fast.data.stored import INDEX_DIGEST, StoredDataset

__all__ = [
    "BUILTIN",
    "CROPS",
    "HUGGING_FACE",
    "INDEX_DIGEST",
    "ORDERS",
    "Augmentation",
    "Dataset",
    "Examples",
    "ImageSet",
    "Selection",
    "Source",
    "StoredDataset",
    "batch_indices",
    "flip_mask",
    "load_dataset",
    "natural_key",
    "open_dataset",
    "parse_held_out",
    "read_picture",
    "split_as_recorded",
    "split_held_out",
]
