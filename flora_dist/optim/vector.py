# SPDX-License-Identifier: Apache-2.0
"""The step of a parameter of at most one dimension: nothing factored, nothing compressed."""

from __future__ import annotations

import torch
from torch import Tensor

from flora_dist.optim.gradient import SketchedGradient
from flora_dist.optim.job import Job, arithmetic_dtype
from flora_dist.optim.part import Terms
from flora_dist.optim.spec import VECTOR_EPS
from flora_dist.sketch.keys import Purpose


class VectorUpdate:
    """V <- b2 V + (1-b2) (G^2 + eps);  X = G / sqrt(V);  M <- b M + (1-b) X;  U = M, or X."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._weight = job.part.weight().reshape(-1)
        self._dtype = arithmetic_dtype(self._weight.dtype)
        assert not isinstance(job.gradient, SketchedGradient), job.part.name  # vectors are dense
        self._gradient = job.gradient

    def measure(self) -> Terms:
        """The squared norms of what is clipped, and of the weight where lr scales with it."""
        terms = {"presence": self._number(0.0 if self._gradient is None else 1.0)}
        self._second, self._x = self._normalise()
        self._update = self._x
        if self.job.config.momentum in {"flora", "flora_strict"}:
            self._update = self._blended(self._x)
        terms["update"] = self._update.square().sum().reshape(1)
        if self.job.config.scale_parameter:
            terms["weight"] = self._weight.to(self._dtype).square().sum().reshape(1)
        return terms

    def is_finite(self) -> Tensor:
        """Whether this rank's gradient is (), after ``measure``: NaN and inf reach X."""
        return self._x.sum().isfinite()

    def is_zero(self) -> Tensor:
        """Whether this rank's gradient is all zeros (), after ``measure``."""
        return ~self._x.any()

    def couple(self, totals: Terms) -> Terms:
        """No second message: nothing of a vector is shared but norms."""
        self._totals = totals
        return {}

    def tally(self, totals: Terms) -> Terms:
        """Nor a third."""
        del totals
        return {}

    def finish(self, totals: Terms) -> None:
        """Clip, add, write."""
        del totals
        job, num_elements = self.job, self.job.geometry.num_columns
        factor = job.clip_factor(self._totals["update"], num_elements)
        update = self._update * factor
        momentum = update
        if job.config.momentum == "blend":  # clips X, then adds
            update = momentum = self._blended(update)
        elif job.config.momentum != "none":
            momentum = self._update
        rate = job.rate(self._totals.get("weight"), num_elements)
        weight = self._weight.to(self._dtype)
        weight = weight * (1 - job.lr * job.weight_decay) - rate * update
        self._write_(self._weight, weight, Purpose.ROUND_WEIGHT)
        job.local("second").view(-1).copy_(self._second)
        if job.config.momentum != "none":
            self._write_(job.local("momentum").view(-1), momentum, Purpose.ROUND_MOMENTUM)
        job.count_step()

    def _normalise(self) -> tuple[Tensor, Tensor]:
        """The new V and X = G / sqrt(V)."""
        job = self.job
        eps = max(job.config.eps, VECTOR_EPS)
        gradient = torch.zeros_like(self._weight, dtype=self._dtype)
        if self._gradient is not None:
            gradient = self._gradient.reshape(-1).to(self._dtype) * job.sign
        second = job.local("second").view(-1)
        second = job.beta2 * second + (1 - job.beta2) * (gradient.square() + eps)
        return second, gradient * second.rsqrt()

    def _number(self, value: float) -> Tensor:
        return torch.full((1,), value, dtype=self._dtype, device=self._weight.device)

    def _write_(self, target: Tensor, value: Tensor, purpose: Purpose) -> None:
        for tile in self.job.part.tiles:  # none where the shard is empty, else one
            self.job.store.write_(
                target.view(tile.sizes),
                value.view(tile.sizes),
                purpose=purpose,
                tile=tile,
                columns=tile.columns,
                num_columns=self.job.geometry.num_columns,
            )

    def _blended(self, x: Tensor) -> Tensor:
        # M <- b M + (1-b) X
        beta = self.job.config.beta1
        return beta * self.job.local("momentum").view(-1).to(self._dtype) + (1 - beta) * x
