"""A folder of .npz files is one data set: their images and labels, one file after the other in natural order."""

import os

import numpy as np
import pytest
import torch

from ddpm_fast.data import Selection, load_dataset, open_dataset
from ddpm_fast.data import parts as parts_module
from ddpm_fast.data.parts import list_parts
from ddpm_fast.data.stored import StoredDataset
from ddpm_fast.errors import InputError

NAMES = np.array(["cat", "dog"])


def images(n, seed=0, shape=(3, 4, 2), dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape)).astype(dtype)


def save(folder, sizes, **more):
    """Parts of these sizes, of one array of images; returns it, and the labels."""
    folder.mkdir(exist_ok=True)
    whole, labels = images(sum(sizes)), np.arange(sum(sizes)) % 2
    first = 0
    for size in sizes:
        here = slice(first, first + size)
        np.savez(folder / f"{first}.npz", images=whole[here], labels=labels[here], label_names=NAMES, **more)
        first += size
    return whole, labels


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_parts_are_read_as_if_they_were_one_file(tmp_path, in_memory):
    whole, labels = save(tmp_path / "s", [9, 2, 1, 4])  # 0, 9, 11 and 12, which are not in the order of the alphabet
    (tmp_path / "s" / "samples.json").write_text("{}")
    (tmp_path / "s" / ".ddpm_fast-0.tmp").write_text("half")
    data = open_dataset(tmp_path / "s", in_memory=in_memory)
    assert isinstance(data, StoredDataset) is not in_memory
    assert len(data) == 16 and data.shape == (2, 3, 4) and data.label_names == ["cat", "dog"] and data.name == "s"
    for indices in (range(16), [15, 0, 8, 9, 11, 12, 10]):
        x, y = data.batch(torch.tensor(list(indices)))
        assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), whole[list(indices)])
        assert y.tolist() == labels[list(indices)].tolist()
    if in_memory:
        np.savez(tmp_path / "one.npz", images=whole, labels=labels, label_names=NAMES)
        assert data.digest == load_dataset(tmp_path / "one.npz").digest
    else:
        assert data.source.name_of(10) == "s/9.npz[1]"


def test_more_parts_than_may_be_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "_OPEN", 2)
    whole, _ = save(tmp_path / "s", [1] * 9)
    data = open_dataset(tmp_path / "s", in_memory=False)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(2):
        assert np.array_equal(data.batch(torch.arange(9))[0].permute(0, 2, 3, 1).numpy(), whole)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_parts_are_resized_and_converted_like_one_file(tmp_path):
    save(tmp_path / "s", [2, 3])
    whole = images(5, shape=(6, 6, 3))
    for first, last in ((0, 2), (2, 5)):
        np.savez(tmp_path / "s" / f"{first}.npz", images=whole[first:last], labels=[0] * (last - first))
    np.savez(tmp_path / "one.npz", images=whole, labels=[0] * 5)
    one = load_dataset(tmp_path / "one.npz", image_size=4, channels=1)
    assert torch.equal(load_dataset(tmp_path / "s", image_size=4, channels=1).images, one.images)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": images(2, shape=(3, 3, 2))}, "uint8 2x3x3, labels, 2 names"),
        ({"images": images(2, shape=(3, 4, 1))}, "uint8 1x3x4, labels, 2 names"),
        ({"images": images(2, shape=(3, 3, 2), dtype=np.float32)}, "float32 2x3x3, labels, 2 names"),
        ({"label_names": ["dog", "cat"]}, "uint8 2x3x4, labels, 2 names"),
        ({"labels": None}, "uint8 2x3x4, no labels"),
    ],
    ids=["size", "channels", "floats", "names", "labels"],
)
def test_parts_that_do_not_belong_together_are_refused(tmp_path, changed, message):
    save(tmp_path / "s", [2, 2])
    arrays = {"images": images(2), "labels": [0, 1], "label_names": NAMES} | changed
    np.savez(tmp_path / "s" / "1.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(InputError, match=rf"1\.npz has images of another kind \({message}"):
        open_dataset(tmp_path / "s")


def test_a_damaged_part_is_named(tmp_path):
    save(tmp_path / "s", [2, 2])
    (tmp_path / "s" / "2.npz").write_bytes((tmp_path / "s" / "2.npz").read_bytes()[:-30])
    with pytest.raises(InputError, match=r"2\.npz"):
        open_dataset(tmp_path / "s")


def test_a_part_that_changes_meanwhile_ends_the_work(tmp_path):
    save(tmp_path / "s", [2, 2])
    data = open_dataset(tmp_path / "s", in_memory=False)
    np.savez(tmp_path / "s" / "2.npz", images=images(3), labels=[0, 1, 0], label_names=NAMES)
    with pytest.raises(InputError, match=r"2\.npz was changed while it was in use"):
        data.batch(torch.tensor([3]))


def test_a_folder_with_pictures_or_sub_folders_is_no_folder_of_parts(tmp_path):
    save(tmp_path / "s", [2, 2])
    assert [path.name for path in list_parts(tmp_path / "s")] == ["0.npz", "2.npz"]
    assert list_parts(tmp_path / "s" / "0.npz") == list_parts(tmp_path / "none") == []
    (tmp_path / "s" / "x.PNG").touch()
    assert list_parts(tmp_path / "s") == []
    (tmp_path / "s" / "x.PNG").unlink()
    (tmp_path / "s" / "more").mkdir()
    assert list_parts(tmp_path / "s") == []


def test_floats_in_parts_need_one_range_for_all(tmp_path):
    (tmp_path / "s").mkdir()
    for k in range(2):
        np.savez(tmp_path / "s" / f"{k}.npz", images=images(2, k, (2, 4, 4), np.float32))
    with pytest.raises(InputError, match="another kind"):
        open_dataset(tmp_path / "s")


def test_floats_in_parts_of_a_given_range(tmp_path):
    (tmp_path / "s").mkdir()
    whole = images(4, 0, (2, 4, 4), np.float32)
    for k in range(2):
        np.savez(tmp_path / "s" / f"{k}.npz", images=whole[2 * k : 2 * k + 2])
    selection = Selection(layout="NCHW", value_range=(0, 255))
    for in_memory in (True, False):
        data = open_dataset(tmp_path / "s", in_memory=in_memory, selection=selection)
        np.testing.assert_allclose(data.batch(torch.arange(4))[0], whole / 127.5 - 1, atol=1e-6)
        assert data.value_range.low == (0, 0) and data.value_range.high == (255, 255)
