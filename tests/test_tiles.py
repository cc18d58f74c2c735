# SPDX-License-Identifier: Apache-2.0
"""Tiles exhaustively on small batches, each against counting single elements."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from flora_dist.core.tiles import (
    Cuts,
    Grid,
    MessageSlots,
    Tile,
    find_cuts,
    find_shared_cuts,
    split,
    tiles_of_span,
)

SIZES = list(itertools.product((1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 5)))
"""E, N, M."""


def _elements(tile: Tile, rows: int, columns: int) -> Iterator[int]:
    """Flat indices of a tile in a row-major batch, in the tile's own order."""
    ranges = (range(*tile.matrices), range(*tile.rows), range(*tile.columns))
    for matrix, row, column in itertools.product(*ranges):
        yield (matrix * rows + row) * columns + column


def _all_elements(tiles: Iterable[Tile], rows: int, columns: int) -> list[int]:
    return [index for tile in tiles for index in _elements(tile, rows, columns)]


def _span(start: int, stop: int, rows: int, columns: int) -> tuple[Tile, ...]:
    return tiles_of_span(start, stop, num_rows=rows, num_columns=columns)


@pytest.mark.parametrize(("matrices", "rows", "columns"), SIZES)
def test_the_tiles_of_every_span_are_its_elements_in_memory_order(
    matrices: int, rows: int, columns: int
) -> None:
    size = matrices * rows * columns
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        tiles = _span(start, stop, rows, columns)
        assert _all_elements(tiles, rows, columns) == list(range(start, stop))
        assert len(tiles) <= 5
        assert all(tile.matrices[1] <= matrices for tile in tiles)
        assert all(tile.rows[1] <= rows and tile.columns[1] <= columns for tile in tiles)


def test_five_tiles_is_what_a_span_can_need() -> None:
    counts = Counter(
        len(_span(start, stop, 3, 5))
        for start, stop in itertools.combinations_with_replacement(range(61), 2)
    )
    assert set(counts) == {0, 1, 2, 3, 4, 5}


def test_neighbouring_spans_share_no_element() -> None:
    for cut in range(31):
        left, right = _span(0, cut, 3, 5), _span(cut, 30, 3, 5)
        assert _all_elements([*left, *right], 3, 5) == list(range(30))


@pytest.mark.parametrize(("start", "stop"), [(3, 2), (-1, 4)])
def test_a_span_that_runs_backwards_or_below_zero_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"span.*got \[{start}, {stop}\).*Pass 0 <= start"):
        _span(start, stop, 4, 4)


@pytest.mark.parametrize("place", ["matrices", "rows", "columns"])
@pytest.mark.parametrize("interval", [(2, 2), (3, 2), (-1, 2)])
def test_an_empty_or_negative_tile_is_refused(place: str, interval: tuple[int, int]) -> None:
    box = {"matrices": (0, 1), "rows": (0, 1), "columns": (0, 1), place: interval}
    with pytest.raises(ValueError, match=r"non-empty intervals.*Leave an empty share out"):
        Tile(**box)


def test_sizes_and_blocks_are_counted_element_by_element() -> None:
    for first, last in itertools.combinations(range(12), 2):
        tile = Tile(matrices=(1, 3), rows=(2, 5), columns=(first, last))
        assert tile.sizes == (2, 3, last - first)
        assert tile.num_elements == 6 * (last - first)
        for block in (1, 2, 4, 8, 16):
            touched = sorted({column // block for column in range(first, last)})
            assert tile.blocks(block) == (touched[0], touched[-1] + 1)
            assert tile.num_blocks(block) == 6 * len(touched)
            for num_columns in range(last, 13):
                cut = [
                    k
                    for k in touched
                    if not set(range(k * block, min((k + 1) * block, num_columns)))
                    <= set(range(first, last))
                ]
                assert list(tile.cut_blocks(block, num_columns)) == cut


def test_split_gives_the_same_elements_in_order_and_at_most_so_many() -> None:
    boxes = [(0, 1), (1, 3), (0, 3)]
    for matrices, rows, columns in itertools.product(boxes, boxes, boxes):
        tile = Tile(matrices=matrices, rows=rows, columns=columns)
        for limit in range(1, 30):
            pieces = list(split(tile, max_elements=limit))
            assert _all_elements(pieces, 3, 3) == list(_elements(tile, 3, 3))
            assert all(piece.columns == columns for piece in pieces)
            # a row is never cut, so one row may exceed the limit
            allowed = max(limit, tile.sizes[2])
            assert all(piece.num_elements <= allowed for piece in pieces)
            if tile.num_elements <= limit:
                assert pieces == [tile]


def test_split_does_not_cut_finer_than_it_must() -> None:
    tile = Tile(matrices=(0, 4), rows=(0, 6), columns=(0, 5))
    assert len(list(split(tile, max_elements=60))) == 2  # two matrices each
    assert len(list(split(tile, max_elements=30))) == 4
    assert len(list(split(tile, max_elements=29))) == 8  # five rows and one, per matrix
    assert len(list(split(tile, max_elements=1))) == 24


def test_slots_number_a_union_of_intervals_in_order() -> None:
    dealer = random.Random(3)
    for _ in range(300):
        starts = [dealer.randrange(30) for _ in range(dealer.randrange(6))]
        intervals = [(start, start + dealer.randrange(1, 6)) for start in starts]
        members = sorted({i for start, stop in intervals for i in range(start, stop)})
        slots = MessageSlots(intervals)
        assert len(slots) == len(members)
        assert [slots.at(index) for index in members] == list(range(len(members)))
        listed = slots.intervals()
        assert [i for start, stop in listed for i in range(start, stop)] == members
        assert all(one[1] < other[0] for one, other in itertools.pairwise(listed))
        for outside in set(range(-1, 40)) - set(members):
            with pytest.raises(AssertionError, match="has no slot"):
                slots.at(outside)


def _shares(
    matrices: int, rows: int, columns: int, dealer: random.Random
) -> Iterator[list[tuple[Tile, ...]]]:
    """Ways to deal a batch to ranks: flat spans, rows, and columns."""
    size = matrices * rows * columns
    for _ in range(6):
        cuts = sorted(dealer.choices(range(size + 1), k=dealer.randrange(4)))
        ends = [0, *cuts, size]
        yield [_span(a, b, rows, columns) for a, b in itertools.pairwise(ends)]
    for cut in range(1, rows):
        yield [
            (Tile(matrices=(0, matrices), rows=part, columns=(0, columns)),)
            for part in ((0, cut), (cut, rows))
        ]
    for cut in range(1, columns):
        yield [
            (Tile(matrices=(0, matrices), rows=(0, rows), columns=part),)
            for part in ((0, cut), (cut, columns))
        ]
    for width in range(1, columns):  # cut blocks side by side
        starts = range(0, columns, width)
        yield [
            (Tile(matrices=(0, matrices), rows=(0, rows), columns=(a, min(a + width, columns))),)
            for a in starts
        ]


@pytest.mark.parametrize("block", [1, 2, 4, 8])
@pytest.mark.parametrize(("matrices", "rows", "columns"), [(1, 4, 7), (3, 2, 8), (2, 3, 10)])
def test_cuts_are_the_rows_and_blocks_that_no_rank_holds_whole(
    matrices: int, rows: int, columns: int, block: int
) -> None:
    lines = matrices * rows
    for shares in _shares(matrices, rows, columns, random.Random(block)):
        held: dict[str, Counter[tuple[int, ...]]] = {"rows": Counter(), "blocks": Counter()}
        for share in shares:
            # one rank's elements, tile after tile: a span holds a row in one tile or not at all
            places = [divmod(i, columns) for i in _all_elements(share, rows, columns)]
            held["rows"].update({(line,) for line, _ in places})
            held["blocks"].update({(line, column // block) for line, column in places})
        grid = Grid(num_matrices=matrices, num_rows=rows, num_columns=columns, block=block)
        cuts = find_cuts([tile for share in shares for tile in share], grid)
        cut_rows = sorted(line for (line,), count in held["rows"].items() if count > 1)
        assert [cuts.row_slot(line) for line in cut_rows] == list(range(len(cuts.rows)))
        cut_blocks = sorted((k, line) for (line, k), count in held["blocks"].items() if count > 1)
        slots = [cuts.block_slot(line, k) for k, line in cut_blocks]
        assert slots == list(range(len(cuts.blocks)))
        assert [divmod(index, lines) for index in cuts.blocks.indices()] == cut_blocks
        assert (cuts.rows_anywhere, cuts.blocks_anywhere) == (bool(cut_rows), bool(cut_blocks))


@pytest.mark.parametrize("block", [1, 2, 4, 8])
@pytest.mark.parametrize(("matrices", "rows", "columns"), [(1, 4, 7), (3, 2, 8), (2, 3, 10)])
def test_ranks_agree_on_the_cuts_they_share(
    matrices: int, rows: int, columns: int, block: int
) -> None:
    grid = Grid(num_matrices=matrices, num_rows=rows, num_columns=columns, block=block)
    dealer, size = random.Random(block), matrices * rows * columns
    for _ in range(50):
        ends = [0, *sorted(dealer.choices(range(size + 1), k=dealer.randrange(7))), size]
        owned = list(itertools.pairwise(ends))
        everywhere = find_cuts([t for a, b in owned for t in _span(a, b, rows, columns)], grid)
        each = [find_shared_cuts(owned, rank, grid) for rank in range(len(owned))]
        holders: dict[str, dict[int, set[int]]] = {"rows": {}, "blocks": {}}
        for rank, cuts in enumerate(each):
            assert cuts.rows_anywhere == everywhere.rows_anywhere
            assert cuts.blocks_anywhere == everywhere.blocks_anywhere
            assert len(cuts.rows) <= 2
            assert len(cuts.blocks) <= 2
            for kind, index in _indices(cuts):
                holders[kind].setdefault(index, set()).add(rank)
        # every cut row and block has holders, and each holder of a row names all the others
        assert sorted(holders["rows"]) == list(everywhere.rows.indices())
        assert sorted(holders["blocks"]) == list(everywhere.blocks.indices())
        for rank, cuts in enumerate(each):
            assert cuts.peers is not None
            named = {(index, peer.rank) for peer in cuts.peers for index in _at(cuts, peer.rows)}
            assert named == {
                (index, other)
                for index in cuts.rows.indices()
                for other in holders["rows"][index] - {rank}
            }
            for peer in cuts.peers:  # and both sides list them in one order
                other = next(p for p in each[peer.rank].peers or () if p.rank == rank)
                assert _at(cuts, peer.rows) == _at(each[peer.rank], other.rows)


@pytest.mark.parametrize(("rows", "columns"), [(1, 0), (5, 0), (0, 5)])
def test_a_parameter_without_elements_has_no_cuts(rows: int, columns: int) -> None:
    grid = Grid(num_matrices=1, num_rows=rows, num_columns=columns, block=4)
    for rank in range(3):
        cuts = find_shared_cuts([(0, 0)] * 3, rank, grid)
        assert (len(cuts.rows), len(cuts.blocks), cuts.peers) == (0, 0, ())


def _indices(cuts: Cuts) -> list[tuple[str, int]]:
    rows = [("rows", index) for index in cuts.rows.indices()]
    return rows + [("blocks", index) for index in cuts.blocks.indices()]


def _at(cuts: Cuts, places: Iterable[int]) -> list[int]:
    indices = list(cuts.rows.indices())
    return [indices[place] for place in places]


def test_a_rank_alone_with_pieces_of_rows_cuts_them_too() -> None:
    """Rows are cut by a tile that does not reach both ends, whoever holds the rest."""
    for columns, block in (((2, 8), 0), ((0, 6), 1), ((5, 6), 1)):
        tile = Tile(matrices=(0, 1), rows=(1, 3), columns=columns)
        grid = Grid(num_matrices=1, num_rows=4, num_columns=8, block=4)
        cuts = find_cuts([tile], grid)
        assert cuts.rows.intervals() == ((1, 3),)
        assert [divmod(i, 4) for i in cuts.blocks.indices()] == [(block, 1), (block, 2)]
