"""`Examples`: which image is the k-th training example, ready for the network.

A training step asks for the examples first .. first+count-1. What it gets is a function of (seed, their numbers) alone,
so a resumed run, or several processes that share the examples among them, see what one uninterrupted process would.
"""

from collections.abc import Sequence

import torch

from ddpm_fast.data.dataset import Dataset
from ddpm_fast.data.order import batch_indices, flip_mask


class Examples:
    """The endless stream of a data set's training examples.

    Attributes:
        dataset: The images.
    """

    def __init__(self, dataset: Dataset, seed: int, flip: bool = False):
        """Nothing is read yet.

        Args:
            dataset: The images.
            seed: Seed of their order, and of what is done to each.
            flip: Whether half of them are mirrored left-right.
        """
        self.dataset, self._seed, self._flip = dataset, seed, flip

    def take(self, first: int, count: int, upcoming: Sequence[int] = ()) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The training examples first .. first+count-1.

        Args:
            first: The number of the first one, counted from the start of the training.
            count: How many.
            upcoming: The `first` of the calls that will come next, with the same count. They may be read meanwhile.

        Returns:
            The images [count, C, H, W] of the data set's dtype, and the labels int64 [count], or None.
        """
        images, labels = self.dataset.batch(batch_indices(self._seed, first, count, len(self.dataset)))
        if self._flip:
            mirrored = flip_mask(self._seed, first, count)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, labels

    def close(self) -> None:
        """End what reads ahead."""
