# SPDX-License-Identifier: Apache-2.0
"""A covering meets every pair that there is, with few cases and always the same ones."""

from __future__ import annotations

import random
from itertools import combinations, product
from typing import Any

import pytest

from tests.harness.covering import Row, by_default, covering, kept


def product_of(*sizes: int) -> list[Row]:
    axes = "abcdefgh"[: len(sizes)]
    return [dict(zip(axes, values, strict=True)) for values in product(*map(range, sizes))]


def random_rows(seed: int) -> list[Row]:
    """Some cases of a product; not every axis means something to each of them."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, 5) for _ in range(rng.randint(2, 6))]
    rows = rng.sample(product_of(*sizes), k=min(60, len(product_of(*sizes))))
    return [{axis: value for axis, value in row.items() if rng.random() < 0.9} for row in rows]


def unmet(rows: list[Row], chosen: list[int]) -> list[Any]:
    """Pairs that a row meets and no chosen one does, found by looking at each."""
    wanted = {pair for row in rows for size in (1, 2) for pair in combinations(row.items(), size)}
    return [
        pair
        for pair in wanted
        if not any(all(rows[n].get(a, ...) == v for a, v in pair) for n in chosen)
    ]


TABLES = [*[product_of(*sizes) for sizes in ((4,), (3, 4), (4, 4, 4, 4), (17, 4, 3, 2, 2))]]
TABLES += [random_rows(seed) for seed in range(30)]


@pytest.mark.parametrize("rows", TABLES, ids=lambda rows: str(len(rows)))
def test_every_pair_is_met_and_no_case_is_superfluous(rows: list[Row]) -> None:
    chosen = covering(rows)
    assert unmet(rows, chosen) == []
    for number in chosen:
        assert unmet(rows, [other for other in chosen if other != number])


@pytest.mark.parametrize(
    ("sizes", "bound"), [((4,), 4), ((3, 4), 12), ((4, 4, 4, 4), 24), ((17, 4, 3, 2, 2), 75)]
)
def test_the_number_is_close_to_that_of_the_two_largest_axes(
    sizes: tuple[int, ...], bound: int
) -> None:
    # No covering can do with less than the product of the two largest: 4, 12, 16 and 68.
    assert len(covering(product_of(*sizes))) <= bound


def test_what_is_not_kept_is_slow_and_nothing_is_lost() -> None:
    cases = list(product("xyz", range(4), "uv"))
    marked = by_default(cases, lambda a, b, c: {"a": a, "b": b, "c": c})
    assert [case.values for case in marked] == cases
    assert len(kept(marked)) == 12
    assert {mark.name for case in marked for mark in case.marks} == {"slow"}
