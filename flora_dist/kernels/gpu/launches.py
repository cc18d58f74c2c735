# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels over a batch of matrices; ``phases.py`` says when.

Shape suffixes: H matrices that are here, S those that are summed, M columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from flora_dist.kernels.gpu.context import Context, Look
from flora_dist.kernels.gpu.cut_launches import CutLaunches
from flora_dist.kernels.gpu.finish import FINISH_TALLIES, FINISH_WRITES, finish
from flora_dist.kernels.gpu.inputs import Given, KernelBasis
from flora_dist.kernels.gpu.measure import measure, measure_rows
from flora_dist.kernels.gpu.place import on
from flora_dist.kernels.gpu.settle import MATRIX_NUMBERS, gather, gather_rows, scale, settle
from flora_dist.kernels.gpu.shapes import (
    AS_TORCH,
    DTYPES,
    ROW_OPTIONS,
    bound_of,
    measure_options,
    pass_of,
    scaled_by,
)
from flora_dist.kernels.gpu.tables import Strips

_SCALED_TOGETHER = 128
"""Matrices whose scales one program works out."""


class Launches:
    """The kernels of one batch; nothing is launched over rows that are not here."""

    def __init__(self, context: Context) -> None:
        self._of = context
        self._cut = CutLaunches(context)

    # ---- the first look

    def measure(self, given: Given, basis: KernelBasis, terms: Mapping[str, Tensor]) -> Tensor:
        """The new R of whole rows, and room for that of cut ones; sums go to ``terms``."""
        of, table, columns = self._of, self._of.table, self._of.batch.geometry.num_columns
        rows = of.empty(table.num_rows)
        # Cut rows add nothing but squares.
        sums = of.needs.num_sums if table.whole.count else 1
        partials = of.empty(table.num_tiles, sums, columns)
        singles = of.empty(table.num_tiles, 2)
        with on(of.batch.device):
            if table.whole.count and table.cut.count:
                partials.zero_()  # a cut row leaves out columns, and sums
            if of.shapes.row_width and table.whole.count:
                self._measure_rows(given, rows, partials)
            elif table.whole.count:
                self._measure(given, basis, rows, partials, singles)
            if table.cut.count:
                self._cut.measure(given, basis, terms, partials, singles)
            self._gather(partials, singles, terms)
        return rows

    def _gather(self, partials: Tensor, singles: Tensor, terms: Mapping[str, Tensor]) -> None:
        of, table, nothing = self._of, self._of.table, self._of.nothing
        first, width = table.columns
        gather[(triton.cdiv(width, of.shapes.sum_width), table.num_matrices)](
            table.matrices,
            partials,
            singles,
            terms["columns"],
            terms.get("squares", nothing),
            terms.get("cross", nothing),
            terms.get("history", nothing),
            terms.get("weight", nothing),
            of.batch.geometry.num_columns,
            first,
            width,
            SUMS=partials.shape[1],
            HISTORY=of.needs.history,
            SCALED=of.needs.weight,
            TILES=of.shapes.sum_tiles,
            WIDTH=of.shapes.sum_width,
        )

    def _measure_rows(self, given: Given, rows: Tensor, partials: Tensor) -> None:
        of, strips = self._of, self._of.table.whole
        measure_rows[self._tiles](
            strips.table,
            of.inputs.addresses,
            of.inputs.scalars,
            rows,
            partials,
            of.batch.geometry.num_columns,
            SUMS=of.needs.num_sums,
            ROWS=of.tile_rows,
            STEP=of.shapes.row_step,
            WIDTH=of.shapes.row_width,
            NORMALISE=of.shapes.normalise,
            GRADIENT=DTYPES[given.dtype],
            ALIGNED=strips.is_aligned and given.is_aligned,
            **ROW_OPTIONS,
        )

    def _measure(
        self, given: Given, basis: KernelBasis, rows: Tensor, partials: Tensor, singles: Tensor
    ) -> None:
        of, strips = self._of, self._of.table.whole
        measure[self._tiles](
            *of.operands(strips, given, basis),
            rows,
            partials,
            singles,
            of.batch.geometry.num_columns,
            SUMS=of.needs.num_sums,
            ROWS=of.tile_rows,
            HISTORY=of.needs.history,
            SCALED=of.needs.weight,
            NORMALISE=of.shapes.normalise,
            WEIGHT=of.shapes.weight,
            **of.constants(given, strips),
            **measure_options(given.drawn.bits),
        )

    @property
    def _tiles(self) -> tuple[int, int]:
        strips = self._of.table.whole
        return triton.cdiv(strips.longest, self._of.tile_rows), strips.count

    # ---- what follows from the sums

    def settle(self, totals: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The new C, what columns are multiplied by, and |X|^2 beside <X, M A> (H, 2).

        The new R of cut rows goes to ``rows``.
        """
        of, table, size = self._of, self._of.table, self._of.batch.geometry
        column_HM = of.empty(table.num_matrices, size.num_columns)
        factor_HM, sums_H2 = torch.empty_like(column_HM), of.empty(table.num_matrices, 2)
        if table.cut.count:
            self._cut.settle(totals["rows"], rows)
        with on(of.batch.device):
            if table.num_matrices:
                settle[(table.num_matrices,)](
                    table.matrices,
                    of.inputs.scalars,
                    totals["columns"],
                    totals.get("squares", of.nothing),
                    totals.get("cross", of.nothing),
                    column_HM,
                    factor_HM,
                    sums_H2,
                    size.num_rows,
                    size.num_columns,
                    SUMS=of.needs.num_sums,
                    NORMALISE=of.shapes.normalise,
                    WIDTH=of.shapes.settle_width,
                    **AS_TORCH,
                )
        return column_HM, factor_HM, sums_H2

    def couple(self, look: Look, terms: Mapping[str, Tensor]) -> None:
        """Fill in the terms of message 2, where many rows are cut."""
        if terms and self._of.table.cut.count:
            self._cut.couple(look, terms)

    def scale(self, sums_H2: Tensor, totals: Mapping[str, Tensor]) -> Tensor:
        """The factor of X and the step size (H, 2); ``totals``: of all messages."""
        of, table, nothing = self._of, self._of.table, self._of.nothing
        scales_H2 = torch.empty_like(sums_H2)
        with on(of.batch.device):
            scale[(triton.cdiv(table.num_matrices, _SCALED_TOGETHER),)](
                table.matrices,
                of.inputs.scalars,
                sums_H2,
                totals.get("history", nothing),
                totals.get("update", nothing),
                totals.get("weight", nothing),
                scales_H2,
                table.num_matrices,
                of.batch.elements_per_matrix,
                RULE=of.shapes.rule,
                CLIPS_INPUT=of.shapes.clips_input,
                BOUND=bound_of(of.batch.config).value,
                KNOWN=of.needs.update,
                SCALED=scaled_by(of.batch.config).value,
                NUMBERS=MATRIX_NUMBERS.value,
                WIDTH=_SCALED_TOGETHER,
            )
        return scales_H2

    # ---- the second look

    def sum_update(self, look: Look, update_S: Tensor) -> None:
        """|U|^2 where U = M A: neither the clip nor the rate is known, or matters."""
        of, table = self._of, self._of.table
        singles = of.empty(table.num_rows, of.groups)
        ones_H2 = torch.ones((table.num_matrices, 2), device=of.batch.device)
        with on(of.batch.device):
            self._finish(look, ones_H2, singles, FINISH_TALLIES)
            gather_rows[(table.num_matrices,)](
                table.matrices, singles, update_S, of.groups, WIDTH=of.shapes.sum_width
            )

    def finish(self, look: Look, scales_H2: Tensor) -> None:
        """New weights, momenta and R."""
        with on(self._of.batch.device):
            self._finish(look, scales_H2, self._of.nothing, FINISH_WRITES)

    def _finish(self, look: Look, scales_H2: Tensor, singles: Tensor, purpose: int) -> None:
        for strips in (self._of.table.whole, self._of.table.cut):
            if strips.count:
                self._finish_strips(strips, look, scales_H2, singles, purpose)

    def _finish_strips(
        self, strips: Strips, look: Look, scales_H2: Tensor, singles: Tensor, purpose: int
    ) -> None:
        of, shapes, given = self._of, self._of.shapes, look.given
        rows, options = pass_of(
            bits=given.drawn.bits,
            kept_bits=shapes.kept_bits,
            moments=of.batch.geometry.moments,
        )
        finish[(triton.cdiv(strips.longest, rows), of.groups, strips.count)](
            *of.operands(strips, given, look.basis),
            of.inputs.keys,
            look.basis.new,
            look.basis.move,
            look.rows,
            look.factor_HM,
            of.nothing if look.blocks is None else look.blocks,
            scales_H2,
            singles,
            len(of.batch.members),
            of.batch.geometry.num_columns,
            shapes.blocks,
            RULE=shapes.rule,
            ROWS=rows,
            GROUP=shapes.group,
            WINDOW=look.basis.kind,
            TALLIES=purpose,
            ROUNDS=of.batch.config.stochastic_rounding,
            CUT=strips.are_cut,
            NORMALISE=shapes.normalise,
            WEIGHT=shapes.weight,
            **of.constants(given, strips),
            **options,
        )
