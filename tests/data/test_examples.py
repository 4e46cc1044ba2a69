"""Training examples are the same whether they are in memory or read ahead, and in whichever calls they come."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import Augmentation, Dataset, StoredDataset, batch_indices, flip_mask, open_dataset
from ddpm_fast.data.ahead import reader_threads
from ddpm_fast.data.bounds import Unreadable
from ddpm_fast.data.examples import Examples
from ddpm_fast.data.order import crop_windows
from ddpm_fast.errors import InputError


class Made:
    """A source of made images, which notes who reads which."""

    name, shape, dtype, label_names, crops = "made", (1, 2, 3), np.dtype(np.uint8), None, False

    def __init__(self, n, broken=(), seconds=0.0):
        self.images = np.arange(n * 6, dtype=np.uint8).reshape(n, 1, 2, 3)
        self.labels = np.arange(n) % 5
        self.broken, self.seconds, self.reads, self.threads = broken, seconds, [], set()
        self.failure = None

    def __len__(self):
        return len(self.images)

    def read(self, i, window=None):
        self.reads.append(i)
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if self.failure:
            raise self.failure
        if i in self.broken:
            raise Unreadable("it is broken")
        return self.images[i]

    def name_of(self, i):
        return f"image {i}"

    def identity(self):
        return b"made"

    def close(self):
        pass


@pytest.fixture
def examples():
    made = []

    def make(source, *args, **options):
        made.append(Examples(StoredDataset.of(source), *args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_examples_are_augmented_in_memory_and_ahead_as_they_are_told():
    augment = Augmentation.of("xflip,yflip,shift=0.5,scale,translate:0.3,reflect")
    source = Made(23)
    memory = Examples(
        Dataset(torch.from_numpy(source.images), torch.from_numpy(source.labels), None, "x"), 3, augment=augment
    )
    stored = Examples(StoredDataset.of(source), 3, augment=augment)
    before = source.images.copy()
    for first, count, upcoming in [(0, 20, [20, 40]), (20, 20, [40]), (3, 9, []), (40, 20, [])]:
        (images, labels), told = stored.take(first, count, upcoming), stored.told(first, count)
        in_memory, in_memory_labels = memory.take(first, count, upcoming)
        assert torch.equal(images, in_memory) and torch.equal(labels, in_memory_labels)
        assert torch.equal(labels, memory.dataset.labels[batch_indices(3, first, count, 23)])
        assert torch.equal(told, memory.told(first, count))
        drawn = augment.draw(3, first, count, 2, 3)
        assert torch.equal(told, drawn.told)
        plain = torch.from_numpy(source.images)[batch_indices(3, first, count, 23)]
        kept = ~told.any(1)
        assert torch.equal(images[kept], plain[kept]) and 0 < kept.sum() < count
        changed = (images != plain).flatten(1).any(1)
        assert changed[~kept].float().mean() > 0.5  # not all: a shift of this size may be of no pixel
        for k, change in enumerate(drawn.changes):
            if change is not None and change.matrix is None:
                assert np.array_equal(images[k], change.moved(plain[k].numpy(), "reflect"))
    assert np.array_equal(source.images, before)
    stored.close()
    memory.close()
    assert Examples(memory.dataset, 3).told(0, 5) is None


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_examples_read_ahead_are_those_in_memory(examples, order, flip):
    source = Made(23)
    memory = Examples(
        Dataset(torch.from_numpy(source.images), torch.from_numpy(source.labels), None, "x"), 3, flip, order
    )
    stored = examples(source, 3, flip, order)
    calls = [(0, 10, [10, 20]), (10, 10, [20]), (20, 10, []), (5, 10, [0]), (0, 10, [0]), (0, 64, [64]), (7, 0, [])]
    for first, count, upcoming in calls:
        images, labels = stored.take(first, count, upcoming)
        wanted, wanted_labels = memory.take(first, count, upcoming)
        assert images.dtype == torch.uint8 and torch.equal(images, wanted) and torch.equal(labels, wanted_labels)
        indices = batch_indices(3, first, count, 23, order)
        plain = torch.from_numpy(source.images)[indices]
        mirrored = flip_mask(3, first, count)[:, None, None, None] & flip
        assert torch.equal(images, torch.where(mirrored, plain.flip(-1), plain))
    assert memory.waited == 0


def test_what_comes_next_is_read_in_other_threads_before_it_is_asked_for(examples):
    source = Made(64)
    stored = examples(source, 0, order=2)
    stored.take(0, 8, [8, 16])
    wait_until(lambda: len(source.reads) == 24)
    stored.take(8, 8)
    assert len(source.reads) == 24
    assert threading.current_thread().name not in source.threads
    stored.take(16, 8)  # it was not announced again, so it was dropped
    assert len(source.reads) == 32


def wait_until(is_so):
    for _ in range(1000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("in ten seconds it did not come to be so")


def test_the_seconds_that_were_waited_are_counted(examples):
    source = Made(64, seconds=0.01)
    stored = examples(source, 0)
    start = time.perf_counter()
    stored.take(0, 8)
    assert 0.01 <= stored.waited <= time.perf_counter() - start


def test_what_is_read_ahead_is_bounded(examples, monkeypatch):
    monkeypatch.setattr("ddpm_fast.data.ahead._MOST_AHEAD", 3 * 8 * 6)
    source = Made(64)
    stored = examples(source, 0, order=2)
    stored.take(0, 8, [8, 16, 24, 32, 40])
    stored.close()  # which waits for those that were begun
    assert len(set(source.reads)) <= 4 * 8


def test_the_image_that_stands_in_for_a_broken_one_brings_its_label(examples):
    source = Made(10, broken=(2, 3))
    stored = examples(source, 1, order=1)
    with pytest.warns(UserWarning, match="image [23] is broken: it is broken; the next readable") as caught:
        images, labels = stored.take(0, 10)
    places = [4 if i in (2, 3) else i for i in batch_indices(1, 0, 10, 10, version=1).tolist()]
    assert torch.equal(images, torch.from_numpy(source.images[places])) and labels.tolist() == [p % 5 for p in places]
    assert len(caught) == 2


def test_a_failure_in_a_thread_comes_out_of_the_call_that_needs_it(examples):
    source = Made(64)
    stored = examples(source, 0)
    source.failure = InputError("the disk is gone")
    wanted = batch_indices(0, 0, 8, 64)
    for _ in range(2):
        with pytest.raises(InputError, match="the disk is gone"):
            stored.take(0, 8, [8])
    source.failure = None
    assert torch.equal(stored.take(0, 8)[0], torch.from_numpy(source.images)[wanted])


def test_closing_ends_the_threads_and_asking_again_starts_them(examples):
    others = threading.enumerate()

    def readers():
        return [thread for thread in threading.enumerate() if thread not in others]

    stored = examples(Made(64), 0)
    assert not readers()
    first = stored.take(0, 8, [8])[0]
    assert readers()
    stored.close()
    stored.close()
    assert not readers()
    assert torch.equal(stored.take(0, 8)[0], first)


def test_the_cores_are_shared_with_the_processes_beside(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    for beside, threads in ((None, 12), ("1", 12), ("4", 3), ("5", 2), ("100", 1), ("0", 12), ("many", 12)):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if beside is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
        assert reader_threads() == threads


# ---- the random crop ----


def test_random_crops_are_windows_of_the_scaled_picture(tmp_path):
    """Against Pillow: scale the whole picture, then cut at whole pixels, as guided-diffusion's random_crop_arr does."""
    size, n = 16, 6
    noise = np.random.default_rng(0)
    for i in range(n):
        small = Image.fromarray(noise.integers(0, 256, (7, 5, 3), np.uint8))
        small.resize((80, 120) if i % 2 else (120, 80)).save(tmp_path / f"{i}.png")
    stored = Examples(open_dataset(tmp_path, size, in_memory=False), 2, flip=True, order=2, crop="random")
    images, _ = stored.take(0, 60, [60])
    assert torch.equal(stored.take(10, 20)[0], images[10:30])
    seen = set()
    indices, mirrored = batch_indices(2, 0, 60, n, 2), flip_mask(2, 0, 60)
    for k, (zoom, left, top) in enumerate(crop_windows(2, 0, 60)):
        picture = Image.open(tmp_path / f"{indices[k]}.png")
        shorter = 16 + int(zoom * 5)  # ceil(16/0.8) = 20, so 16 .. 20
        width, height = (shorter, shorter * 3 // 2) if picture.width < picture.height else (shorter * 3 // 2, shorter)
        if shorter % 2:  # the longer side would end within a pixel
            continue
        x, y = int(left * (width - size + 1)), int(top * (height - size + 1))
        seen.add((shorter, x, y))
        scaled = picture.resize((width, height), Image.Resampling.LANCZOS).crop((x, y, x + size, y + size))
        wanted = torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
        wanted = wanted.flip(-1) if mirrored[k] else wanted
        assert (images[k].int() - wanted.int()).abs().max() <= 1
    assert {shorter for shorter, _, _ in seen} == {16, 18, 20} and len(seen) > 15
    stored.close()


@pytest.mark.parametrize("shape", [(16, 16), (17, 16), (16, 400), (3, 5), (1, 1)])
def test_random_crops_of_any_size_stay_inside(tmp_path, shape):
    Image.new("L", shape, 77).save(tmp_path / "a.png")
    stored = Examples(open_dataset(tmp_path, 16, in_memory=False), 2, crop="random")
    assert (stored.take(0, 50)[0] == 77).all()
    stored.close()


def test_a_random_crop_needs_pictures_that_are_not_cut(tmp_path):
    Image.new("L", (4, 4), 77).save(tmp_path / "a.png")
    for dataset in (
        open_dataset(tmp_path, 4),
        open_dataset(tmp_path, in_memory=False),
        StoredDataset.of(Made(2)),
    ):
        with pytest.raises(InputError, match="the random crop needs pictures that are not cut yet"):
            Examples(dataset, 0, crop="random")
    with pytest.raises(InputError, match="crop is 'left'; expected one of centre, random"):
        Examples(open_dataset(tmp_path, 4), 0, crop="left")
