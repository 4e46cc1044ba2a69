"""How reading images on demand grows with their number: `python -m benchmarks loading --out FILE.json`.

Each point is measured in a process of its own: the time to open the set, the memory that the process has for itself
(RssAnon of /proc/self/status), images a second, and the share of the time that a loop waits for images if it uses them
at 80% of that pace.
"""

import dataclasses
import io
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.growth import ROOT, memory
from benchmarks.runs import Options, Run, say
from ddpm_fast.data import Examples, StoredDataset, open_dataset
from ddpm_fast.errors import InputError

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
MOST_FILES = 100_000  # of a folder: the disk keeps a block and an inode for each
BATCH, SIZE, CLASSES = 64, 64, 100
PACE = 0.8


@dataclasses.dataclass(frozen=True)
class Point:
    """A set of `count` made pictures. kind: "folder" or "zip"."""

    kind: str
    count: int

    def __str__(self) -> str:
        return f"{self.kind} {self.count}"


def points(quick: bool) -> list[Point]:
    """Folders and archives of ever more pictures."""
    counts = (100, 200) if quick else COUNTS
    return [Point(kind, n) for kind in ("folder", "zip") for n in counts if kind == "zip" or n <= MOST_FILES]


def make(point: Point, place: Path) -> Path:
    """Write the pictures, JPEGs of about 2 KB, of which 500 are different."""
    noise = np.random.default_rng(0)
    files = []
    for _ in range(min(500, point.count)):
        small = Image.fromarray(noise.integers(0, 256, (9, 9, 3), np.uint8))
        file = io.BytesIO()
        small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    named = ((f"{i % CLASSES:03d}/image-{i:07d}.jpg", files[i % len(files)]) for i in range(point.count))
    if point.kind == "zip":
        with zipfile.ZipFile(place / "images.zip", "w", zipfile.ZIP_STORED) as archive:
            for name, file in named:
                archive.writestr(name, file)
        return place / "images.zip"
    for name, file in named:
        path = place / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
    return place / "images"


def measured(path: str, batches: int) -> dict[str, Any]:
    """What opening and reading a set costs, in this process."""
    Examples(open_dataset("mnist5k"), 0).take(0, BATCH)  # libraries load themselves at their first use
    before, start = memory("RssAnon"), time.perf_counter()
    dataset = open_dataset(path, SIZE, classes=True, in_memory=False)
    assert isinstance(dataset, StoredDataset)
    opened, digest = time.perf_counter() - start, dataset.digest
    examples, asked = Examples(dataset, 0, flip=True), 0

    def take(count: int, seconds: float) -> float:
        """Take batches, with a pause after each. Returns the seconds that it took."""
        nonlocal asked
        start = time.perf_counter()
        for _ in range(count):
            examples.take(asked * BATCH, BATCH, [(asked + k) * BATCH for k in range(1, 5)])
            asked += 1
            time.sleep(seconds)
        return time.perf_counter() - start

    take(batches // 4, 0)
    seconds = take(batches, 0) / batches
    take(batches // 4, seconds / PACE)
    waited = examples.waited
    took = take(batches, seconds / PACE)
    found = {
        "count": len(dataset),
        "open_seconds": opened,
        "anonymous_bytes": memory("RssAnon"),
        "anonymous_bytes_of_the_set": memory("RssAnon") - before,
        "peak_bytes": memory("VmHWM"),
        "images_per_second": BATCH / seconds,
        "waited": (examples.waited - waited) / took,
        "digest": digest,
    }
    examples.close()
    return found


def measure(point: Point, run: Run) -> None:
    """Make a set, measure it in another process and put it down."""
    with tempfile.TemporaryDirectory() as place:
        path = make(point, Path(place))
        batches = 8 if run.options.quick else 100
        call = f"from benchmarks.loading import *; print(json.dumps(measured({str(path)!r}, {batches})))"
        made = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True)
    if made.returncode:
        raise InputError(f"{point}: {(made.stderr.strip() or f'status {made.returncode}').splitlines()[-1]}")
    found = json.loads(made.stdout.splitlines()[-1])
    run.found["loading"].append({"kind": point.kind, **found})
    say(
        f"{point}: opened in {found['open_seconds']:.3g} s, {found['anonymous_bytes'] / 2**20:.0f} MiB, of which "
        f"{found['anonymous_bytes_of_the_set'] / 2**20:.0f} for the set (peak {found['peak_bytes'] / 2**20:.0f}), "
        f"{found['images_per_second']:.0f} images/s, waits {found['waited']:.1%} at {PACE:.0%} of that"
    )
    run.write()


def main(options: Options) -> None:
    """Measures how reading on demand grows with the number of images, and writes the points to a file."""
    run = Run(options.checked(0, 0), {}, loading=[])
    run.each(options.matching(points(options.quick)), lambda point: measure(point, run))
    run.finish()
