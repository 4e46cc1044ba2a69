"""How the suite is thinned: every pair of values occurs, the reference keeps every case, and all cases can be run."""

import itertools

import pytest
from support.pairwise import pairwise

pytest_plugins = ["pytester"]


def pairs_of(rows):
    columns = range(len(rows[0]))
    return {(i, row[i], j, row[j]) for row in rows for i, j in itertools.combinations(columns, 2)}


@pytest.mark.parametrize("sizes", [(3,), (3, 4), (2, 3, 4), (3, 3, 3, 3), (4, 1, 2, 5, 2)], ids=str)
def test_every_pair_of_values_occurs_in_few_rows(sizes):
    rows = list(itertools.product(*map(range, sizes)))
    chosen = pairwise(rows)
    assert chosen == sorted(set(chosen))
    few = [rows[i] for i in chosen]
    assert pairs_of(few) == pairs_of(rows) and {row[0] for row in few} == set(range(sizes[0]))
    *_, second, largest = sorted((1, *sizes))
    assert second * largest <= len(few) <= 1.8 * second * largest


def test_pairs_that_no_row_has_are_not_asked_for():
    rows = [row for row in itertools.product(range(3), repeat=3) if row[0] != row[1]]
    few = [rows[i] for i in pairwise(rows)]
    assert pairs_of(few) == pairs_of(rows) and len(few) < len(rows)


def test_the_same_rows_give_the_same_choice_and_none_give_none():
    rows = list(itertools.product("abc", "de", "fgh"))
    assert pairwise(rows) == pairwise(list(rows))
    assert pairwise([]) == []


SUITE = """
import pytest

@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param

@pytest.mark.pairwise
@pytest.mark.parametrize("a", [0, False, 1])
@pytest.mark.parametrize("b", [[1], [2], [3]])
@pytest.mark.parametrize("c", range(3))
def test_product(a, b, c, backend):
    pass

@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("c", range(3))
def test_whole(a, b, c):
    pass
"""


@pytest.fixture
def suite(pytester, request):
    """A small suite under the hooks of ours."""
    pytester.makeconftest((request.config.rootpath / "tests" / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n    pairwise: thinned\n    exhaustive: left out\n")
    pytester.makepyfile(test_small=SUITE)
    return pytester


def counts(result):
    outcome = result.parseoutcomes()
    return outcome.get("passed", 0), outcome.get("deselected", 0)


def test_the_reference_keeps_its_product_and_the_rest_can_be_asked_for(suite):
    kept, left_out = counts(suite.runpytest())
    assert kept + left_out == 2 * 27 + 27
    assert 27 + 27 + 9 <= kept <= 27 + 27 + 13
    assert counts(suite.runpytest("--exhaustive")) == (2 * 27 + 27, 0)
    assert counts(suite.runpytest("-m", "exhaustive")) == (left_out, kept)
    assert counts(suite.runpytest("-k", "reference")) == (27, 54)
    listed = suite.runpytest("-m", "exhaustive", "--collect-only", "-q").outlines
    name = next(line for line in listed if "::" in line)
    assert counts(suite.runpytest(name)) == (1, 0), "a case that is named runs"
