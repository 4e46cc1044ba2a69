"""Decodes many pictures into one array, side by side, and reports the broken ones."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image

from ddpm_fast.data.bounds import Budget, Unreadable, allocating
from ddpm_fast.data.index import Entries, Entry
from ddpm_fast.data.pixels import decode, is_grey, run_parallel, upright_size
from ddpm_fast.data.raster import NAMES, allowed_pixels, open_picture
from ddpm_fast.data.size import Size
from ddpm_fast.errors import InputError, printable

_NAMED = 3  # of many reasons so many are named, and of many broken pictures so many for each reason
_LONGEST_REASON = 200
_BYTES_PER_PIXEL = 12  # of a picture that is being decoded: RGBA, its copy on white, and RGB twice
_MOST_BITS = 14  # that cameras and scanners put into 16
_HELD = Budget(1 << 30)  # the bytes of archive members that are unpacked at one time
_DECODED = Budget(1 << 30)  # the bytes of pictures that are decoded at one time


class Decoded(NamedTuple):
    """Decoded pictures.

    Attributes:
        images: uint8 [K, C, H, W].
        kept: int64 [K], the positions of their entries.
        skipped: The names of the broken pictures.
        notes: What the user is to be warned of, one sentence each.
    """

    images: np.ndarray
    kept: np.ndarray
    skipped: list[str]
    notes: list[str]


@contextmanager
def opened_picture(entry: Entry, size: Size | None) -> Iterator[Image.Image]:
    """A picture to decode inside, while the memory for it is taken from what all threads share.

    Args:
        entry: The picture.
        size: What it will be scaled to, as for `open_picture`.

    Raises:
        InputError: If memory ran out inside.
        Exception: Nearly any, if the picture is broken.
    """
    try:
        with _HELD.take(entry.held), entry.open() as file:
            opened = open_picture(file, entry.name, size)
            with opened.image, _DECODED.take(_BYTES_PER_PIXEL * (opened.pixels + math.prod(size or (0,)))):
                yield opened.image
    except MemoryError as error:  # which images are there may not depend on how much memory is free
        raise InputError(
            f"memory ran out while the image {printable(entry.name)} was read; close other programs, or make the "
            "image smaller or remove it"
        ) from error


def reason_of(error: Exception) -> str:
    """Why a picture is broken, after an exception while it was read."""
    reason = str(error) if isinstance(error, Unreadable) else f"{error} ({type(error).__name__})"
    return printable(reason[:_LONGEST_REASON])


def refusal(name: str, reason: str) -> str:
    """What to say of a broken picture where none may be skipped."""
    where = f"cannot read the image {printable(name)}"
    return f"{where}: {reason}; repair or remove it, or leave strict off to skip such files"


class _Reader:
    """Runs work on every entry, and remembers which entries are broken and why."""

    def __init__(self, entries: Entries, image_size: Size | None, strict: bool) -> None:
        self.entries = entries
        self.image_size = image_size
        self.strict = strict
        self.broken: dict[int, str] = {}

    def attempt(self, i: int, work: Callable[[int, Image.Image], object]) -> str | None:
        """Run work on entry i.

        Returns:
            Why the entry is unreadable, or None if it is readable.

        Raises:
            InputError: If it is unreadable and the reader is strict, or memory ran out.
        """
        entry = self.entries[i]
        try:
            with opened_picture(entry, self.image_size) as image:
                work(i, image)
        except InputError:  # the file has changed meanwhile, or no memory is left
            raise
        except Exception as error:  # on broken bytes, decoders raise nearly anything
            reason = reason_of(error)
            if self.strict:
                raise InputError(refusal(entry.name, reason)) from error
            return reason
        return None

    def each(
        self,
        work: Callable[[int, Image.Image], object],
        progress: Callable[[int, int], object] | None = None,
    ) -> list[int]:
        """Run work(i, picture) on every entry that is not known to be broken.

        Returns:
            The positions of the entries that were readable.

        Raises:
            InputError: If none was, or one was not and the reader is strict.
        """
        todo = [i for i in range(len(self.entries)) if i not in self.broken]
        with warnings.catch_warnings():
            # Pillow's warning from 89 megapixels on names no file; a picture that is refused is named by us.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            reasons = run_parallel(lambda k: self.attempt(todo[k], work), len(todo), progress)
        self.broken |= {i: reason for i, reason in zip(todo, reasons, strict=True) if reason is not None}
        kept = [i for i in todo if i not in self.broken]
        if not kept:
            raise InputError(
                f"none of the {len(self.entries)} images is readable; {self.say_broken()}; give images in one of the "
                f"formats {NAMES}"
            )
        return kept

    def say_broken(self) -> str:
        """The reasons, each with the first pictures that are broken so and the number of the others."""
        names: dict[str, list[str]] = {}
        for i in sorted(self.broken):
            names.setdefault(self.broken[i], []).append(printable(self.entries[i].name))
        parts = []
        for reason, broken in list(names.items())[:_NAMED]:
            more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
            parts.append(f"{', '.join(broken[:_NAMED])}{more}: {reason}")
        rest = sum(map(len, list(names.values())[_NAMED:]))
        return "; ".join(parts) + (f"; and {rest} for other reasons" if rest else "")


def common_shape(entries: Entries, image_size: Size | None, channels: int | None, strict: bool) -> tuple[int, int, int]:
    """The channels, height and width that the entries will have in common, by their headers: nothing is decoded.

    The arguments are those of `read_pictures`.

    Raises:
        InputError: As from `read_pictures`.
    """
    allowed_pixels()
    return _probe(_Reader(entries, image_size, strict), image_size, channels)[1]


def _probe(reader: _Reader, image_size: Size | None, channels: int | None) -> tuple[list[int], tuple[int, int, int]]:
    """The positions of the pictures whose headers are readable, and the channels, height and width of all images.

    Where these are given, no picture is opened.
    """
    if image_size is not None and channels is not None:
        return list(range(len(reader.entries))), (channels, *image_size)
    grey: dict[int, bool] = {}
    sizes: dict[int, tuple[int, int]] = {}

    def look(i: int, image: Image.Image) -> None:
        grey[i] = is_grey(image)
        if image_size is None:
            sizes[i] = upright_size(image)

    kept = reader.each(look)
    if channels is None:
        channels = 1 if all(grey[i] for i in kept) else 3
    size = image_size or _common_size([(reader.entries[i].name, sizes[i]) for i in kept])
    return kept, (channels, *size)


def mean_area(entries: Entries) -> float:
    """The mean number of pixels of those of the entries that are readable; 0 if none is."""
    reader = _Reader(entries, None, strict=False)
    areas: list[int] = []
    for i in range(len(entries)):
        reader.attempt(i, lambda _, image: areas.append(math.prod(image.size)))
    return sum(areas) / max(1, len(areas))


def read_pictures(
    entries: Entries,
    image_size: Size | None,
    channels: int | None,
    strict: bool,
    progress: Callable[[int, int], object] | None,
) -> Decoded:
    """Decode every entry. A broken picture is left out; one with too many pixels (`allowed_pixels`) counts as broken.

    Args:
        entries: The pictures.
        image_size: The size to make; None keeps the pictures' own, which must then be the same for all.
        channels: 1 or 3; None means 1 if every picture is grey, and 3 otherwise.
        strict: Whether a broken picture raises InputError instead.
        progress: Called as progress(done, total) while pictures are decoded.

    Raises:
        InputError: If the sizes differ and no image_size is given, no picture is readable, or there is too little
            memory.
    """
    allowed_pixels()  # refuses a bad setting here, and not once for each picture
    reader = _Reader(entries, image_size, strict)
    kept, (channels, height, width) = _probe(reader, image_size, channels)
    slots = {i: slot for slot, i in enumerate(kept)}
    shape = (len(slots), channels, height, width)
    remedy = "give fewer images, or a smaller image_size (--image-size)"
    with allocating(math.prod(shape), f"the {len(slots)} images of {width}x{height} pixels", remedy):
        images = np.empty(shape, np.uint8)
    peaks: dict[int, int] = {}

    def fill(i: int, image: Image.Image) -> None:
        pixels = decode(image, image_size, channels)
        images[slots[i]] = pixels.values
        if pixels.peak is not None:
            peaks[i] = pixels.peak

    kept = reader.each(fill, progress)
    if len(kept) < len(slots):
        images = images[[slots[i] for i in kept]]
    notes = _notes(reader, peaks)
    return Decoded(images, np.array(kept, dtype=np.int64), [entries[i].name for i in sorted(reader.broken)], notes)


def _notes(reader: _Reader, peaks: dict[int, int]) -> list[str]:
    """The warnings about pictures that were read, or not."""
    notes = []
    if len(reader.broken) == 1:
        notes.append(f"skipped the broken image {reader.say_broken()}")
    elif reader.broken:
        notes.append(f"skipped {len(reader.broken)} broken images: {reader.say_broken()} (Dataset.skipped lists them)")
    peak = max(peaks.values(), default=0)
    bits = peak.bit_length()
    if 0 < bits <= _MOST_BITS:
        notes.append(
            f"no value in the 16-bit images ({len(peaks)}) is above {peak}, and white is 65535, so that they come out "
            f"dark; if {(1 << bits) - 1} is their white, multiply the values by {1 << (16 - bits)} and save them again"
        )
    return notes


def _common_size(named_sizes: list[tuple[str, tuple[int, int]]]) -> Size:
    """The size that all have, or an InputError that lists the sizes. named_sizes: (name, (width, height))."""
    counts = Counter(size for _, size in named_sizes)
    if len(counts) == 1:
        width, height = named_sizes[0][1]
        return Size(height, width)
    example = dict((size, printable(name)) for name, size in reversed(named_sizes))
    seen = ", ".join(f"{w}x{h} ({n} images, such as {example[w, h]})" for (w, h), n in counts.most_common(5))
    more = f" and {len(counts) - 5} more sizes" if len(counts) > 5 else ""
    raise InputError(
        f"the images differ in size (width x height): {seen}{more}; give image_size (in training: --image-size), which "
        "they are scaled to cover before the middle is cut out, or scale the files to one size first"
    )
