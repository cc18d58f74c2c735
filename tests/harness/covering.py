# SPDX-License-Identifier: Apache-2.0
"""Which cases of a product run by default: so many that every pair of two axes' values is met.

A mechanism breaks for one value (a layout) or for two together (a layout and a rule), hardly ever
for three and not for two of them. The other cases stay, marked ``slow``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest
from _pytest.mark import ParameterSet

Row = Mapping[str, Hashable]
"""A case by the value that it has on each axis; an axis that means nothing to it is left out."""


def pairs_of(row: Row) -> set[frozenset[tuple[str, Hashable]]]:
    """The values that a row meets, each alone and each with each other."""
    values = list(row.items())
    return {frozenset(met) for size in (1, 2) for met in combinations(values, size)}


def covering(rows: Sequence[Row]) -> list[int]:
    """The numbers of some rows that meet each pair which any row meets.

    The row with the most new pairs comes first, and of equals the first one; so the same rows give
    the same answer everywhere. What later rows made superfluous is dropped at the end.

    Example:
        >>> from itertools import product
        >>> rows = [dict(zip("abc", values)) for values in product((0, 1), repeat=3)]
        >>> covering(rows)
        [1, 2, 4, 7]
    """
    met_by = [pairs_of(row) for row in rows]
    left = set().union(*met_by)
    chosen: list[int] = []
    while left:
        best = max(range(len(rows)), key=lambda number: (len(met_by[number] & left), -number))
        chosen.append(best)
        left -= met_by[best]
    for number in sorted(chosen, reverse=True):
        others = set().union(*(met_by[other] for other in chosen if other != number))
        if met_by[number] <= others:
            chosen.remove(number)
    return sorted(chosen)


def by_default(cases: Iterable[tuple[Any, ...]], axes: Callable[..., Row]) -> list[ParameterSet]:
    """Each case as ``pytest.param``, ``slow`` where a covering does without it.

    ``axes`` gets a case's values and says where it lies.
    """
    listed = list(cases)
    chosen = set(covering([axes(*case) for case in listed]))
    return [
        pytest.param(*case, marks=() if number in chosen else pytest.mark.slow)
        for number, case in enumerate(listed)
    ]


def kept(cases: Sequence[ParameterSet]) -> list[tuple[Any, ...]]:
    """The values of those that run by default."""
    return [case.values for case in cases if not case.marks]
