# SPDX-License-Identifier: Apache-2.0
"""A batch as tables of int64 on its device, written once when a step is planned.

Kernels find a tensor by its address, so that one launch steps all parameters of a batch. The order
of numbers stands in ``access.py``, ``settle.py`` and ``vector.py``.

Shape suffixes: E matrices of a member, N rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.core.step.batch import Batch
from flora_dist.core.step.pieces import Piece, build_pieces
from flora_dist.core.step.views import as_batches
from flora_dist.core.tiles import Interval
from flora_dist.kernels.gpu.access import STRIP_FIRST, STRIP_SLOT, STRIP_WIDTH

ALIGNMENT = 16
"""Bytes of the widest load."""
CUT_ROWS = 32
"""Cut rows that are measured by one program."""
_FIRST, _WIDTH, _SLOT = STRIP_FIRST.value, STRIP_WIDTH.value, STRIP_SLOT.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Strips:
    """Rows of a batch: those that are whole, or those that are cut."""

    table: Tensor
    """(strips, STRIP_NUMBERS): the rows of one matrix that lie together."""
    count: int
    longest: int
    """Rows of the longest strip."""
    are_cut: bool
    is_aligned: bool
    """Whether weights, momenta and their rows begin at multiples of 16 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """A batch of matrices."""

    whole: Strips
    cut: Strips
    matrices: Tensor
    """(matrices, MATRIX_NUMBERS): those of the batch that are here."""
    num_matrices: int
    num_rows: int
    """Of all strips."""
    num_tiles: int
    """Of ``tile_rows`` rows each, or ``CUT_ROWS`` of cut ones, of all strips."""
    columns: Interval
    """First column that is here of any row, and how many are."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the batch is here."""
        return self.whole.count + self.cut.count == 0


def make_tables(batch: Batch, tile_rows: int) -> Tables:
    """Write down where the rows of a batch of matrices lie.

    ``tile_rows``: whole rows that are measured by one program.
    """
    shape = batch.geometry.shape
    weights = [as_batches(each.weight, each.tiles, shape=shape) for each in batch.members]
    pieces = build_pieces(batch, weights)
    strips: list[list[int]] = []
    rows, tiles = 0, 0
    for piece in pieces:
        together = tile_rows if piece.cut_rows is None else CUT_ROWS
        for strip, rest in _strips(batch, piece):
            strips.append([*strip, rows, tiles, *rest])
            rows += strip[7]
            tiles += -(-strip[7] // together)
    whole = [strip for strip in strips if strip[_SLOT] < 0]
    cut = [strip for strip in strips if strip[_SLOT] >= 0]
    matrices = list(_matrices(batch, strips, tile_rows))
    first, width = 0, batch.geometry.num_columns
    if not whole and len(batch.members[0].tiles) == 1:  # a column shard
        first, width = cut[0][_FIRST], cut[0][_WIDTH]
    return Tables(
        whole=_as_strips(batch, whole, are_cut=False),
        cut=_as_strips(batch, cut, are_cut=True),
        matrices=_as_table(matrices, batch.device),
        num_matrices=len(matrices),
        num_rows=rows,
        num_tiles=tiles,
        columns=(first, width),
    )


def make_vector_table(batch: Batch) -> Tensor:
    """The same of a batch of vectors: (members, VECTOR_NUMBERS)."""
    rows = []
    for index, member in enumerate(batch.members):
        momentum = member.local.get("momentum")
        rows.append(
            [
                member.weight.data_ptr(),
                0 if momentum is None else momentum.data_ptr(),
                member.local["second"].data_ptr(),
                index,
            ]
        )
    return _as_table(rows, batch.device)


def is_aligned(addresses: Sequence[int]) -> bool:
    """Whether all are multiples of the widest load."""
    return all(address % ALIGNMENT == 0 for address in addresses)


def _as_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _as_strips(batch: Batch, strips: Sequence[Sequence[int]], *, are_cut: bool) -> Strips:
    return Strips(
        table=_as_table(strips, batch.device),
        count=len(strips),
        longest=max((strip[7] for strip in strips), default=0),
        are_cut=are_cut,
        is_aligned=_is_aligned(batch, strips),
    )


def _strips(batch: Batch, piece: Piece) -> Iterator[tuple[list[int], list[int]]]:
    """The numbers of each strip that follow from the piece: before those of places, and behind."""
    tile, size = piece.tile, batch.geometry
    members = range(*piece.members.indices(len(batch.members)))
    each, rows, width = tile.sizes
    _, source = batch.sources[piece.source]
    first_matrix, first_row = ((part.start or 0) for part in piece.window)
    for place, member in enumerate(members):
        weight, row = piece.weights[place], piece.rows[place]
        assert weight.stride(2) == 1, weight.stride()
        assert rows == 1 or weight.stride(1) == width, weight.stride()
        momentum = piece.momenta[place] if piece.momenta else None
        for matrix in range(each):
            before = ((first_matrix + matrix) * source[1] + first_row) * source[2]
            yield (
                [
                    weight[matrix].data_ptr(),
                    0 if momentum is None else momentum[matrix].data_ptr(),
                    row[matrix].data_ptr(),
                    member,
                    before,
                    piece.place.matrices.start + place * each + matrix,
                    (tile.matrices[0] + matrix) * size.num_rows + tile.rows[0],
                    rows,
                    0 if momentum is None else momentum.stride(1),
                ],
                [member * len(batch.sources) + piece.source, *_cuts(batch, piece, member)],
            )


def _cuts(batch: Batch, piece: Piece, member: int) -> tuple[int, int, int, int, int]:
    """First column and width, places of cut rows and of the two blocks that may be; below 0: none.

    Cut rows of a piece are of one matrix of each member.
    """
    first, last = piece.tile.columns
    if piece.cut_rows is None:
        return first, last - first, -1, -1, -1
    cuts, slots = batch.members[0].cuts, [-1, -1]
    for edge in piece.edges if batch.sketches is not None else ():
        slots[min(edge.place, 1)] = member * len(cuts.blocks) + edge.slots.start
    return first, last - first, member * len(cuts.rows) + piece.cut_rows.start, *slots


def _matrices(batch: Batch, strips: Sequence[Sequence[int]], tile_rows: int) -> Iterator[list[int]]:
    """Of each: first and last tile, C, the place in sums over ranks, rows, last norm, start."""
    start, width = 0, batch.geometry.num_columns
    for matrix in range(len(batch.members) * batch.matrices_here):
        stop = start
        while stop < len(strips) and strips[stop][5] == matrix:
            stop += 1
        own = strips[start:stop]
        member, place = divmod(matrix, batch.matrices_here)
        local = batch.members[member].local
        column, kept = local["column"].view(-1, width), (local.get("norm"), local.get("start"))
        last = 0
        if own:
            together = tile_rows if own[-1][_SLOT] < 0 else CUT_ROWS
            last = own[-1][10] - (-own[-1][7] // together)
        yield [
            own[0][10] if own else 0,
            last,
            column[place].data_ptr(),
            batch.held.start + matrix,
            own[0][9] if own else 0,
            sum(strip[7] for strip in own),
            *(0 if each is None else each.view(-1)[place].data_ptr() for each in kept),
        ]
        start = stop
    assert start == len(strips), "a matrix's strips must follow each other"


def _is_aligned(batch: Batch, strips: Sequence[Sequence[int]]) -> bool:
    """Rows are: their first element, and the step from one to the next."""
    first = batch.members[0]
    steps = [first.weight.element_size() * strip[_WIDTH] for strip in strips]
    # Kernels are told that first columns and widths of cut rows are multiples of 16.
    steps += [strip[place] for strip in strips for place in (_FIRST, _WIDTH) if strip[_SLOT] >= 0]
    momentum = first.local.get("momentum")
    has_records = momentum is not None and momentum.dtype == torch.uint8
    if momentum is not None and not has_records:
        steps.extend(momentum.element_size() * strip[8] for strip in strips)
    # Records begin at any byte, and are read byte by byte.
    addresses = [number for strip in strips for number in strip[: 1 if has_records else 2]]
    offsets = [8 * strip[4] for strip in strips]  # read as multiples of 8 elements
    return is_aligned([*steps, *addresses]) and all(o % 64 == 0 for o in offsets)
