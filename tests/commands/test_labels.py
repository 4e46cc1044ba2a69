"""--labels means what a reader of the class names expects, and what it was understood as is said."""

import pytest
import torch

from ddpm_fast.commands.labels import Turns, describe_classes, parse_labels
from ddpm_fast.errors import InputError

ANIMALS = ["cat", "dog", "hen"]


def test_names_and_indices_are_taken_in_turn():
    assert list(parse_labels(None, 5, 3, ANIMALS)) == [0, 1, 2, 0, 1]
    assert list(parse_labels("hen", 2, 3, ANIMALS)) == [2, 2]
    assert list(parse_labels("0, dog", 3, 3, ANIMALS)) == [0, 1, 0]
    assert parse_labels("none", 3, 3, ANIMALS) is None
    assert parse_labels(None, 3, 0, None) is None
    assert list(parse_labels("2,0", 3, 3, None)) == [2, 0, 2]


def test_a_sample_has_the_same_class_in_a_set_that_is_continued():
    whole = parse_labels("hen,cat", 7, 3, ANIMALS)
    assert list(whole) == [*parse_labels("hen,cat", 3, 3, ANIMALS), *parse_labels("hen,cat", 4, 3, ANIMALS, 3)]
    assert list(parse_labels(None, 4, 3, ANIMALS, 2)) == [2, 0, 1, 2]


def test_the_classes_of_very_many_samples_take_no_memory():
    many = parse_labels(None, 10**15, 3, ANIMALS, 1)
    assert len(many) == 10**15 and many[10**15 - 1] == 10**15 % 3 and many[-1] == 10**15 % 3
    assert many[999_999_999_998:1_000_000_000_001] == [i % 3 for i in range(999_999_999_999, 1_000_000_000_002)]
    assert many.distinct == [1, 2, 0] and many.chosen == [0, 1, 2]
    with pytest.raises(IndexError):
        many[10**15]


def test_all_classes_as_a_tensor_are_those_of_the_sequence():
    turns = parse_labels("hen,cat", 7, 3, ANIMALS, 3)
    assert turns.tensor().dtype == torch.int64 and turns.tensor().tolist() == [0, 2, 0, 2, 0, 2, 0] == list(turns)


def test_a_name_that_is_a_number_is_the_name():
    assert list(parse_labels("1,2,3", 3, 3, ["1", "2", "3"])) == [0, 1, 2]
    assert list(parse_labels("10", 1, 3, ["1", "2", "10"])) == [2]
    assert list(parse_labels("1", 1, 3, ["cat", "dog", "1"])) == [2]


@pytest.mark.parametrize(("text", "names"), [("0", ["1", "2", "3"]), ("2,0", ["1", "2", "3"]), ("1", ["7", "cat"])])
def test_an_index_that_could_be_meant_as_a_name_is_refused(text, names):
    with pytest.raises(InputError, match="some classes are named by numbers; give names: "):
        parse_labels(text, 1, len(names), names)


def test_indices_are_taken_where_the_numbers_among_the_names_are_their_own_indices():
    assert list(parse_labels("7", 1, 10, [str(i) for i in range(10)])) == [7]
    assert list(parse_labels("0", 1, 3, ["cat", "1", "hen"])) == [0]


def test_names_with_commas_and_a_class_called_none():
    assert list(parse_labels("cats, dogs", 1, 2, ["hens", "cats, dogs"])) == [1]
    assert list(parse_labels("none", 1, 2, ["some", "none"])) == [1]


def test_an_unknown_class_is_refused_with_the_names():
    with pytest.raises(InputError, match=r"cow is no class of this model; it has 0\.\.2 or cat, dog, hen"):
        parse_labels("cow", 1, 3, ANIMALS)
    with pytest.raises(InputError, match="unconditional"):
        parse_labels("1", 1, 0, None)


def test_the_chosen_classes_are_said_by_name_and_index():
    assert describe_classes(Turns([0, 1, 0], 3), ["1", "2", "3"]) == "classes: 1 (0), 2 (1)"
    assert describe_classes(Turns([4, 2], 9), None) == "classes: 4, 2"
    assert describe_classes(None, ANIMALS) == "classes: none"
    assert describe_classes(Turns(range(13), 13), None).endswith("8, 9 and 3 more")
    assert describe_classes(Turns([0], 1), ["\x1b[31mred"]) == r"classes: \x1b[31mred (0)"
