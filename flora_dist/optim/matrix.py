# SPDX-License-Identifier: Apache-2.0
"""The step of a matrix, or of a batch of them, from whatever tiles this rank holds.

    R <- b2 R + (1-b2) rowmean(G^2 + eps);  C <- b2 C + (1-b2) colmean(G^2 + eps)
    X = G / sqrt(R C / mean(R));  U from the rule;  W <- (1 - lr wd) W - lr U / max(1, RMS(U)/clip)

RMS looks as if it needed C first, so a message more; but mean(R) = mean(C), and with S1_j the sum
over rows of G_ij^2 / R_i (R is local), |X|^2 = mean(R) sum_j S1_j / C_j: S1 travels with the
column sums. The same holds for <X, M A>. Rows that several ranks hold pieces of know R only
after message 1; their share of RMS, and the sketches of their cut blocks, are message 2. The strict
rule's RMS follows from the momentum alone, which cut blocks have after that: message 3.

Shape suffixes: E matrices (of the batch; H: those this rank touches), N rows, M columns, W columns
of a piece, K blocks of a piece, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flora_dist.optim.basis import Basis, DenseBasis
from flora_dist.optim.cut_blocks import CutBlocks
from flora_dist.optim.job import Job, arithmetic_dtype
from flora_dist.optim.part import Terms
from flora_dist.optim.pieces import (
    Piece,
    as_batches,
    build_pieces,
    write_momentum_,
    write_weight_,
)
from flora_dist.optim.rules import Squares, rule_of
from flora_dist.tiles import Tile


class MatrixUpdate:
    """One matrix parameter's step; see the module's docstring."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._weight = job.part.weight()
        self._dtype = arithmetic_dtype(self._weight.dtype)
        self._rule = rule_of(job.config, job.geometry)
        self._basis: Basis = DenseBasis()
        if job.sketches is not None and self._rule is not None:
            self._basis = job.sketches.change(
                int(job.state["window"]), job.window, dtype=self._dtype, device=self._weight.device
            )
        is_sketched = job.sketches is not None
        self._cut_blocks = CutBlocks(job.geometry, job.cuts) if is_sketched else None
        # Where every matrix is whole on its rank, sums stay here and cover what is here.
        first, last = job.part.matrices
        self._first = 0 if job.part.splits_matrices else first
        self._summed = job.geometry.num_matrices if job.part.splits_matrices else last - first
        self._held = slice(first - self._first, last - self._first)
        self._new_rows: dict[Tile, Tensor] = {}

    # ---- message 1

    def measure(self) -> Terms:
        """Sums of squares by column, what RMS follows from, and the squares of cut rows."""
        job, num_columns = self.job, self.job.geometry.num_columns
        terms = {"columns": self._zeros(self._summed, num_columns)}
        if self._sums_known_early():
            terms["squares"] = torch.zeros_like(terms["columns"])
            if self._asks_history():
                terms["cross"] = torch.zeros_like(terms["columns"])
                terms["history"] = self._zeros(self._summed)
        if job.config.scale_parameter:
            terms["weight"] = self._zeros(self._summed)
        if job.cuts.rows_anywhere:
            terms["rows"] = self._zeros(len(job.cuts.rows))
        for piece in build_pieces(job, self._batches()):
            self._measure_piece(piece, terms)
        self._own = terms
        presence = self._zeros(1) + float(job.gradient is not None)
        return {"presence": presence, **(terms if job.part.splits_matrices else {})}

    def is_finite(self) -> Tensor:
        """Whether this rank's gradient is (), after ``measure``: NaN and inf reach its squares."""
        return self._own["columns"].sum().isfinite()

    def is_zero(self) -> Tensor:
        """Whether this rank's gradient is all zeros (), after ``measure``."""
        return ~self._own["columns"].any()

    def _measure_piece(self, piece: Piece, terms: Terms) -> None:
        matrices, columns = self._matrices(piece.tile), slice(*piece.tile.columns)
        gradient_ENW = piece.read_gradient(self._dtype, self.job.sign)
        square_ENW = gradient_ENW.square()
        old_ENW = None
        if "history" in terms:
            assert piece.momentum is not None
            old_ENW = self._basis.read(piece.momentum.to(self._dtype), piece.tile)
            terms["history"][matrices] += old_ENW.square().sum((1, 2))
        if "weight" in terms:
            weight_ENW = piece.weight_ENW.to(self._dtype)
            terms["weight"][matrices] += weight_ENW.square().sum((1, 2))
        if self._is_cut(piece.tile):
            terms["columns"][matrices, columns] += square_ENW.sum(1)
            terms["rows"][self._row_slots(piece.tile)] += square_ENW.sum((0, 2))
            return
        row_EN = self._new_rows[piece.tile] = self._advance_row(piece, square_ENW.sum(2))
        if "squares" not in terms:
            terms["columns"][matrices] += square_ENW.sum(1)
            return
        # columns: sum_i G^2; squares: sum_i G^2 / R_i: one pass over the squares for both
        scales_E2N = torch.stack([torch.ones_like(row_EN), 1 / row_EN], dim=1)
        sums_E2M = scales_E2N @ square_ENW
        terms["columns"][matrices] += sums_E2M[:, 0]
        terms["squares"][matrices] += sums_E2M[:, 1]
        if old_ENW is not None:
            # cross: sum_i G (M A) / sqrt(R_i)
            product_ENM = gradient_ENW * old_ENW
            terms["cross"][matrices] += (row_EN.rsqrt().unsqueeze(1) @ product_ENM).squeeze(1)

    # ---- between the messages

    def couple(self, totals: Terms) -> Terms:
        """Normalisation is known now; what cut rows, cut blocks and the strict rule still need."""
        self._totals = {**self._own, **totals}
        self._settle()
        job = self.job
        terms: Terms = {}
        if job.cuts.rows_anywhere and self._sums_known_early():
            terms["squares"] = self._zeros(self._summed)
            if self._asks_history():
                terms["cross"] = self._zeros(self._summed)
        if self._cut_blocks is not None and self._rule is not None and job.cuts.blocks_anywhere:
            assert job.geometry.rank is not None
            terms["blocks"] = self._zeros(len(job.cuts.blocks), job.geometry.rank)
        if terms:
            for piece in build_pieces(job, self._batches()):
                if self._is_cut(piece.tile):
                    self._couple_piece(piece, terms)
        self._own = terms
        return terms if job.part.splits_matrices else {}

    def _settle(self) -> None:
        """C, X's column factor sqrt(mean(R) / C), R of cut rows, and the sums over whole rows."""
        job, size, totals = self.job, self.job.geometry, self._totals
        column_HM = job.local("column").view(-1, size.num_columns)
        mean_HM = totals["columns"][self._held] / size.num_rows + job.config.eps
        self._new_column_HM = job.beta2 * column_HM + (1 - job.beta2) * mean_HM
        # mean(R) = mean(C): both are the moving mean of all of G^2 + eps
        mean_H1 = self._new_column_HM.mean(1, keepdim=True)
        # Roots first: their quotient would overflow for a large gradient beside an empty column.
        self._column_factor_HM = mean_H1.sqrt() * self._new_column_HM.rsqrt()
        zeros_H = self._zeros(self._new_column_HM.shape[0])
        self._squares = Squares(x2=zeros_H, cross=zeros_H, history=zeros_H)
        if "squares" in totals:
            # |X|^2 = mean(R) sum_j S1_j / C_j;  <X, M A> = sqrt(mean(R)) sum_j S2_j / sqrt(C_j)
            factor_HM = self._column_factor_HM
            x2_H = (totals["squares"][self._held] * factor_HM * factor_HM).sum(1)
            self._squares = Squares(x2=x2_H, cross=zeros_H, history=zeros_H)
            if "cross" in totals:
                cross_H = (totals["cross"][self._held] * factor_HM).sum(1)
                history_H = totals["history"][self._held]
                self._squares = Squares(x2=x2_H, cross=cross_H, history=history_H)

    def _couple_piece(self, piece: Piece, terms: Terms) -> None:
        matrices = self._matrices(piece.tile)
        x_ENW = self._normalise(piece)
        if "squares" in terms:
            terms["squares"][matrices] += x_ENW.square().sum((1, 2))
            if "cross" in terms:
                assert piece.momentum is not None
                old_ENW = self._basis.read(piece.momentum.to(self._dtype), piece.tile)
                terms["cross"][matrices] += (x_ENW * old_ENW).sum((1, 2))
        if "blocks" in terms:
            assert self._cut_blocks is not None
            compressed = self._basis.compress(x_ENW, piece.tile)
            self._cut_blocks.add_partial_(terms["blocks"], compressed, piece.tile)

    def tally(self, totals: Terms) -> Terms:
        """|U|^2 of the strict rule, which reads the momentum that cut blocks have only now."""
        self._coupled = {**self._own, **totals}
        terms: Terms = {}
        if self._asks_update():
            ones_E11 = torch.ones(1, 1, 1, dtype=self._dtype, device=self._weight.device)
            terms["update"] = self._zeros(self._summed)
            for piece in build_pieces(self.job, self._batches()):
                update_ENW, _ = self._advance(piece, ones_E11)
                terms["update"][self._matrices(piece.tile)] += update_ENW.square().sum((1, 2))
        self._own = terms
        return terms if self.job.part.splits_matrices else {}

    # ---- the step itself

    def finish(self, totals: Terms) -> None:
        """Clip, update weights and state, count the step."""
        job, num_elements = self.job, self.job.geometry.num_rows * self.job.geometry.num_columns
        tallied = {**self._own, **totals}
        factor_H = job.clip_factor(self._square_sum(tallied), num_elements)
        scales = "weight" in self._totals
        weight_H = self._totals["weight"][self._held] if scales else None
        rate_H = job.rate(weight_H, num_elements) * torch.ones_like(factor_H)
        weights = self._batches()
        for piece in build_pieces(job, weights):
            here = self._here(piece.tile)
            update_ENW, momentum = self._advance(piece, factor_H[here].view(-1, 1, 1))
            if momentum is not None:
                write_momentum_(job, piece, momentum)
            write_weight_(job, piece, update_ENW * rate_H[here].view(-1, 1, 1))
            piece.row_EN.copy_(self._row_of(piece))
        if weights and weights[0].data_ptr() != self._weight.data_ptr():
            self._weight.copy_(weights[0].view(self._weight.shape))
        job.local("column").view(-1, job.geometry.num_columns).copy_(self._new_column_HM)
        job.count_step()

    def _square_sum(self, tallied: Terms) -> Tensor:
        """Squared norm (H,) of what is clipped, over all ranks."""
        if self.job.config.clip is None:
            return self._zeros(self._held.stop - self._held.start)
        if self._asks_update():
            return tallied["update"][self._held]
        squares = self._squares
        if "squares" in self._coupled:
            cross = self._coupled.get("cross")
            squares = Squares(
                x2=squares.x2 + self._coupled["squares"][self._held],
                cross=squares.cross + (0.0 if cross is None else cross[self._held]),
                history=squares.history,
            )
        return squares.x2 if self._rule is None else self._rule.square_sum(squares)

    def _advance(self, piece: Piece, factor_E11: Tensor) -> tuple[Tensor, Tensor | None]:
        """The clipped update of a piece, and its new momentum."""
        x_ENW = self._normalise(piece)
        if self._rule is None:
            return x_ENW * factor_E11, None
        if self._rule.clips_input:
            x_ENW = x_ENW * factor_E11
        compressed = self._basis.compress(x_ENW, piece.tile)
        if self._cut_blocks is not None and "blocks" in self._coupled:
            factor = factor_E11 if self._rule.clips_input else None
            self._cut_blocks.fill_(compressed, self._coupled["blocks"], piece.tile, factor)
        assert piece.momentum is not None
        update_ENW, momentum = self._rule.advance(
            x_ENW, compressed, piece.momentum.to(self._dtype), self._basis, piece.tile
        )
        return (update_ENW if self._rule.clips_input else update_ENW * factor_E11), momentum

    def _normalise(self, piece: Piece) -> Tensor:
        # X = G / sqrt(R C / mean(R))
        factor_EW = self._column_factor_HM[self._here(piece.tile), slice(*piece.tile.columns)]
        gradient_ENW = piece.read_gradient(self._dtype, self.job.sign)
        return gradient_ENW * self._row_of(piece).rsqrt().unsqueeze(2) * factor_EW.unsqueeze(1)

    def _row_of(self, piece: Piece) -> Tensor:
        """The new R of a piece; that of cut rows follows from message 1."""
        if self._is_cut(piece.tile):
            sums_EN = self._totals["rows"][self._row_slots(piece.tile)].unsqueeze(0)
            return self._advance_row(piece, sums_EN)
        return self._new_rows[piece.tile]

    def _advance_row(self, piece: Piece, square_sum_EN: Tensor) -> Tensor:
        # R <- b2 R + (1-b2) rowmean(G^2 + eps)
        job = self.job
        mean_EN = square_sum_EN / job.geometry.num_columns + job.config.eps
        return job.beta2 * piece.row_EN + (1 - job.beta2) * mean_EN

    # ---- what is here

    def _batches(self) -> list[Tensor]:
        part = self.job.part
        return as_batches(self._weight, part.tiles, shape=part.shape)

    def _matrices(self, tile: Tile) -> slice:
        """A tile's matrices among those that are summed."""
        return slice(*(matrix - self._first for matrix in tile.matrices))

    def _here(self, tile: Tile) -> slice:
        """A tile's matrices among those that are here."""
        return slice(*(matrix - self.job.part.matrices[0] for matrix in tile.matrices))

    def _is_cut(self, tile: Tile) -> bool:
        return tile.columns != (0, self.job.geometry.num_columns)

    def _row_slots(self, tile: Tile) -> slice:
        line = tile.matrices[0] * self.job.geometry.num_rows + tile.rows[0]
        start = self.job.cuts.row_slot(line)
        return slice(start, start + tile.sizes[1])

    def _asks_update(self) -> bool:
        clips = self.job.config.clip is not None
        return clips and self._rule is not None and self._rule.asks_update

    def _sums_known_early(self) -> bool:
        return self.job.config.clip is not None and not self._asks_update()

    def _asks_history(self) -> bool:
        return self._rule is not None and self._rule.asks_history

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._weight.device)
