"""`Examples`: which image is the k-th training example, ready for the network.

A training step asks for the examples first .. first+count-1. What it gets is a function of (seed, their numbers) alone,
so a resumed run, or several processes that share the examples among them, see what one uninterrupted process would.
"""

from collections.abc import Sequence

import torch

from ddpm_fast.data.ahead import InMemory, Plan, ReadAhead
from ddpm_fast.data.augmentation import Augmentation, Drawn
from ddpm_fast.data.imageset import ImageSet
from ddpm_fast.data.order import batch_indices, crop_windows, flip_mask
from ddpm_fast.data.stored import StoredDataset
from ddpm_fast.errors import InputError, printable

CROPS = ("centre", "random")


class Examples:
    """The endless stream of a data set's training examples.

    Attributes:
        dataset: The images.
    """

    def __init__(
        self,
        dataset: ImageSet,
        seed: int,
        flip: bool = False,
        order: int = 2,
        crop: str = "centre",
        augment: Augmentation | None = None,
    ):
        """Nothing is read yet.

        Args:
            dataset: The images. Those of a `StoredDataset` are read ahead by threads, which also augment.
            seed: Seed of their order, and of what is done to each.
            flip: Whether half of them are mirrored left-right.
            order: The version of their order; see `batch_indices`.
            crop: "centre" cuts the middle out of a picture. "random" scales it to between the least that covers the
                size and 1/0.8 of that, and cuts anywhere (Dhariwal & Nichol 2021, their `random_crop_arr`).
            augment: How they are changed in ways that `told` tells of. None: they are not.

        Raises:
            InputError: If the crop is unknown, or random and these images are cut already; or if images of this size
                cannot be changed so.
        """
        if crop not in CROPS:
            raise InputError(f"crop is {crop!r}; expected one of {', '.join(CROPS)}")
        if crop == "random" and not (isinstance(dataset, StoredDataset) and dataset.source.crops):
            raise InputError(
                f"the random crop needs pictures that are not cut yet, and those of {printable(dataset.name)} are; "
                "give a folder or .zip of pictures that are read on demand (in_memory=False) and an image_size"
            )
        if augment is not None:
            augment.check_shape(*dataset.shape[1:])
        self.dataset, self._seed, self._flip, self._order, self._crop = dataset, seed, flip, order, crop
        self._augment = augment
        self._ahead: ReadAhead | None = None
        if isinstance(dataset, StoredDataset) or augment is not None:
            readable = dataset if isinstance(dataset, StoredDataset) else InMemory(dataset)
            self._ahead = ReadAhead(readable, self._plan)

    @property
    def waited(self) -> float:
        """The seconds that `take` has waited for images so far; 0 for images in memory that are not augmented."""
        return 0.0 if self._ahead is None else self._ahead.waited

    def take(self, first: int, count: int, upcoming: Sequence[int] = ()) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The training examples first .. first+count-1.

        Args:
            first: The number of the first one, counted from the start of the training.
            count: How many.
            upcoming: The `first` of the calls that will come next, with the same count. They may be read meanwhile.

        Returns:
            The images [count, C, H, W] of the data set's dtype, and the labels int64 [count], or None.

        Raises:
            InputError: If an image cannot be read and none takes its place; see `StoredDataset.read`.
        """
        if self._ahead is not None:
            return self._ahead.take(first, count, upcoming)
        images, labels = self.dataset.batch(self._indices(first, count))
        if self._flip:
            mirrored = flip_mask(self._seed, first, count)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, labels

    def told(self, first: int, count: int) -> torch.Tensor | None:
        """What tells a network how the training examples first .. first+count-1 are augmented.

        Returns:
            float32 [count, channels of the augmentation], zeros for an image as it is; or None without an augmentation.
        """
        return None if self._augment is None else self._drawn(self._augment, first, count).told

    def _drawn(self, augment: Augmentation, first: int, count: int) -> Drawn:
        _, height, width = self.dataset.shape
        return augment.draw(self._seed, first, count, height, width)

    def _indices(self, first: int, count: int) -> torch.Tensor:
        return batch_indices(self._seed, first, count, len(self.dataset), self._order)

    def _plan(self, first: int, count: int) -> Plan:
        return Plan(
            self._indices(first, count).tolist(),
            crop_windows(self._seed, first, count) if self._crop == "random" else [None] * count,
            flip_mask(self._seed, first, count).tolist() if self._flip else [False] * count,
            None if self._augment is None else self._drawn(self._augment, first, count).changes,
            "edge" if self._augment is None else self._augment.border,
        )

    def close(self) -> None:
        """End what reads ahead."""
        if self._ahead is not None:
            self._ahead.close()
