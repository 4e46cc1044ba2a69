"""`PictureSource`: the pictures of a folder or archive, each decoded when it is asked for."""

import errno
import hashlib

import numpy as np
from PIL import Image

from ddpm_fast.data.bounds import Unreadable
from ddpm_fast.data.index import Entry, Index
from ddpm_fast.data.pixels import decode, is_grey, largest_side, upright_size
from ddpm_fast.data.reading import common_shape, opened_picture, reason_of
from ddpm_fast.data.size import Size
from ddpm_fast.data.source import Window
from ddpm_fast.errors import InputError, printable

PROBED = 1000  # pictures whose sizes and colours stand for those of all
# What makes a file unreadable for as long as it is there, unlike a disk or a network that fails. Pillow's errors have
# no number.
_LASTING = (None, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG)


class PictureSource:
    """The pictures of an index as a `Source`.

    Args:
        entries: The pictures.
        name: What they are called.
        image_size: The size to make; None keeps that of the pictures, which must be the same for all.
        channels: 1 or 3; None means 1 if the pictures are grey, and 3 otherwise. Where this or the size is to be found
            out, the headers of `PROBED` pictures, spread evenly over all, are read. A picture that differs from them
            later counts as broken.
        strict: Whether a broken picture among those raises an InputError.
        labels: Class numbers, int64 [n]; or None.
        label_names: One name for each class, or None.

    Raises:
        InputError: If the sizes differ and no image_size is given, or no picture that was looked at is readable.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        entries: Index,
        name: str,
        image_size: Size | None,
        channels: int | None,
        strict: bool = False,
        labels: np.ndarray | None = None,
        label_names: list[str] | None = None,
    ) -> None:
        self.name, self.labels, self.label_names = name, labels, label_names
        self._entries, self._size, self._asked_channels = entries, image_size, channels
        self.shape = common_shape(spread(entries, PROBED), image_size, channels, strict)
        self.crops = image_size is not None
        self.close = entries.close

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, i: int, window: Window | None = None) -> np.ndarray:
        """Picture number i as uint8 [C, H, W]; see `Source.read`."""
        size, entry = self._size, self._entries[i]
        largest = size if size is None or window is None else Size(*map(largest_side, size))
        try:
            with opened_picture(entry, largest) as image:
                self._check(image)
                return decode(image, size, self.shape[0], window).values
        except (InputError, Unreadable):
            raise
        except Exception as error:  # on broken bytes, decoders raise nearly anything
            if isinstance(error, OSError) and error.errno not in _LASTING:
                raise InputError(
                    f"cannot read the image {printable(entry.name)} of {printable(self.name)}: {error}; see that its "
                    "disk is there and works, and start again"
                ) from error
            raise Unreadable(reason_of(error)) from error

    def _check(self, image: Image.Image) -> None:
        """Raises Unreadable if the picture is not like those that the shape was taken from."""
        channels, height, width = self.shape
        if self._asked_channels is None and channels == 1 and not is_grey(image):
            raise Unreadable(
                "it has colours, and the pictures that were looked at first have none: ask for 3 channels (in "
                "training: --channels 3)"
            )
        if self._size is None and upright_size(image) != (width, height):
            found = "{}x{}".format(*upright_size(image))
            raise Unreadable(
                f"it has {found} pixels, and the pictures that were looked at first have {width}x{height}: give "
                "image_size (in training: --image-size)"
            )

    def name_of(self, i: int) -> str:
        """The path of picture number i in its folder or archive."""
        return self._entries[i].name

    def identity(self) -> bytes:
        """The SHA-256 of the index."""
        return hashlib.sha256(self._entries.identity()).digest()


def spread(entries: Index, most: int) -> list[Entry]:
    """At most so many of the entries, at equal distances."""
    count = min(most, len(entries))
    return [entries[k * len(entries) // count] for k in range(count)]
