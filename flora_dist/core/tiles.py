# SPDX-License-Identifier: Apache-2.0
"""Boxes of a batch of matrices: the one way a rank's share of a parameter is described.

A parameter is a batch of E matrices of N rows and M columns (E = 1 unless it is 3-D; higher
dimensions are folded). Whatever a framework gives a rank is a short tuple of tiles:

    replicated (DDP)         one tile, everything
    rows (FSDP2 Shard(0))    one tile, some rows, every column; experts: some matrices, every row
    columns (TP)             one tile, every row, some columns
    flat span (ZeRO, FSDP1)  at most five tiles, since the span may cut its first and last row and
                             its first and last matrix

        . . . . a a a        a: tail of a row
        b b b b b b b        b: whole rows
        b b b b b b b
        c c . . . . .        c: head of a row

Standard library only, so that the planner runs without torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Matrices x rows x columns of a batch, each a half-open interval of global indices."""

    matrices: Interval
    rows: Interval
    columns: Interval

    def __post_init__(self) -> None:
        for start, stop in (self.matrices, self.rows, self.columns):
            if not 0 <= start < stop:
                raise ValueError(
                    f"a tile needs non-empty intervals from 0 up; got {self}. "
                    "Leave an empty share out instead."
                )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of matrices, rows and columns."""
        return (
            self.matrices[1] - self.matrices[0],
            self.rows[1] - self.rows[0],
            self.columns[1] - self.columns[0],
        )

    @property
    def num_elements(self) -> int:
        """Elements in the tile."""
        matrices, rows, columns = self.sizes
        return matrices * rows * columns

    def lines(self, num_rows: int) -> Iterator[Interval]:
        """Its rows, numbered e N + row through the batch, as runs in memory order."""
        if self.rows == (0, num_rows):
            yield self.matrices[0] * num_rows, self.matrices[1] * num_rows
            return
        for matrix in range(*self.matrices):
            yield matrix * num_rows + self.rows[0], matrix * num_rows + self.rows[1]

    def blocks(self, block: int) -> Interval:
        """Blocks of a row, ``block`` columns each from column 0, that the tile touches."""
        return self.columns[0] // block, -(-self.columns[1] // block)

    def cut_blocks(self, block: int, num_columns: int) -> tuple[int, ...]:
        """Blocks at the tile's edges of which it holds only a piece, in rows of ``num_columns``."""
        edges = {c // block for c in self.columns if c % block and c != num_columns}
        return tuple(sorted(edges))

    def num_blocks(self, block: int) -> int:
        """Blocks that the tile touches in all its rows."""
        matrices, rows, _ = self.sizes
        first, last = self.blocks(block)
        return matrices * rows * (last - first)


def tiles_of_span(start: int, stop: int, *, num_rows: int, num_columns: int) -> tuple[Tile, ...]:
    """Cut the flat span ``[start, stop)`` of a row-major batch into at most five tiles.

    Tiles come in memory order, so consecutive slices of the flat tensor fill them.

    >>> [t.sizes for t in tiles_of_span(4, 23, num_rows=5, num_columns=7)]
    [(1, 1, 3), (1, 2, 7), (1, 1, 2)]
    >>> [t.sizes for t in tiles_of_span(7, 35, num_rows=2, num_columns=7)]
    [(1, 1, 7), (1, 2, 7), (1, 1, 7)]
    """
    if not 0 <= start <= stop:
        raise ValueError(
            f"a span must not run backwards or below zero; got [{start}, {stop}). "
            "Pass 0 <= start <= stop."
        )
    tiles = []
    for (row_start, row_stop), columns in _cut(start, stop, num_columns):
        for matrices, rows in _cut(row_start, row_stop, num_rows):
            tiles.append(Tile(matrices=matrices, rows=rows, columns=columns))
    return tuple(tiles)


def _cut(start: int, stop: int, width: int) -> Iterator[tuple[Interval, Interval]]:
    """Cut ``[start, stop)`` at multiples of ``width``: (lines, places within a line) in order."""
    while start < stop:
        line, place = divmod(start, width)
        if place == 0 and stop - start >= width:  # whole lines, all of them at once
            lines = (line, stop // width)
            yield lines, (0, width)
            start = lines[1] * width
        else:  # the tail or head of one line
            end = min(stop, (line + 1) * width)
            yield (line, line + 1), (place, end - line * width)
            start = end


def split(tile: Tile, *, max_elements: int, unit: int = 1) -> Iterator[Tile]:
    """Cut a tile into smaller ones of at most ``max_elements``, in order.

    Rows stay together by ``unit``, of which a part has one at least.
    """
    _, rows, columns = tile.sizes
    if tile.num_elements <= max_elements:
        yield tile
        return
    step_rows = max(unit, min(rows, max_elements // columns) // unit * unit)
    step_matrices = max(1, max_elements // (rows * columns)) if step_rows >= rows else 1
    for matrix in range(tile.matrices[0], tile.matrices[1], step_matrices):
        for row in range(tile.rows[0], tile.rows[1], step_rows):
            yield Tile(
                matrices=(matrix, min(matrix + step_matrices, tile.matrices[1])),
                rows=(row, min(row + step_rows, tile.rows[1])),
                columns=tile.columns,
            )


class MessageSlots:
    """Places in a message for a sorted union of intervals, one place per index."""

    def __init__(self, intervals: Iterable[Interval]) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in sorted(intervals):
            if self._stops and start <= self._stops[-1]:
                self._stops[-1] = max(self._stops[-1], stop)
            else:
                self._starts.append(start)
                self._stops.append(stop)
        self._offsets = [0]
        for start, stop in zip(self._starts, self._stops, strict=True):
            self._offsets.append(self._offsets[-1] + stop - start)

    def __len__(self) -> int:
        return self._offsets[-1]

    def at(self, index: int) -> int:
        """The place of ``index``; consecutive indices of one interval have consecutive places.

        >>> slots = MessageSlots([(10, 12), (3, 5), (4, 6)])
        >>> len(slots), slots.at(3), slots.at(5), slots.at(11)
        (5, 0, 2, 4)
        """
        run = bisect_right(self._starts, index) - 1
        assert run >= 0, f"{index} has no slot"
        assert index < self._stops[run], f"{index} has no slot"
        return self._offsets[run] + index - self._starts[run]

    def intervals(self) -> tuple[Interval, ...]:
        """The disjoint intervals, ascending."""
        return tuple(zip(self._starts, self._stops, strict=True))

    def indices(self) -> Iterator[int]:
        """The indices that have a place, ascending."""
        for start, stop in self.intervals():
            yield from range(start, stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What another rank holds pieces of together with this one."""

    rank: int
    """Its place in the group."""
    rows: tuple[int, ...]
    """Places of shared rows among this rank's cut rows, ascending by row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """What several ranks hold pieces of: rows and blocks of one parameter.

    A row of matrix e is numbered e N + row; block k of it (e N + row) + k (E N): rows of one block
    column stay together, so that a column shard's cut blocks are one interval.
    """

    rows: MessageSlots
    blocks: MessageSlots
    num_lines: int
    """E N, the rows of all matrices."""
    rows_anywhere: bool
    """Whether any rank has a cut row; equal on all ranks."""
    blocks_anywhere: bool
    """Whether any rank has a cut block; equal on all ranks."""
    peers: tuple[Peer, ...] | None = None
    """Who shares this rank's cuts; None: ``rows`` and ``blocks`` are those of all ranks."""
    are_few: bool = False
    """At most one row for each boundary between two ranks: their elements may travel."""

    def row_slot(self, line: int) -> int:
        """Place of the row numbered ``line`` among the cut rows."""
        return self.rows.at(line)

    def block_slot(self, line: int, block: int) -> int:
        """Place of block ``block`` of the row numbered ``line`` among the cut blocks."""
        return self.blocks.at(block * self.num_lines + line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A batch of matrices cut in blocks."""

    num_matrices: int
    """E."""
    num_rows: int
    """N."""
    num_columns: int
    """M."""
    block: int
    """Columns per block; a row's last block may be shorter."""


def find_cuts(tiles: Iterable[Tile], grid: Grid) -> Cuts:
    """Rows and blocks that tiles cut: every rank's tiles of one parameter, in any order.

    >>> spans = [tiles_of_span(a, b, num_rows=4, num_columns=6) for a, b in ((0, 8), (8, 24))]
    >>> grid = Grid(num_matrices=1, num_rows=4, num_columns=6, block=4)
    >>> cuts = find_cuts([t for s in spans for t in s], grid)
    >>> len(cuts.rows), cuts.row_slot(1), len(cuts.blocks), cuts.block_slot(1, 0)
    (1, 0, 1, 0)
    """
    num_lines = grid.num_matrices * grid.num_rows
    rows: list[Interval] = []
    blocks: list[Interval] = []
    for tile in tiles:
        if tile.columns == (0, grid.num_columns):
            continue
        cut = tile.cut_blocks(grid.block, grid.num_columns)
        for matrix in range(*tile.matrices):
            lines = (matrix * grid.num_rows + tile.rows[0], matrix * grid.num_rows + tile.rows[1])
            rows.append(lines)
            blocks.extend((k * num_lines + lines[0], k * num_lines + lines[1]) for k in cut)
    return Cuts(
        rows=MessageSlots(rows),
        blocks=MessageSlots(blocks),
        num_lines=num_lines,
        rows_anywhere=bool(rows),
        blocks_anywhere=bool(blocks),
    )


def find_shared_cuts(owned: Sequence[Interval], rank: int, grid: Grid) -> Cuts:
    """Cuts of one rank's span of a row-major batch, and who shares them.

    A span has at most two cut rows and two cut blocks, whatever the number of ranks.

    Args:
        owned: each rank's span; empty if it owns nothing.
        rank: whose cuts.
        grid: the batch.

    >>> grid = Grid(num_matrices=1, num_rows=4, num_columns=6, block=4)
    >>> cuts = find_shared_cuts([(0, 8), (8, 11), (11, 24)], 0, grid)
    >>> len(cuts.rows), [(p.rank, p.rows) for p in cuts.peers]
    (1, [(1, (0,)), (2, (0,))])
    """
    mine = _cuts_of_span(owned[rank], grid)
    lines = set(mine.rows.indices())
    peers = []
    for other, (start, stop) in enumerate(owned):
        if other == rank or start == stop:
            continue
        touched = range(start // grid.num_columns, -(-stop // grid.num_columns))
        if not any(line in touched for line in lines):
            continue
        theirs = _cuts_of_span((start, stop), grid)
        shared_rows = sorted(lines.intersection(theirs.rows.indices()))
        if shared_rows:
            rows = tuple(mine.rows.at(index) for index in shared_rows)
            peers.append(Peer(rank=other, rows=rows))
    columns = [stop % grid.num_columns for start, stop in owned if start < stop]
    return replace(
        mine,
        rows_anywhere=any(columns),
        blocks_anywhere=any(column % grid.block for column in columns),
        peers=tuple(peers),
        are_few=True,
    )


def _cuts_of_span(span: Interval, grid: Grid) -> Cuts:
    tiles = tiles_of_span(*span, num_rows=grid.num_rows, num_columns=grid.num_columns)
    return find_cuts(tiles, grid)
