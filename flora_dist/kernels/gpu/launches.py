# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels over a batch of matrices; ``phases.py`` says when.

Shape suffixes: H matrices that are here, S those that are summed, M columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from flora_dist.core.sketch.quantise import value_table
from flora_dist.core.step.batch import Batch
from flora_dist.kernels.gpu.finish import FINISH_TALLIES, FINISH_WRITES, finish
from flora_dist.kernels.gpu.inputs import Given, Inputs, KernelBasis
from flora_dist.kernels.gpu.measure import measure, measure_rows
from flora_dist.kernels.gpu.place import on
from flora_dist.kernels.gpu.settle import MATRIX_NUMBERS, gather, gather_update, scale, settle
from flora_dist.kernels.gpu.shapes import (
    DTYPES,
    EXPANDED_OPTIONS,
    MEASURE_OPTIONS,
    MEASURED_ROWS,
    ROW_OPTIONS,
    SMALLEST_PRODUCT,
    TILE_ROWS,
    finish_of,
    shapes_of,
)
from flora_dist.kernels.gpu.tables import make_tables

_SCALED_TOGETHER = 128
"""Matrices whose scales one program works out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What of a batch must be summed."""

    num_sums: int
    """By column: of G^2, of G^2 / R, of G (M A) / sqrt(R)."""
    history: bool
    """|M A|^2 too."""
    weight: bool
    """|W|^2 too."""
    update: bool
    """|U|^2, which is known late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the second look at the gradients needs."""

    given: Given
    basis: KernelBasis
    rows: Tensor
    """The new R of all strips."""
    factor_HM: Tensor


class Launches:
    """The kernels of one batch; strips may be none, where nothing of it is here."""

    def __init__(self, batch: Batch, inputs: Inputs, needs: Needs, gradient_block: int = 0) -> None:
        self._batch, self._inputs, self._needs = batch, inputs, needs
        self._shapes = shapes_of(batch, gradient_block)
        self._tile_rows = MEASURED_ROWS if self._shapes.row_width else TILE_ROWS
        self._table = make_tables(batch, self._tile_rows)
        self._nothing = torch.zeros(1, device=batch.device)
        self._values = self._nothing
        if self._shapes.kept_bits:
            self._values = value_table(self._shapes.kept_bits, torch.float32, batch.device)

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the batch is here."""
        return self._table.num_strips == 0

    # ---- the first look

    def measure(self, given: Given, basis: KernelBasis, terms: Mapping[str, Tensor]) -> Tensor:
        """The new R of all strips; sums go to ``terms``."""
        table, columns = self._table, self._batch.geometry.num_columns
        rows = self._empty(table.num_rows)
        partials = self._empty(table.num_tiles, self._needs.num_sums, columns)
        singles = self._empty(table.num_tiles, 2)
        with on(self._batch.device):
            if self._shapes.row_width:
                self._measure_rows(given, rows, partials)
            else:
                self._measure(given, basis, rows, partials, singles)
            gather[(triton.cdiv(columns, self._shapes.sum_width), table.num_matrices)](
                table.matrices,
                partials,
                singles,
                terms["columns"],
                terms.get("squares", self._nothing),
                terms.get("cross", self._nothing),
                terms.get("history", self._nothing),
                terms.get("weight", self._nothing),
                columns,
                SUMS=self._needs.num_sums,
                HISTORY=self._needs.history,
                SCALED=self._needs.weight,
                TILES=self._shapes.sum_tiles,
                WIDTH=self._shapes.sum_width,
            )
        return rows

    def _measure_rows(self, given: Given, rows: Tensor, partials: Tensor) -> None:
        measure_rows[self._tiles](
            self._table.strips,
            self._inputs.addresses,
            self._inputs.scalars,
            rows,
            partials,
            self._batch.geometry.num_columns,
            SUMS=self._needs.num_sums,
            ROWS=self._tile_rows,
            STEP=self._shapes.row_step,
            WIDTH=self._shapes.row_width,
            GRADIENT=DTYPES[given.dtype],
            ALIGNED=self._table.is_aligned and given.is_aligned,
            **ROW_OPTIONS,
        )

    def _measure(
        self, given: Given, basis: KernelBasis, rows: Tensor, partials: Tensor, singles: Tensor
    ) -> None:
        shapes = self._shapes
        measure[self._tiles](
            self._table.strips,
            self._inputs.addresses,
            self._inputs.scalars,
            basis.old,
            given.drawn.units,
            given.drawn.table,
            self._inputs.multipliers,
            self._values,
            rows,
            partials,
            singles,
            self._batch.geometry.num_columns,
            SUMS=self._needs.num_sums,
            ROWS=self._tile_rows,
            WIDTH=shapes.width,
            RANK=shapes.rank,
            PADDED=shapes.padded_rank,
            HISTORY=self._needs.history,
            SCALED=self._needs.weight,
            **self._dtypes(given),
            **(EXPANDED_OPTIONS if given.drawn.bits else MEASURE_OPTIONS),
        )

    @property
    def _tiles(self) -> tuple[int, int]:
        return triton.cdiv(self._table.longest, self._tile_rows), self._table.num_strips

    # ---- what follows from the sums

    def settle(self, totals: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The new C, sqrt(mean(R) / C), and |X|^2 beside <X, M A> (H, 2)."""
        with on(self._batch.device):
            table, size = self._table, self._batch.geometry
            column_HM = self._empty(table.num_matrices, size.num_columns)
            factor_HM, sums_H2 = torch.empty_like(column_HM), self._empty(table.num_matrices, 2)
            if table.num_matrices:
                settle[(table.num_matrices,)](
                    table.matrices,
                    self._inputs.scalars,
                    totals["columns"],
                    totals.get("squares", self._nothing),
                    totals.get("cross", self._nothing),
                    column_HM,
                    factor_HM,
                    sums_H2,
                    size.num_rows,
                    size.num_columns,
                    SUMS=self._needs.num_sums,
                    WIDTH=self._shapes.settle_width,
                )
            return column_HM, factor_HM, sums_H2

    def scale(self, sums_H2: Tensor, totals: Mapping[str, Tensor]) -> Tensor:
        """The factor of X and the step size (H, 2); ``totals``: of all messages."""
        with on(self._batch.device):
            table, config = self._table, self._batch.config
            scales_H2 = torch.empty_like(sums_H2)
            scale[(triton.cdiv(table.num_matrices, _SCALED_TOGETHER),)](
                table.matrices,
                self._inputs.scalars,
                sums_H2,
                totals.get("history", self._nothing),
                totals.get("update", self._nothing),
                totals.get("weight", self._nothing),
                scales_H2,
                table.num_matrices,
                self._batch.elements_per_matrix,
                RULE=self._shapes.rule,
                CLIPS=config.clip is not None,
                KNOWN=self._needs.update,
                SCALED=self._needs.weight,
                NUMBERS=MATRIX_NUMBERS.value,
                WIDTH=_SCALED_TOGETHER,
            )
            return scales_H2

    # ---- the second look

    def sum_update(self, look: Look, update_S: Tensor) -> None:
        """|U|^2 where U = M A: neither the clip nor the rate is known, or matters."""
        with on(self._batch.device):
            table, groups = self._table, triton.cdiv(self._shapes.blocks, self._shapes.group)
            singles = self._empty(table.num_rows, groups)
            ones_H2 = torch.ones((table.num_matrices, 2), device=self._batch.device)
            self._finish(look, ones_H2, singles, FINISH_TALLIES)
            gather_update[(table.num_matrices,)](
                table.matrices, singles, update_S, groups, WIDTH=self._shapes.sum_width
            )

    def finish(self, look: Look, scales_H2: Tensor) -> None:
        """New weights, momenta and R."""
        with on(self._batch.device):
            self._finish(look, scales_H2, self._nothing, FINISH_WRITES)

    def _finish(self, look: Look, scales_H2: Tensor, singles: Tensor, purpose: int) -> None:
        table, shapes = self._table, self._shapes
        rows, options = finish_of(bits=look.given.drawn.bits, kept_bits=shapes.kept_bits)
        grid = (
            triton.cdiv(table.longest, rows),
            triton.cdiv(shapes.blocks, shapes.group),
            table.num_strips,
        )
        finish[grid](
            table.strips,
            self._inputs.addresses,
            self._inputs.scalars,
            look.basis.old,
            look.basis.new,
            look.basis.move,
            look.given.drawn.units,
            look.given.drawn.table,
            self._inputs.multipliers,
            self._values,
            look.rows,
            look.factor_HM,
            scales_H2,
            singles,
            len(self._batch.members),
            self._batch.geometry.num_columns,
            shapes.blocks,
            RULE=shapes.rule,
            ROWS=rows,
            WIDTH=shapes.width,
            RANK=shapes.rank,
            PADDED=shapes.padded_rank,
            GROUP=shapes.group,
            WINDOW=look.basis.kind,
            TALLIES=purpose,
            ROUNDS=self._batch.config.stochastic_rounding,
            **self._dtypes(look.given),
            **options,
        )

    def _dtypes(self, given: Given) -> dict[str, Any]:
        return {
            "BITS": given.drawn.bits,
            "DRAWN": given.drawn.rank,
            "DRAWN_PADDED": max(SMALLEST_PRODUCT, triton.next_power_of_2(given.drawn.rank)),
            "KEPT": self._shapes.kept_bits,
            "GRADIENT": DTYPES[given.dtype],
            "WEIGHT": self._shapes.weight,
            "MOMENTUM": self._shapes.momentum,
            "ALIGNED": self._table.is_aligned and given.is_aligned,
        }

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self._batch.device)
