# SPDX-License-Identifier: Apache-2.0
"""Rows that few ranks hold pieces of, where spans of a flat tensor meet.

Each holder is given the whole row's gradient, one row for each boundary at most, and finds for
itself what follows from it: R, the row's share of the clip's norm, the sketch of a block that the
boundary cuts. All of them sum the same numbers in the same order, so they agree bit for bit, and
no second message is needed. Sums are in float64: otherwise machines whose vectors have
other widths would get other bits.

Shape suffixes: E matrices of a piece, H matrices of a batch that are here, P parameters, L cut
rows, M columns, W columns of a block, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from flora_dist.core.protocols import Terms
from flora_dist.core.step.basis import SketchedBasis
from flora_dist.core.step.batch import Batch, Moment
from flora_dist.core.step.normalise import (
    advanced_columns,
    advanced_rows,
    column_weights,
    kind_of,
    row_scale,
    row_totals,
)
from flora_dist.core.step.pieces import Piece, build_pieces
from flora_dist.core.step.views import as_batches


class CutRows:
    """The cut rows of a batch of matrices on this rank."""

    def __init__(self, batch: Batch, pieces: Sequence[Piece]) -> None:
        """``pieces``: of one cut row each."""
        self._batch, self._pieces = batch, pieces
        self._is_exchanged = batch.members[0].cuts.peers is not None
        self._columns = [
            member.local["column"].view(-1, batch.geometry.num_columns) for member in batch.members
        ]

    def add_begun_(self, terms: Terms, now: Moment) -> None:
        """Add the norms of rows that begin here to this rank's terms, once peers gave the rows."""
        rows_PL = self._row_sums(terms["elements"], now)
        for piece in self._pieces:
            if piece.tile.columns[0] == 0:
                _add_norms_(terms, piece, self._scale(piece, rows_PL, now))

    def complete_(self, totals: Terms, now: Moment) -> None:
        """Add what follows from whole rows to the sums of message 1.

        "rows" (P, L), the sums of their squares; "blocks" (P, slots, R), the sketches of cut
        blocks; and the rows' norms, where no rank has added them before.
        """
        rows_PL = totals["rows"] = self._row_sums(totals["elements"], now)
        scales = [self._scale(piece, rows_PL, now) for piece in self._pieces]
        if not self._is_exchanged:
            for piece, scale_E1 in zip(self._pieces, scales, strict=True):
                _add_norms_(totals, piece, scale_E1)
        if self._batch.sketches is not None and any(piece.edges for piece in self._pieces):
            totals["blocks"] = self._blocks(totals, scales, now)

    def _row_sums(self, rows_PLM: Tensor, now: Moment) -> Tensor:
        """Sums of squares (P, L), weighed where columns have weights."""
        weight_HM = column_weights(self._batch, now, self._columns)
        if weight_HM is None:
            return _square_sums(rows_PLM)
        sums_PL = rows_PLM.new_zeros(rows_PLM.shape[:2])
        for piece in self._pieces:
            place = piece.members, piece.cut_rows
            root_E1M = weight_HM[piece.place.matrices].sqrt().unsqueeze(1)
            sums_PL[place] = _square_sums(rows_PLM[place] * root_E1M)
        return sums_PL

    def _scale(self, piece: Piece, rows_PL: Tensor, now: Moment) -> Tensor:
        """What the row of a piece is multiplied by (E, 1)."""
        sums_E1 = rows_PL[piece.members, piece.cut_rows]
        row_E1 = advanced_rows(self._batch, now, piece.rows, sums_E1)
        return row_scale(kind_of(self._batch), row_E1)

    def _blocks(self, totals: Terms, scales: Sequence[Tensor], now: Moment) -> Tensor:
        batch, basis = self._batch, now.basis
        assert isinstance(basis, SketchedBasis), basis
        _, factor_HM = advanced_columns(batch, now, self._columns, totals)
        members, slots = len(batch.members), len(batch.members[0].cuts.blocks)
        blocks_PSR = factor_HM.new_zeros(members, slots, basis.new_ERB.shape[1])
        for piece, scale_E1 in zip(self._pieces, scales, strict=True):
            matrices = piece.place.matrices
            rows_EM = totals["elements"][piece.members, piece.cut_rows].flatten(0, 1)
            for slot, (first, last) in self._cut_blocks(piece):
                factor_EW = factor_HM[matrices, first:last]
                x_EW = rows_EM[:, first:last] * scale_E1 * factor_EW
                # No product of a library's, whose order of sums is its own on every machine.
                products_ERW = basis.new_ERB[matrices, :, : last - first] * x_EW.unsqueeze(1)
                blocks_PSR[piece.members, slot] = products_ERW.double().sum(2).to(x_EW.dtype)
        return blocks_PSR

    def _cut_blocks(self, piece: Piece) -> Iterator[tuple[int, tuple[int, int]]]:
        """Slots of a piece's cut blocks, and their columns."""
        size = self._batch.geometry
        touched, _ = piece.tile.blocks(size.block)
        for edge in piece.edges:
            first = (touched + edge.place) * size.block
            yield edge.slots.start, (first, min(first + size.block, size.num_columns))


def cut_rows_of(batch: Batch) -> CutRows | None:
    """The cut rows of a batch; None where this rank has none, or shares all that it has."""
    first = batch.members[0]
    if batch.geometry.is_vector or not first.cuts.are_few or not len(first.cuts.rows):
        return None
    shape = batch.geometry.shape
    weights = [as_batches(each.weight, each.tiles, shape=shape) for each in batch.members]
    pieces = [piece for piece in build_pieces(batch, weights) if piece.cut_rows is not None]
    return CutRows(batch, pieces)


def _add_norms_(terms: Terms, piece: Piece, scale_E1: Tensor) -> None:
    """Add G^2 / R, and G (M A) / sqrt(R), where these are asked for."""
    place = piece.members, piece.cut_rows
    if "squares" in terms:
        terms["squares"][piece.summed] += (
            terms["elements"][place].flatten(0, 1) * scale_E1
        ).square()
    if "cross" in terms:
        terms["cross"][piece.summed] += terms["products"][place].flatten(0, 1) * scale_E1


def _square_sums(rows_PLM: Tensor) -> Tensor:
    """Sums of squares (P, L)."""
    return row_totals(rows_PLM.double().square()).to(rows_PLM.dtype)
