# SPDX-License-Identifier: Apache-2.0
"""``Phases`` of a batch of vectors by Triton kernels; core/step/vector.py has the formulas.

Nothing is kept between the two passes but sums: the second one takes X from G again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from flora_dist.core.protocols import Terms
from flora_dist.core.step.batch import Batch, Moment
from flora_dist.kernels.gpu.access import CLIPPED, UNBOUNDED
from flora_dist.kernels.gpu.inputs import Given, Inputs
from flora_dist.kernels.gpu.place import on
from flora_dist.kernels.gpu.settle import scale
from flora_dist.kernels.gpu.shapes import DTYPES, shapes_of
from flora_dist.kernels.gpu.tables import make_vector_table
from flora_dist.kernels.gpu.vector import SINGLES, VECTOR_NUMBERS, finish_vector, measure_vector

_CHUNK = 1024
"""Elements of a program."""
_MATRICES = 128
"""Parameters whose scales one program works out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one look at the gradients tells."""

    terms: Terms
    given: Given
    sums_P4: Tensor
    """By parameter: |X|^2 or |U|^2, |W|^2, and the sums of V and |G|."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed:
    """The same with the sums of message 1; vectors have no other message."""

    terms: Terms
    given: Given
    sums: Terms


class GpuVectorPhases:
    """``Phases`` of a batch of vectors on a GPU; see the module's docstring."""

    def __init__(self, batch: Batch) -> None:
        self._batch, self._shapes = batch, shapes_of(batch)
        self._inputs, self._table = Inputs(batch), make_vector_table(batch)
        self._width = batch.members[0].weight.numel()
        tiles = batch.members[0].tiles
        self._first_column = tiles[0].columns[0] if tiles else 0
        self._chunks = triton.cdiv(self._width + self._first_column % 8, _CHUNK)
        self._nothing = torch.zeros(1, device=batch.device)

    def measure(self, now: Moment) -> Measured:
        """The squared norms of what is clipped, and of the weight where lr scales with it."""
        return self.measure_sent(now, self.send(now))

    def send(self, now: Moment) -> Given:
        """Send what of a step is not in a graph that was recorded of an earlier one."""
        return self._inputs.write(now)

    def measure_sent(self, now: Moment, given: Given) -> Measured:
        """``measure``, by numbers that were sent."""
        members = len(self._batch.members)
        singles = torch.empty((members, self._chunks, SINGLES.value), device=self._batch.device)
        with on(self._batch.device):
            if self._chunks:
                measure_vector[(self._chunks, members)](
                    self._table,
                    self._inputs.addresses,
                    self._inputs.scalars,
                    singles,
                    self._first_column,
                    self._width,
                    CLIPS_INPUT=self._shapes.clips_input,
                    **self._constants(given),
                )
        sums_P4 = singles.sum(1)
        terms = {
            "presence": torch.full((members,), float(not now.is_missing), device=singles.device),
            "update": sums_P4[:, 0].contiguous(),
        }
        if self._batch.config.scales_vectors:
            terms["weight"] = sums_P4[:, 1].contiguous()
        return Measured(terms=terms, given=given, sums_P4=sums_P4)

    def is_finite(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are (): NaN, inf and overflow reach V."""
        return measured.sums_P4[:, 2].sum().isfinite()

    def is_zero(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are all zeros ()."""
        return ~measured.sums_P4[:, 3].any()

    def take_rows(self, now: Moment, measured: Measured) -> None:
        """Nothing: vectors have no rows that follow from other ranks' elements."""

    def couple(self, now: Moment, measured: Measured, totals: Terms) -> Summed:
        """No second message: nothing of a vector is shared but norms."""
        del now
        return Summed(terms={}, given=measured.given, sums=totals)

    def tally(self, now: Moment, coupled: Summed, totals: Terms) -> Summed:
        """Nor a third."""
        del now, totals
        return coupled

    def finish(self, now: Moment, tallied: Summed, totals: Terms) -> None:
        """Clip, update weights and state."""
        del now, totals
        members, config = len(self._batch.members), self._batch.config
        if not self._chunks:
            return
        with on(self._batch.device):
            scales_P2 = torch.empty((members, 2), device=self._batch.device)
            scale[(triton.cdiv(members, _MATRICES),)](
                self._table,
                self._inputs.scalars,
                self._nothing,
                self._nothing,
                tallied.sums["update"],
                tallied.sums.get("weight", self._nothing),
                scales_P2,
                members,
                self._batch.elements_per_matrix,
                RULE=self._shapes.rule,
                CLIPS_INPUT=self._shapes.clips_input,
                BOUND=(UNBOUNDED if config.clip is None else CLIPPED).value,
                KNOWN=True,
                SCALED=config.scales_vectors,
                NUMBERS=VECTOR_NUMBERS.value,
                WIDTH=_MATRICES,
            )
            finish_vector[(self._chunks, members)](
                self._table,
                self._inputs.addresses,
                self._inputs.keys,
                self._inputs.scalars,
                scales_P2,
                members,
                self._first_column,
                self._width,
                ROUNDS=config.stochastic_rounding,
                **self._constants(tallied.given),
            )

    def _constants(self, given: Given) -> dict[str, Any]:
        return {
            "RULE": self._shapes.rule,
            "CHUNK": _CHUNK,
            "GRADIENT": DTYPES[given.dtype],
            "WEIGHT": self._shapes.weight,
            "MOMENTUM": self._shapes.momentum,
        }
