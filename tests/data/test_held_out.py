"""Images that are held out: the same ones always, each class its share, and never a training example."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import (
    Dataset,
    Examples,
    load_dataset,
    open_dataset,
    parse_held_out,
    split_as_recorded,
    split_held_out,
)
from ddpm_fast.data.held_out import held_out_numbers
from ddpm_fast.errors import InputError

SIZES = [37, 20, 3, 1]  # images of each class


def numbered(labels=None):
    """Images that are their own numbers."""
    n = sum(SIZES)
    images = torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1).expand(n, 1, 4, 4).contiguous()
    return Dataset(images, labels, None, "numbers")


def classes():
    """A class for each image, mixed."""
    labels = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures whose brightness is their number in the order of their names; the tenth one is broken."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(40):
        place = folder / ("cat", "dog")[i >= 25] / f"{i:02}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), 5 * i, np.uint8)).save(place)
    (folder / "cat" / "10.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return folder


def shown(images):
    return images[:, 0, 0, 0].tolist()


def test_text_says_a_count_or_a_share():
    assert [parse_held_out(text) for text in ("500", "0.05", "5e-2")] == [500, 0.05, 0.05]
    for text in ("0", "1.0", "-1", "0.0", "nan", "inf", "half", "", "٣", "5%"):
        with pytest.raises(InputError, match=r"expected a number of images such as 500, or a share"):
            parse_held_out(text)


@pytest.mark.parametrize("labels", [None, classes()], ids=["no classes", "classes"])
@pytest.mark.parametrize("amount", [1, 9, 60, 0.2])
def test_each_image_is_in_one_of_the_two_sets(labels, amount):
    training, held_out = split_held_out(numbered(labels), amount, seed=3)
    count = 12 if amount == 0.2 else amount
    assert (len(training), len(held_out)) == (61 - count, count)
    assert sorted(shown(training.images) + shown(held_out.images)) == list(range(61))
    for part in (training, held_out):
        assert shown(part.images) == sorted(shown(part.images)), "the order is that of the data set"
        assert labels is None or torch.equal(part.labels, labels[part.images[:, 0, 0, 0].long()])


def test_a_class_gives_its_share_and_keeps_an_image():
    labels = classes()
    for count, expected in ((6, [4, 2, 0, 0]), (30, [18, 10, 2, 0]), (57, [36, 19, 2, 0]), (60, [37, 20, 2, 1])):
        numbers = held_out_numbers(labels.numpy(), 61, count, 0)
        found = np.bincount(labels.numpy()[numbers], minlength=4)
        assert found.sum() == count
        if count < 57:  # within one of the exact share
            assert np.abs(found - np.array(SIZES) * count / 61).max() < 1
        assert (found < np.array(SIZES)).all() or count > 57, "a class has no image left"
        if count != 60:
            assert found.tolist() == expected


def test_the_choice_depends_on_the_seed_and_not_on_the_numbers_of_the_classes():
    labels = classes()
    chosen = [shown(split_held_out(numbered(one), 9, seed)[1].images) for one in (None, labels) for seed in (0, 1)]
    assert len({tuple(one) for one in chosen}) == 4
    assert shown(split_held_out(numbered(3 - labels), 9, 0)[1].images) == chosen[2]
    again = split_held_out(numbered(labels), 9, 0)[1]
    assert shown(again.images) == chosen[2]


def test_every_image_is_held_out_equally_often():
    counts = np.zeros(20)
    for seed in range(500):
        counts[held_out_numbers(None, 20, 5, seed)] += 1
    # A binomial of 500 draws with p = 1/4 has a standard deviation of 9.7.
    assert np.abs(counts - 125).max() < 4 * 9.7


def test_the_choice_is_what_it_was():
    """A run that goes on, and an evaluation years later, must find the same images."""
    assert held_out_numbers(None, 1000, 8, 0).tolist() == GOLDEN[0]
    assert held_out_numbers(np.arange(1000) % 3, 1000, 8, 0).tolist() == GOLDEN[1]


GOLDEN = ([293, 515, 517, 683, 721, 865, 899, 971], [102, 160, 268, 564, 618, 715, 773, 812])


def test_no_held_out_image_is_a_training_example_over_an_epoch():
    training, held_out = split_held_out(numbered(classes()), 9, seed=5)
    examples = Examples(training, seed=0, flip=True)
    seen = [number for first in range(0, 104, 8) for number in shown(examples.take(first, 8)[0])]
    assert set(seen[:52]) == set(range(61)) - set(shown(held_out.images)) and len(seen) == 104


def test_stored_images_split_as_those_in_memory_do_and_replace_broken_ones_by_their_own_kind(folder):
    stored = open_dataset(folder, classes=True, in_memory=False)
    training, held_out = split_held_out(stored, 8, seed=2)  # which leaves the broken one to the training
    numbers = held_out_numbers(stored.labels.numpy(), 40, 8, 2).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images, labels = held_out.batch(torch.arange(8))
        examples = Examples(training, seed=0)
        parts = [examples.take(first, 8) for first in range(0, 32, 8)]
        examples.close()
    assert shown(images) == [5 * number for number in numbers] and 10 not in numbers
    assert labels.tolist() == [int(number >= 25) for number in numbers]
    seen = [value // 5 for batch, _ in parts for value in shown(batch)]
    kept = [number for number in range(40) if number not in numbers]
    after = kept[kept.index(10) + 1]  # in the place of the broken one
    assert sorted(seen) == sorted([*(number for number in kept if number != 10), after])
    assert [label for _, batch in parts for label in batch.tolist()] == [int(number >= 25) for number in seen]
    assert training.skipped == ["cat/10.png"] and held_out.skipped == []
    assert len({training.digest, held_out.digest, stored.digest}) == 3


def test_the_next_readable_image_is_never_a_held_out_one(folder):
    stored = open_dataset(folder, in_memory=False)
    chosen = {seed: held_out_numbers(None, 40, 8, seed) for seed in range(99)}
    seed = next(seed for seed, numbers in chosen.items() if 11 in numbers and 10 not in numbers)
    training, _ = split_held_out(stored, 8, seed)
    numbers = held_out_numbers(None, 40, 8, seed)
    place = 10 - int((numbers < 10).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (value,) = shown(training.batch(torch.tensor([place]))[0])
    assert value // 5 not in numbers and value // 5 > 11


def test_what_is_recorded_gives_the_same_images_later(folder):
    whole = numbered(classes())
    training, held_out = split_held_out(whole, 0.1, seed=7)
    said = training.recorded()
    assert (said["data"], said["count"], said["digest"]) == ("numbers", 61, whole.digest)
    assert said["held_out"].keys() == {"count", "seed", "chosen"} and said["held_out"]["count"] == 6
    assert held_out.recorded().keys() == whole.recorded().keys() == {"data", "count", "digest"}
    again = split_as_recorded(whole, said["held_out"])
    assert torch.equal(again[1].images, held_out.images) and again[0].held_out == training.held_out
    with pytest.raises(InputError, match="which images they were is unknown"):
        split_as_recorded(load_dataset("mnist5k"), said["held_out"])
    with pytest.raises(InputError, match="which images they were is unknown"):
        split_as_recorded(dataclasses.replace(whole, labels=None), said["held_out"])
    for damaged in (None, [], {"count": 6}, {"count": True, "seed": 7}, {"count": "6", "seed": 7}):
        with pytest.raises(InputError, match="expected its count and seed"):
            split_as_recorded(whole, damaged)


def test_a_split_that_leaves_nothing_is_refused():
    for amount in (61, 1000, 0.999):
        with pytest.raises(InputError, match="leaves none to train on"):
            split_held_out(numbered(), amount)
    for amount in (0, -1, 1.5, 0.0, True, "5"):
        with pytest.raises(InputError, match="expected a number of images"):
            split_held_out(numbered(), amount)
