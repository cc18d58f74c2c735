# SPDX-License-Identifier: Apache-2.0
"""The step of a batch of parameters of at most one dimension: nothing factored or compressed.

    V <- b2 V + (1-b2) (G^2 + eps);  X = G / sqrt(V);  U and M from the rule, where A = I

Shape suffixes: E parameters, N = 1, W elements here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.core.protocols import Terms
from flora_dist.core.sketch.ops import Blocks
from flora_dist.core.state.spec import VECTOR_EPS
from flora_dist.core.step.basis import Place
from flora_dist.core.step.batch import Batch, Moment
from flora_dist.core.step.elements import Writer, clip_factor, copy_to_, rate_of
from flora_dist.core.step.momentum_rules import rule_of
from flora_dist.core.step.views import joined


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one look at the gradients tells: all of the step but the clip."""

    terms: Terms
    second_ENW: Tensor
    """The new V."""
    x_ENW: Tensor
    """X, or U where that is what is clipped."""
    momentum_ENW: Tensor | None
    """The new M, where X is not clipped before the rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed:
    """The same with the sums of message 1; vectors have no other message."""

    terms: Terms
    measured: Measured
    sums: Terms


class VectorPhases:
    """``Phases`` of a batch of vectors in torch's operators; see the module's docstring."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._rule = rule_of(batch.config, batch.geometry)
        self._clips_input = self._rule is None or self._rule.clips_input
        members = batch.members
        self._weights = [member.weight.view(1, 1, -1) for member in members]
        self._seconds = [member.local["second"].view(1, 1, -1) for member in members]
        self._momenta = [
            member.local["momentum"].view(1, 1, -1)
            for member in members
            if "momentum" in member.local
        ]
        place = slice(0, len(members))
        self._place = Place(matrices=place, columns=(0, self._weights[0].shape[2]))

    def measure(self, now: Moment) -> Measured:
        """The squared norms of what is clipped, and of the weight where lr scales with it."""
        gradient_ENW = self._read(now)
        # V <- b2 V + (1-b2) (G^2 + eps)
        eps = max(self._batch.config.eps, VECTOR_EPS)
        second_ENW = now.beta2 * joined(self._seconds)
        second_ENW += (1 - now.beta2) * (gradient_ENW.square() + eps)
        # what is clipped: X = G / sqrt(V), or U from it
        x_ENW, momentum_ENW = gradient_ENW * second_ENW.rsqrt(), None
        if not self._clips_input:
            x_ENW, momentum_ENW = self._advance(x_ENW, now)
        terms = {
            "presence": x_ENW.new_full((x_ENW.shape[0],), float(not now.is_missing)),
            "update": _square_sums(x_ENW),
        }
        if self._batch.config.scales_vectors:
            terms["weight"] = _square_sums(joined(self._weights).to(self._batch.dtype))
        return Measured(terms=terms, second_ENW=second_ENW, x_ENW=x_ENW, momentum_ENW=momentum_ENW)

    def is_finite(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are (): NaN, inf and overflow reach V."""
        return measured.second_ENW.sum().isfinite()

    def is_zero(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are all zeros ()."""
        return ~measured.x_ENW.any()

    def take_rows(self, now: Moment, measured: Measured) -> None:
        """Nothing: vectors have no rows that follow from other ranks' elements."""

    def couple(self, now: Moment, measured: Measured, totals: Terms) -> Summed:
        """No second message: nothing of a vector is shared but norms."""
        del now
        return Summed(terms={}, measured=measured, sums=totals)

    def tally(self, now: Moment, coupled: Summed, totals: Terms) -> Summed:
        """No third message either."""
        del now, totals
        return coupled

    def finish(self, now: Moment, tallied: Summed, totals: Terms) -> None:
        """Clip, update weights and state."""
        del totals
        batch, measured, sums = self._batch, tallied.measured, tallied.sums
        update_ENW, momentum_ENW = measured.x_ENW, measured.momentum_ENW
        update_ENW.mul_(clip_factor(sums["update"], batch).view(-1, 1, 1))
        if self._clips_input:
            update_ENW, momentum_ENW = self._advance(update_ENW, now)
        writer, rate = Writer(batch=batch, now=now), rate_of(now, sums.get("weight"), batch)
        everyone = slice(0, len(batch.members))
        for tile in batch.members[0].tiles:  # none where the shard is empty, else one
            if momentum_ENW is not None:  # first: it may be the update, which is overwritten
                writer.write_momentum_(self._momenta, momentum_ENW, members=everyone, tile=tile)
            writer.step_weights_(self._weights, update_ENW, rate, members=everyone, tile=tile)
            copy_to_(self._seconds, measured.second_ENW)

    def _advance(self, x_ENW: Tensor, now: Moment) -> tuple[Tensor, Tensor | None]:
        if self._rule is None:
            return x_ENW, None
        momentum_ENW = joined(self._momenta).to(x_ENW.dtype)
        x = Blocks(elements_ENW=x_ENW, whole_ENM=x_ENW)
        return self._rule.advance(x, x_ENW, momentum_ENW, now, self._place)

    def _read(self, now: Moment) -> Tensor:
        """G (E, 1, W), in the arithmetic's dtype, times the sign."""
        found = [each for each in now.gradients if isinstance(each, Tensor)]
        if not found:
            return torch.zeros_like(joined(self._weights), dtype=self._batch.dtype)
        gradient_ENW = joined([each.reshape(1, 1, -1) for each in found]).to(self._batch.dtype)
        return gradient_ENW if self._batch.sign > 0 else -gradient_ENW


def _square_sums(x_ENW: Tensor) -> Tensor:
    return x_ENW.square().sum(2).view(-1)
