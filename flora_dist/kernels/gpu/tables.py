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

ALIGNMENT = 16
"""Bytes of the widest load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """A batch of matrices."""

    strips: Tensor
    """(strips, STRIP_NUMBERS): the rows of one matrix that lie together."""
    matrices: Tensor
    """(matrices, MATRIX_NUMBERS): those of the batch that are here."""
    num_strips: int
    num_matrices: int
    longest: int
    """Rows of the longest strip."""
    num_rows: int
    """Of all strips."""
    num_tiles: int
    """Of ``tile_rows`` rows each, of all strips."""
    is_aligned: bool
    """Whether weights, momenta and their rows begin at multiples of 16 bytes."""


def make_tables(batch: Batch, tile_rows: int) -> Tables:
    """Write down where the rows of a batch of matrices lie.

    ``tile_rows``: rows that are measured by one program.
    """
    shape = batch.geometry.shape
    weights = [as_batches(each.weight, each.tiles, shape=shape) for each in batch.members]
    pieces = build_pieces(batch, weights)
    strips: list[list[int]] = []
    rows, tiles = 0, 0
    for piece in pieces:
        for strip, count in _strips(batch, piece):
            strips.append([*strip, rows, tiles])
            rows += count
            tiles += -(-count // tile_rows)
    counts = [strip[7] for strip in strips]
    matrices = list(_matrices(batch, strips, tile_rows))
    return Tables(
        strips=_as_table(strips, batch.device),
        matrices=_as_table(matrices, batch.device),
        num_strips=len(strips),
        num_matrices=len(matrices),
        longest=max(counts, default=0),
        num_rows=rows,
        num_tiles=tiles,
        is_aligned=_is_aligned(batch, strips),
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


def _strips(batch: Batch, piece: Piece) -> Iterator[tuple[list[int], int]]:
    """The numbers of each strip that follow from the piece, and its rows."""
    tile, size = piece.tile, batch.geometry
    members = range(*piece.members.indices(len(batch.members)))
    each, rows, width = tile.sizes
    offset, source = batch.sources[piece.source]
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
                    offset + before,
                    piece.place.matrices.start + place * each + matrix,
                    (tile.matrices[0] + matrix) * size.num_rows + tile.rows[0],
                    rows,
                    0 if momentum is None else momentum.stride(1),
                ],
                rows,
            )


def _matrices(batch: Batch, strips: Sequence[Sequence[int]], tile_rows: int) -> Iterator[list[int]]:
    """First and last tile, C, the place in sums over ranks, and the rows of each matrix."""
    start, width = 0, batch.geometry.num_columns
    for matrix in range(len(batch.members) * batch.matrices_here):
        stop = start
        while stop < len(strips) and strips[stop][5] == matrix:
            stop += 1
        own = strips[start:stop]
        member, place = divmod(matrix, batch.matrices_here)
        column = batch.members[member].local["column"].view(-1, width)
        last = own[-1][10] - (-own[-1][7] // tile_rows) if own else 0
        yield [
            own[0][10] if own else 0,
            last,
            column[place].data_ptr(),
            batch.held.start + matrix,
            own[0][9] if own else 0,
            sum(strip[7] for strip in own),
        ]
        start = stop
    assert start == len(strips), "a matrix's strips must follow each other"


def _is_aligned(batch: Batch, strips: Sequence[Sequence[int]]) -> bool:
    """Rows are: their first element, and the step from one to the next."""
    first = batch.members[0]
    steps = [first.weight.element_size() * batch.geometry.num_columns]
    momentum = first.local.get("momentum")
    has_records = momentum is not None and momentum.dtype == torch.uint8
    if momentum is not None and not has_records:
        steps.extend(momentum.element_size() * strip[8] for strip in strips)
    # Records begin at any byte, and are read byte by byte.
    addresses = [number for strip in strips for number in strip[: 1 if has_records else 2]]
    offsets = [8 * strip[4] for strip in strips]  # read as multiples of 8 elements
    return is_aligned([*steps, *addresses]) and all(o % 64 == 0 for o in offsets)
