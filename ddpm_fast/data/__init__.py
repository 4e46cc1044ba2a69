"""Where images come from: a built-in set, a folder, a .zip or an array file becomes one uint8 tensor in memory.

`load_dataset` in load.py is the entry point. files.py reads folders and archives, arrays.py reads .npz and .npy files,
pixels.py turns one picture into pixels, and order.py says which image is the k-th training example.
"""

from ddpm_fast.data.load import BUILTIN, Dataset, load_dataset, read_picture
from ddpm_fast.data.order import batch_indices, flip_mask

__all__ = ["BUILTIN", "Dataset", "batch_indices", "flip_mask", "load_dataset", "read_picture"]
