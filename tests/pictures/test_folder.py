"""A folder of samples knows what it holds from one listing, and is written by several processes at once."""

import json
import threading

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.files import atomic
from ddpm_fast.files.atomic import write_once
from ddpm_fast.pictures.folder import SampleFolder
from ddpm_fast.pictures.parts import ids_of_part, part_name

SETTINGS = {"seed": 0}


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "samples.json")


def black(n):
    return -torch.ones(n, 1, 2, 2)


# Pictures


def test_only_the_pictures_of_these_samples_count(tmp_path):
    for name in ("000002.png", "000005_label1.png", "000006_label1_cat.png", "0000003.png", "000004.PNG", "x.png"):
        (tmp_path / name).touch()
    (tmp_path / "samples.json").write_text(json.dumps(SETTINGS))
    plain = SampleFolder(tmp_path, SETTINGS, range(1, 8))
    assert plain.finished == plain.count() == 1 and not plain.missing(slice(1, 2)) and plain.missing(slice(0, 2))
    assert SampleFolder(tmp_path, SETTINGS, range(1, 8), [1] * 7).finished == 1
    assert SampleFolder(tmp_path, SETTINGS, range(1, 8), [1] * 7, ["dog", "cat"]).finished == 1
    assert SampleFolder(tmp_path, SETTINGS, range(3, 8)).finished == 0


def test_ids_of_more_than_six_digits(tmp_path):
    folder = SampleFolder(tmp_path, SETTINGS, range(999_998, 1_000_002))
    folder.write(slice(0, 4), black(4))
    assert names(tmp_path) == ["1000000.png", "1000001.png", "999998.png", "999999.png"] and folder.count() == 4


# Parts


def parts(folder, n, per_part=4, first=0, labels=None, label_names=None):
    return SampleFolder(folder, SETTINGS, range(first, first + n), labels, label_names, per_part)


def draw(folder, n, per_part=4, first=0, **options):
    """Draw what is missing, as the command does: the part of samples k ... holds the value of k."""
    opened = parts(folder, n, per_part, first, **options)
    for start in range(0, n, per_part):
        part = slice(start, min(start + per_part, n))
        if opened.missing(part):
            opened.write(part, black(part.stop - start) + 2 * (first + start) / 255)
    return opened


def test_the_names_of_parts_say_which_samples_they_hold():
    assert part_name(range(64, 128)) == "000064-000127.npz" and ids_of_part("000064-000127.npz") == range(64, 128)
    assert part_name(range(999_999, 1_000_001)) == "999999-1000000.npz"
    assert ids_of_part("999999-1000000.npz") == range(999_999, 1_000_001)
    for other in (
        "000064-000063.npz",
        "0000064-000127.npz",
        "64-127.npz",
        "000064-000127.npz.tmp",
        "x000064-000127.npz",
    ):
        assert ids_of_part(other) is None


def test_a_part_holds_the_images_the_labels_and_the_names_of_the_classes(tmp_path):
    draw(tmp_path, 6, labels=[0, 1, 0, 1, 0, 1], label_names=["cat", "dog"])
    assert names(tmp_path) == ["000000-000003.npz", "000004-000005.npz"]
    with np.load(tmp_path / "000004-000005.npz") as part:
        assert part["images"].shape == (2, 2, 2, 1) and part["images"].dtype == np.uint8 and (part["images"] == 4).all()
        assert part["labels"].tolist() == [0, 1] and part["labels"].dtype == np.int64
        assert part["label_names"].tolist() == ["cat", "dog"]
    draw(tmp_path / "plain", 1)
    with np.load(tmp_path / "plain" / "000000-000000.npz") as part:
        assert part.files == ["images"]


def test_a_larger_number_of_samples_replaces_the_last_part_and_keeps_the_others(tmp_path):
    assert draw(tmp_path, 6).count() == 6
    before = (tmp_path / "000000-000003.npz").stat().st_mtime_ns
    opened = draw(tmp_path, 11)
    assert opened.finished == 6 and opened.count() == 11
    assert names(tmp_path) == ["000000-000003.npz", "000004-000007.npz", "000008-000010.npz"]
    assert (tmp_path / "000000-000003.npz").stat().st_mtime_ns == before
    assert parts(tmp_path, 5).finished == 5, "fewer samples than there are"
    assert draw(tmp_path, 4, first=11).count() == 4 and names(tmp_path)[-1] == "000011-000014.npz"


def test_no_sample_is_in_two_parts_if_a_longer_one_cannot_be_written(tmp_path, monkeypatch):
    draw(tmp_path, 6)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match="No space left"):
        draw(tmp_path, 8)
    assert names(tmp_path) == ["000000-000003.npz"]
    monkeypatch.undo()
    assert draw(tmp_path, 8).count() == 8


@pytest.mark.parametrize(("first", "per_part"), [(2, 4), (0, 2)], ids=["others", "fewer"])
def test_parts_that_hold_some_samples_twice_are_refused(tmp_path, first, per_part):
    draw(tmp_path, 8)
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record == {"format": "npz", "seed": 0, "images_per_part": 4}
    (tmp_path / "samples.json").write_text(json.dumps({**record, "images_per_part": per_part}))
    with pytest.raises(InputError, match="in one file, and this command would draw"):
        parts(tmp_path, 8, per_part, first)


def test_parts_of_another_size_and_pictures_are_refused(tmp_path):
    draw(tmp_path / "a", 4)
    with pytest.raises(InputError, match="images_per_part 4 instead of 2"):
        parts(tmp_path / "a", 4, 2)
    with pytest.raises(InputError, match='format "npz" instead of "png"'):
        SampleFolder(tmp_path / "a", SETTINGS, range(4))
    (tmp_path / "a" / "samples.json").unlink()
    with pytest.raises(InputError, match=r"holds 1 samples such as 000000-000003\.npz, but no samples\.json"):
        parts(tmp_path / "a", 4)
    SampleFolder(tmp_path / "b", SETTINGS, range(4))
    with pytest.raises(InputError, match='format "png" instead of "npz"'):
        parts(tmp_path / "b", 4)


def test_a_folder_whose_record_names_no_format_holds_pictures(tmp_path):
    (tmp_path / "samples.json").write_text(json.dumps(SETTINGS))
    SampleFolder(tmp_path, SETTINGS, range(4))
    assert json.loads((tmp_path / "samples.json").read_text()) == SETTINGS


# The record


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_of_many_that_write_the_record_at_once_the_first_ones_stays(tmp_path, monkeypatch, links):
    if not links:

        def link(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(atomic.os, "link", link)
    target, ready, read = tmp_path / "record", threading.Barrier(16), []

    def write(i):
        ready.wait()
        write_once(target, f"{i}" * 1000)
        read.append(target.read_text())

    threads = [threading.Thread(target=write, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if links:
        assert len(set(read)) == 1, "all find the same record after they have written theirs"
    assert all(len(text) in (1000, 2000) and len(set(text)) <= 2 for text in read), "never half of one"
    write_once(target, "another")
    assert target.read_text() in read and [path.name for path in tmp_path.iterdir()] == ["record"]
