# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels over cut rows of a batch; ``launches.py`` and ``phases.py`` say when.

Shape suffixes: S matrices that are summed.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
from torch import Tensor

from flora_dist.kernels.gpu.context import Context, Look
from flora_dist.kernels.gpu.cut import couple_cut, measure_cut, settle_cut
from flora_dist.kernels.gpu.inputs import Given, KernelBasis
from flora_dist.kernels.gpu.place import on
from flora_dist.kernels.gpu.settle import gather_rows
from flora_dist.kernels.gpu.shapes import AS_TORCH, SETTLED_ROWS, measure_options, pass_of
from flora_dist.kernels.gpu.tables import CUT_ROWS


class CutLaunches:
    """The kernels of cut rows, of which there is one at least."""

    def __init__(self, context: Context) -> None:
        self._of = context

    def measure(
        self,
        given: Given,
        basis: KernelBasis,
        terms: Mapping[str, Tensor],
        partials: Tensor,
        singles: Tensor,
    ) -> None:
        """Sums go to ``partials`` and ``singles``, what is told of cut rows to ``terms``."""
        of, nothing = self._of, self._of.nothing
        strips = of.table.cut
        measure_cut[(triton.cdiv(strips.longest, CUT_ROWS), strips.count)](
            *of.operands(strips, given, basis),
            terms.get("rows", nothing),
            terms.get("elements", nothing),
            terms.get("products", nothing),
            partials,
            singles,
            of.batch.geometry.num_columns,
            SUMS=partials.shape[1],
            TRAVELS="elements" in terms,
            ROWS=CUT_ROWS,
            HISTORY=of.needs.history,
            SCALED=of.needs.weight,
            WEIGHT=of.shapes.weight,
            **of.constants(given, strips),
            **measure_options(given.drawn.bits),
        )

    def settle(self, sums: Tensor, rows: Tensor) -> None:
        """The new R of cut rows among all ``rows``, from their sums of G^2 over all ranks."""
        of, strips = self._of, self._of.table.cut
        with on(of.batch.device):
            settle_cut[(triton.cdiv(strips.longest, SETTLED_ROWS), strips.count)](
                strips.table,
                of.inputs.scalars,
                sums,
                rows,
                of.batch.geometry.num_columns,
                ROWS=SETTLED_ROWS,
                **AS_TORCH,
            )

    def couple(self, look: Look, terms: Mapping[str, Tensor]) -> None:
        """Fill in the terms of message 2."""
        of, table = self._of, self._of.table
        names = [name for name in ("squares", "cross") if name in terms]
        singles = {name: of.empty(table.num_rows, of.groups) for name in names}
        with on(of.batch.device):
            self._couple(look, singles, terms.get("blocks"))
            for name in names:
                gather_rows[(table.num_matrices,)](
                    table.matrices,
                    singles[name],
                    terms[name],
                    of.groups,
                    WIDTH=of.shapes.sum_width,
                )

    def _couple(self, look: Look, singles: Mapping[str, Tensor], blocks: Tensor | None) -> None:
        of, nothing, given = self._of, self._of.nothing, look.given
        strips, shapes = of.table.cut, of.shapes
        rows, options = pass_of(
            bits=given.drawn.bits,
            kept_bits=shapes.kept_bits,
            moments=of.batch.geometry.moments,
        )
        couple_cut[(triton.cdiv(strips.longest, rows), of.groups, strips.count)](
            *of.operands(strips, given, look.basis),
            look.basis.new,
            look.rows,
            look.factor_HM,
            singles.get("squares", nothing),
            singles.get("cross", nothing),
            nothing if blocks is None else blocks,
            of.batch.geometry.num_columns,
            SUMS=1 + len(singles),
            SKETCHES=blocks is not None,
            GROUP=shapes.group,
            ROWS=rows,
            NORMALISE=shapes.normalise,
            **of.constants(given, strips),
            **options,
        )
