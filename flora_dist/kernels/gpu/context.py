# SPDX-License-Identifier: Apache-2.0
"""What all launches of a batch of matrices share.

Shape suffixes: H matrices that are here, M columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.sketch.quantise import value_table
from flora_dist.core.step.batch import Batch
from flora_dist.core.step.momentum_rules import rule_of
from flora_dist.kernels.gpu.inputs import Given, Inputs, KernelBasis
from flora_dist.kernels.gpu.shapes import (
    DTYPES,
    MEASURED_ROWS,
    TILE_ROWS,
    Shapes,
    padded,
    shapes_of,
)
from flora_dist.kernels.gpu.tables import Strips, Tables, make_tables


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
    blocks: Tensor | None
    """Whole sketches of cut blocks (parameters, slots, rank), once they are known."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """A batch, its tables on the device, and what its kernels are compiled for."""

    batch: Batch
    inputs: Inputs
    needs: Needs
    shapes: Shapes
    table: Tables
    tile_rows: int
    """Of a program that measures whole rows."""
    nothing: Tensor
    """Stands where a kernel reads nothing."""
    values: Tensor
    """Of the codes of a momentum in few bits."""

    @property
    def groups(self) -> int:
        """Programs that share a row in the second look; a cut row has fewer blocks."""
        return -(-self.shapes.blocks // self.shapes.group)

    def operands(
        self, strips: Strips, given: Given, basis: KernelBasis
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What every kernel that reads gradients and a momentum is given first."""
        return (
            strips.table,
            self.inputs.addresses,
            self.inputs.scalars,
            basis.old,
            given.drawn.units,
            given.drawn.table,
            self.inputs.multipliers,
            self.values,
        )

    def constants(self, given: Given, strips: Strips) -> dict[str, Any]:
        """Of every kernel that reads gradients and a momentum."""
        drawn, shapes = given.drawn, self.shapes
        return {
            "WIDTH": shapes.width,
            "RANK": shapes.rank,
            "PADDED": shapes.padded_rank,
            "BITS": drawn.bits,
            "DRAWN": drawn.rank,
            "DRAWN_PADDED": padded(drawn.rank),
            "KEPT": shapes.kept_bits,
            "GRADIENT": DTYPES[given.dtype],
            "MOMENTUM": shapes.momentum,
            "ALIGNED": strips.is_aligned and given.is_aligned,
        }

    def empty(self, *shape: int) -> Tensor:
        """Room for float32 on the device."""
        return torch.empty(shape, dtype=torch.float32, device=self.batch.device)


def make_context(batch: Batch, inputs: Inputs, gradient_block: int) -> Context:
    """``gradient_block``: of gradients that are known by sketches; 0 of dense ones."""
    shapes = shapes_of(batch, gradient_block)
    tile_rows = MEASURED_ROWS if shapes.row_width else TILE_ROWS
    nothing = torch.zeros(1, device=batch.device)
    values = nothing
    if shapes.kept_bits:
        values = value_table(shapes.kept_bits, torch.float32, batch.device)
    return Context(
        batch=batch,
        inputs=inputs,
        needs=_needs_of(batch),
        shapes=shapes,
        table=make_tables(batch, tile_rows),
        tile_rows=tile_rows,
        nothing=nothing,
        values=values,
    )


def _needs_of(batch: Batch) -> Needs:
    rule, bounds = rule_of(batch.config, batch.geometry), batch.config.bounds_matrices
    update = bounds and rule is not None and rule.asks_update
    history = bounds and rule is not None and rule.asks_history
    num_sums = 1
    if bounds and not update:
        num_sums = 3 if history else 2
    return Needs(
        num_sums=num_sums, history=history, weight=batch.config.scales_matrices, update=update
    )
