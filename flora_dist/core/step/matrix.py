# SPDX-License-Identifier: Apache-2.0
"""The step of a batch of matrices, from whatever tiles this rank holds.

    R <- b2 R + (1-b2) rowmean(G^2 + eps);  C <- b2 C + (1-b2) colmean(G^2 + eps)
    X = G / sqrt(R C / mean(R));  U from the rule;  W <- (1 - lr wd) W - lr U / max(1, RMS(U)/clip)

(``normalise`` divides by R or C alone, or weighs means; what stands for 1 / R and mean(R) / C then
is in that file.)

RMS looks as if it needed C first, so a message more; but mean(R) = mean(C), and with S1_j the sum
over rows of G_ij^2 / R_i (R is local), |X|^2 = mean(R) sum_j S1_j / C_j: S1 travels with the
column sums. The same holds for <X, M A>. Rows that several ranks hold pieces of know R only
after message 1. Where they are few, their elements are in it (core/step/cut_rows.py). Where columns
are sharded, all rows are cut: their share of RMS, and the sketches of their cut blocks, are
message 2. RMS(U) of ``flora_strict`` and ``apollo`` follows from U alone: one more message.

Shape suffixes: E matrices of a piece, H all that are here, S all that are summed, P parameters,
N rows, M columns, W columns of a piece, K blocks of a piece, R rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flora_dist.core.protocols import Terms
from flora_dist.core.sketch.ops import Blocks
from flora_dist.core.state.settings import RELATIVE
from flora_dist.core.step.batch import Batch, Moment
from flora_dist.core.step.cut_blocks import add_partial_, fill_
from flora_dist.core.step.cut_rows import cut_rows_of
from flora_dist.core.step.elements import (
    Writer,
    clip_factor,
    copy_to_,
    growth_factor,
    rate_of,
    read_gradient,
    read_momentum,
    relative_rate_of,
    square_sum,
    sum_of,
)
from flora_dist.core.step.momentum_rules import Squares, rule_of
from flora_dist.core.step.normalise import (
    add_column_sums_,
    advanced_columns,
    advanced_rows,
    column_weights,
    kind_of,
    row_scale,
    row_sums,
    row_weights,
)
from flora_dist.core.step.orthogonal import orthogonalised
from flora_dist.core.step.pieces import Piece, Pieces
from flora_dist.core.step.stages import Coupled, Measured, Settled, Tallied
from flora_dist.core.step.views import joined


class MatrixPhases:
    """``Phases`` of a batch of matrices in torch's operators; see the module's docstring."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._rule = rule_of(batch.config, batch.geometry)
        self._cuts = batch.members[0].cuts
        self._columns = [
            member.local["column"].view(-1, batch.geometry.num_columns) for member in batch.members
        ]
        self._pieces = Pieces(batch)
        self._cut_rows = cut_rows_of(batch)
        clips = batch.config.bounds_matrices
        self._asks_update = clips and self._rule is not None and self._rule.asks_update
        self._knows_sums_early = clips and not self._asks_update
        self._asks_history = (
            self._knows_sums_early and self._rule is not None and self._rule.asks_history
        )

    # ---- message 1

    def measure(self, now: Moment) -> Measured:
        """Sums of squares by column, what RMS follows from, and elements or squares of cut rows."""
        batch = self._batch
        self._pieces.refresh()
        terms, rows = self._empty_terms(now), {}
        weight_HM = column_weights(batch, now, self._columns)
        for index, piece in enumerate(self._pieces):
            gradient_ENW = read_gradient(batch, now, piece)
            square_ENW = gradient_ENW.square()
            row_EN = None
            if piece.cut_rows is None:
                sums_EN = row_sums(square_ENW, piece, weight_HM)
                row_EN = rows[index] = advanced_rows(batch, now, piece.rows, sums_EN)
            elif "elements" in terms:
                terms["elements"][_elements_of(piece)] = gradient_ENW
            else:
                sums_EN = row_sums(square_ENW, piece, weight_HM)
                terms["rows"][piece.members, piece.cut_rows] += sums_EN
            scale_EN = None if row_EN is None else self._row_scale(row_EN)
            weight_EN = row_weights(batch, now, piece, self._columns)
            add_column_sums_(terms, piece, square_ENW, weight_EN, scale_EN)
            if "history" in terms:
                self._add_history_(terms, piece, gradient_ENW, row_EN, now)
            if "weight" in terms:
                weight_ENW = joined(piece.weights).to(batch.dtype)
                terms["weight"][piece.summed] += square_sum(weight_ENW)
        return Measured(terms=terms, rows=rows)

    def is_finite(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are (): NaN, inf and overflow reach their squares."""
        return measured.terms["columns"].sum().isfinite()

    def is_zero(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are all zeros ()."""
        return ~measured.terms["columns"].any()

    def take_rows(self, now: Moment, measured: Measured) -> None:
        """Add the norms of cut rows that begin here to the terms, once peers gave the rows."""
        if self._cut_rows is not None:
            self._cut_rows.add_begun_(measured.terms, now)

    def _empty_terms(self, now: Moment) -> Terms:
        batch, members = self._batch, len(self._batch.members)
        summed = members * batch.matrices_summed
        terms = {
            "presence": self._zeros(members) + float(not now.is_missing),
            "columns": self._zeros(summed, batch.geometry.num_columns),
        }
        if kind_of(batch) == "racs":
            terms["row_weights"] = self._zeros(summed)
        if self._knows_sums_early:
            terms["squares"] = torch.zeros_like(terms["columns"])
        if self._asks_history:
            terms["cross"] = torch.zeros_like(terms["columns"])
            terms["history"] = self._zeros(summed)
        if batch.config.scales_matrices:
            terms["weight"] = self._zeros(summed)
        if self._cuts.rows_anywhere and self._cuts.are_few:
            terms["elements"] = self._zeros(
                members, len(self._cuts.rows), batch.geometry.num_columns
            )
            if self._asks_history:
                terms["products"] = torch.zeros_like(terms["elements"])
        elif self._cuts.rows_anywhere:
            terms["rows"] = self._zeros(members, len(self._cuts.rows))
        return terms

    def _add_history_(
        self, terms: Terms, piece: Piece, gradient_ENW: Tensor, row_EN: Tensor | None, now: Moment
    ) -> None:
        old_ENW = now.basis.read(read_momentum(self._batch, piece), piece.place)
        terms["history"][piece.summed] += square_sum(old_ENW)
        if row_EN is not None:
            # cross: sum_i G (M A) / sqrt(R_i)
            cross_E1M = self._row_scale(row_EN).unsqueeze(1) @ (gradient_ENW * old_ENW)
            terms["cross"][piece.summed] += cross_E1M.squeeze(1)
        elif "products" in terms:
            terms["products"][_elements_of(piece)] = gradient_ENW * old_ENW

    # ---- between the messages

    def couple(self, now: Moment, measured: Measured, totals: Terms) -> Coupled:
        """Normalisation is known now; what cut rows and cut blocks still need."""
        if self._cut_rows is not None:
            self._cut_rows.complete_(totals, now)
        settled = self._settle(now, measured, totals)
        terms = self._empty_terms_of_cuts()
        if terms:
            for index, piece in enumerate(self._pieces):
                if piece.cut_rows is not None:
                    self._couple_piece(index, piece, settled, terms, now)
        return Coupled(terms=terms, settled=settled)

    def _settle(self, now: Moment, measured: Measured, totals: Terms) -> Settled:
        batch, held = self._batch, self._batch.held
        column_HM, factor_HM = advanced_columns(batch, now, self._columns, totals)
        rows = dict(measured.rows)
        for index, piece in enumerate(self._pieces):
            if piece.cut_rows is not None:
                sums_EN = totals["rows"][piece.members, piece.cut_rows]
                rows[index] = advanced_rows(batch, now, piece.rows, sums_EN)
        return Settled(
            rows=rows,
            column_HM=column_HM,
            factor_HM=factor_HM,
            squares=self._squares_of_whole_rows(totals, factor_HM),
            weight_H=totals["weight"][held] if "weight" in totals else None,
            blocks=totals.get("blocks"),
        )

    def _squares_of_whole_rows(self, totals: Terms, factor_HM: Tensor) -> Squares:
        held = self._batch.held
        x2_H = cross_H = history_H = self._zeros(factor_HM.shape[0])
        if "squares" in totals:  # |X|^2 = mean(R) sum_j S1_j / C_j
            x2_H = (totals["squares"][held] * factor_HM * factor_HM).sum(1)
        if "cross" in totals:  # <X, M A> = sqrt(mean(R)) sum_j S2_j / sqrt(C_j)
            cross_H, history_H = (totals["cross"][held] * factor_HM).sum(1), totals["history"][held]
        return Squares(x2=x2_H, cross=cross_H, history=history_H)

    def _empty_terms_of_cuts(self) -> Terms:
        batch, members = self._batch, len(self._batch.members)
        terms: Terms = {}
        if self._cuts.are_few:
            return terms
        if self._cuts.rows_anywhere and self._knows_sums_early:
            terms["squares"] = self._zeros(members * batch.matrices_summed)
            if self._asks_history:
                terms["cross"] = torch.zeros_like(terms["squares"])
        if batch.sketches is not None and self._cuts.blocks_anywhere:
            assert batch.geometry.rank is not None
            terms["blocks"] = self._zeros(members, len(self._cuts.blocks), batch.geometry.rank)
        return terms

    def _couple_piece(
        self, index: int, piece: Piece, settled: Settled, terms: Terms, now: Moment
    ) -> None:
        x = self._normalise(index, piece, settled, now, None)
        if "squares" in terms:
            terms["squares"][piece.summed] += square_sum(x.elements_ENW)
        if "cross" in terms:
            old_ENW = now.basis.read(read_momentum(self._batch, piece), piece.place)
            terms["cross"][piece.summed] += sum_of(x.elements_ENW * old_ENW)
        if "blocks" in terms:
            compressed = now.basis.compress(x, piece.place)
            add_partial_(terms["blocks"][piece.members], compressed, piece.edges)

    def tally(self, now: Moment, coupled: Coupled, totals: Terms) -> Tallied:
        """|U|^2 of ``flora_strict`` and ``apollo``, whose cut blocks are whole only now."""
        terms: Terms = {}
        settled = replace(coupled.settled, blocks=totals.get("blocks", coupled.settled.blocks))
        known = Tallied(terms=terms, settled=settled, sums=totals)
        if self._asks_update:
            terms["update"] = self._zeros(len(self._batch.members) * self._batch.matrices_summed)
            for index, piece in enumerate(self._pieces):
                update_ENW, _ = self._advance(index, piece, known, now, None)
                terms["update"][piece.summed] += square_sum(update_ENW)
        return known

    # ---- the step itself

    def finish(self, now: Moment, tallied: Tallied, totals: Terms) -> None:
        """Clip, update weights and state."""
        settled, writer = tallied.settled, Writer(batch=self._batch, now=now)
        clips_input = self._rule is None or self._rule.clips_input
        square_sum_H = self._square_sum(tallied, totals)
        factor_H = self._bound_(square_sum_H)
        rate, is_scaled = self._rate_(now, settled.weight_H), settled.weight_H is not None
        for index, piece in enumerate(self._pieces):
            here = piece.place.matrices
            factor_E = factor_H[here] if clips_input else None
            update_ENW, momentum = self._advance(index, piece, tallied, now, factor_E)
            if momentum is not None:
                writer.write_momentum_(
                    piece.momenta, momentum, members=piece.members, tile=piece.tile
                )
            if self._batch.config.orthogonalise is not None:
                update_ENW = orthogonalised(update_ENW, self._batch.config.orthogonalise)
            own_rate = rate[here] if is_scaled and isinstance(rate, Tensor) else rate
            writer.step_weights_(
                piece.weights,
                update_ENW,
                own_rate if clips_input else own_rate * factor_H[here],
                members=piece.members,
                tile=piece.tile,
            )
            copy_to_(piece.rows, settled.rows[index])
        self._pieces.write_back_()
        copy_to_(self._columns, settled.column_HM)

    def _bound_(self, square_sum_H: Tensor) -> Tensor:
        """What updates are multiplied with (H,); keeps the norms that the next ones may grow by."""
        growth = self._batch.config.growth
        if growth is None:
            return clip_factor(square_sum_H, self._batch)
        norms = [member.local["norm"].view(-1) for member in self._batch.members]
        factor_H, norm_H = growth_factor(square_sum_H, joined(norms), growth)
        copy_to_(norms, norm_H)
        return factor_H

    def _rate_(self, now: Moment, weight_H: Tensor | None) -> float | Tensor:
        """What updates are stepped by, for each matrix (H,) where it depends on its size."""
        if weight_H is None or self._batch.config.scale_parameter != RELATIVE:
            return rate_of(now, weight_H, self._batch)
        starts = [member.local["start"].view(-1) for member in self._batch.members]
        rate_H, start_H = relative_rate_of(now, weight_H, joined(starts), self._batch)
        copy_to_(starts, start_H)
        return rate_H

    def _square_sum(self, tallied: Tallied, totals: Terms) -> Tensor:
        """Squared norm (H,) of what is clipped, over all ranks."""
        held, squares, sums = self._batch.held, tallied.settled.squares, tallied.sums
        if self._asks_update:
            return totals["update"][held]
        if "squares" in sums:
            squares = replace(squares, x2=squares.x2 + sums["squares"][held])
        if "cross" in sums:
            squares = replace(squares, cross=squares.cross + sums["cross"][held])
        if self._rule is None or not self._knows_sums_early:
            return squares.x2
        return self._rule.square_sum(squares)

    def _advance(
        self, index: int, piece: Piece, tallied: Tallied, now: Moment, factor_E: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The update of a piece, from X times ``factor``, and its new momentum."""
        x = self._normalise(index, piece, tallied.settled, now, factor_E)
        if self._rule is None:
            return x.elements_ENW, None
        compressed = now.basis.compress(x, piece.place)
        if piece.edges and tallied.settled.blocks is not None:
            fill_(compressed, tallied.settled.blocks[piece.members], piece.edges, factor_E)
        momentum = read_momentum(self._batch, piece)
        return self._rule.advance(x, compressed, momentum, now, piece.place)

    def _normalise(
        self, index: int, piece: Piece, settled: Settled, now: Moment, factor_E: Tensor | None
    ) -> Blocks:
        # X = G / sqrt(R C / mean(R)), times the clip where X is what is clipped
        gradient_ENW = read_gradient(self._batch, now, piece)
        scale_EN = self._row_scale(settled.rows[index])
        if factor_E is not None:
            scale_EN = scale_EN * factor_E.unsqueeze(1)
        factor_EW = settled.factor_HM[piece.place.matrices, slice(*piece.tile.columns)]
        x = now.basis.room(gradient_ENW, piece.place)
        torch.mul(gradient_ENW, scale_EN.unsqueeze(2), out=x.elements_ENW)
        x.elements_ENW.mul_(factor_EW.unsqueeze(1))
        return x

    def _row_scale(self, row_EN: Tensor) -> Tensor:
        return row_scale(kind_of(self._batch), row_EN)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._batch.dtype, device=self._batch.device)


def _elements_of(piece: Piece) -> tuple[slice, slice, slice]:
    """Where the elements of a cut row stand among the whole ones (P, L, M)."""
    assert piece.cut_rows is not None
    return piece.members, piece.cut_rows, slice(*piece.tile.columns)
