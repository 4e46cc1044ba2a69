"""What a `Dataset` says of itself: its digest, its classes by name, its size; and how classes are numbered."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import Dataset, load_dataset, natural_key
from ddpm_fast.errors import InputError


def made(labels=(0, 1, 1), names=("cat", "dog"), shape=(3, 1, 2, 2)):
    images = torch.arange(np.prod(shape), dtype=torch.uint8).reshape(shape)
    return Dataset(
        images,
        None if labels is None else torch.tensor(labels),
        None if names is None else list(names),
        "pets",
    )


# ---- the order of classes ----


@pytest.mark.parametrize(
    "names",
    [
        ["1", "2", "3", "10", "11", "100"],
        ["class2", "class10", "class10b", "class11"],
        ["a", "a1", "a1b", "a2", "b"],
        ["", "7", "cat"],
        ["1", "01", "001", "2"],
        ["v1.2", "v1.10", "v2.1"],
        ["x" + "9" * 5000, "x1" + "0" * 5000],
    ],
    ids=["numbers", "numbered", "texts", "empty", "zeros", "versions", "longer than int() reads"],
)
def test_natural_order(names):
    if names[0] == "1" and names[1] == "01":
        names = sorted(names[:3]) + names[3:]  # equal numbers: by their text
    shuffled = list(names)
    random.Random(1).shuffle(shuffled)
    assert sorted(shuffled, key=natural_key) == names


def test_numeric_class_folders_are_numbered_in_their_order(tmp_path):
    for name in ("1", "2", "3", "10", "20"):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4), int(name)).save(tmp_path / name / "a.png")
    dataset = load_dataset(tmp_path, classes=True)
    assert dataset.label_names == ["1", "2", "3", "10", "20"]
    values = dataset.images[:, 0, 0, 0].tolist()
    assert [dataset.label_names[label] for label in dataset.labels] == [str(value) for value in values]
    # The images stay in the order of their paths, so that the same seed meets them in the same order as before.
    assert values == [1, 10, 2, 20, 3]


# ---- the digest ----


def test_digest_is_that_of_what_is_trained_on():
    one = made()
    assert one.digest == made().digest == one.digest
    assert len(one.digest) == 64 and int(one.digest, 16) >= 0
    assert made(names=("cat", "zebra")).digest == one.digest  # names are compared as names
    turned = Dataset(one.images.flip(0), one.labels, one.label_names, "pets")
    laid_out = Dataset(one.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), one.labels, None, "other")
    assert laid_out.digest == one.digest
    others = [
        turned,
        made(labels=(0, 0, 1)),
        made(labels=None),
        made(shape=(3, 2, 1, 2)),
        Dataset(one.images[:2], one.labels[:2], one.label_names, "pets"),
        Dataset(one.images + (torch.arange(12).reshape(3, 1, 2, 2) == 11), one.labels, one.label_names, "pets"),
    ]
    digests = {other.digest for other in others} | {one.digest}
    assert len(digests) == len(others) + 1


def test_digest_is_computed_once_and_only_when_asked(monkeypatch):
    calls = []
    plain = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: (calls.append(1), plain(self))[1])
    one = made()
    assert not calls
    assert one.digest == one.digest
    assert len(calls) == 2  # the images and the labels


def test_digest_survives_how_the_files_are_stored(tmp_path):
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    (tmp_path / "set").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "set" / f"{i}.png")
    np.save(tmp_path / "a.npy", images)
    np.savez_compressed(tmp_path / "a.npz", images=images)
    digests = {load_dataset(tmp_path / name).digest for name in ("set", "a.npy", "a.npz")}
    assert len(digests) == 1
    Image.fromarray(images[0]).save(tmp_path / "set" / "1b.png")
    assert load_dataset(tmp_path / "set").digest not in digests


# ---- classes by name ----


def test_labels_are_renumbered_to_the_classes_of_a_model():
    dataset = made(labels=(0, 2, 1), names=("ant", "bee", "cat"))
    mapped = dataset.with_classes(["cat", "dog", "bee", "ant"])
    assert mapped.labels.tolist() == [3, 0, 2] and mapped.labels.dtype == torch.int64
    assert mapped.label_names == ["cat", "dog", "bee", "ant"] and mapped.num_classes == 4
    assert mapped.images is dataset.images and mapped.name == dataset.name
    assert dataset.labels.tolist() == [0, 2, 1] and dataset.label_names == ["ant", "bee", "cat"]


def test_a_class_without_images_need_not_be_one_of_the_model():
    assert made(labels=(1, 1, 1), names=("ant", "bee")).with_classes(["bee"]).labels.tolist() == [0, 0, 0]


def test_equal_classes_change_nothing_even_if_two_have_one_name():
    dataset = made(labels=(0, 1, 2), names=("crane", "crane", "owl"))
    assert dataset.with_classes(("crane", "crane", "owl")) is dataset


@pytest.mark.parametrize(
    "dataset, names, words",
    [
        (
            made((0, 1, 2), ("2", "3", "4")),
            ["1", "2", "3"],
            "^pets has images of the classes 4, which the model does not have; its classes are 1, 2, 3; rename",
        ),
        (made(), ["wolf"], "the classes cat, dog, which .* its classes are wolf;"),
        (made(names=("cat", "cat")), ["cat", "dog"], "^pets has more than one class called cat, so"),
        (made(), ["cat", "dog", "dog"], "^the model has more than one class called dog, so"),
        (made(names=None), ["cat"], "^pets has no class names, .* model, which are cat; give a folder"),
        (made(labels=None, names=None), ["cat"], "^pets has no labels"),
        (made(names=("cat", "\x1b[31m")), ["cat"], r"the classes \\x1b\[31m, which"),
        (made(names=("cat", "x")), [str(i) for i in range(30)], r"18, 19 and 10 more; rename"),
    ],
    ids=["missing", "all missing", "twice here", "twice there", "no names", "no labels", "control", "many"],
)
def test_classes_that_do_not_match_are_named(dataset, names, words):
    with pytest.raises(InputError, match=words):
        dataset.with_classes(names)
