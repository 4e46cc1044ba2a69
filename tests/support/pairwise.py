"""Thins the product of a test's parameters to rows in which every pair of two parameters' values still occurs.

    @pytest.mark.pairwise
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("noise", DTYPES)
    @pytest.mark.parametrize("x0", DTYPES)
    def test_q_sample(x0, noise, layout, backend):

runs the whole product on the backend `reference`, and on each other backend those rows. The cases left out carry the
marker `exhaustive`: `pytest --exhaustive` runs all cases, `pytest -m exhaustive` these alone. A test in which a single
combination of three values has once been wrong has no such mark: it keeps its whole product everywhere.

Nearly every fault that depends on parameters depends on one value or on the combination of two (a dtype with a memory
format). For such faults the rows chosen here are as good as the whole product, which grows with every parameter.
"""

import itertools
from collections.abc import Hashable, Sequence

import pytest

BACKEND_PARAMETERS = ("backend", "host_backend")


def _pairs(row: Sequence[Hashable]) -> set[tuple]:
    """What a row covers: each value in its column, and each pair of values in their two columns."""
    cells = list(enumerate(row))
    return {(cell,) for cell in cells} | set(itertools.combinations(cells, 2))


def pairwise(rows: Sequence[Sequence[Hashable]]) -> list[int]:
    """Chooses rows that together hold every pair of values that occurs in two columns of some row.

    Always takes the row that adds the most pairs, of equals the first: the same rows give the same choice. A product of
    columns with at most n values each is thinned to about n^2 rows.

    Args:
        rows: one hashable value per parameter, all rows of the same length.

    Returns:
        The indices of the chosen rows, ascending.
    """
    covers = [_pairs(row) for row in rows]
    missing = set().union(*covers)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(covers[i] & missing))
        missing -= covers[best]
        chosen.append(best)
    return sorted(chosen)


def _cell(value: object) -> Hashable:
    # 0, 0.0 and False are one key of a dict, and three values of a parameter.
    return type(value), value if isinstance(value, Hashable) else repr(value)


def leave_pairs(items: Sequence[pytest.Item]) -> None:
    """Gives the marker `exhaustive` to the cases of tests marked `pairwise` that are not among those rows."""
    products: dict[tuple, list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("pairwise") is None:
            continue
        parameters = item.callspec.params
        backend = next((parameters[name] for name in BACKEND_PARAMETERS if name in parameters), None)
        if backend != "reference":
            products.setdefault((item.nodeid.partition("[")[0], backend), []).append(item)
    for cases in products.values():
        rows = [tuple(map(_cell, case.callspec.params.values())) for case in cases]
        chosen = set(pairwise(rows))
        for i, case in enumerate(cases):
            if i not in chosen:
                case.add_marker("exhaustive")
